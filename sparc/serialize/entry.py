"""One entry of a program as JSON: its nodes, symbols and signature.

{"symbols": {"s3": {"kind": "size", "range": [2, null], "example": 8}}, "names": {"s3": "batch"}, "signature": {...},
 "nodes": [{"op": "placeholder", "name": "x", "type": {...}},
           {"op": "weight", "name": "fc_weight", "weight": "fc.weight"},
           {"op": "call", "name": "linear", "target": "aten.linear.default", "args": [...], "kwargs": {...}, "type":
           {...},
            "module": "fc", "class": "Linear", "source": "model.py:3 in forward"}],
 "results": [{"node": "linear"}],
 "cache": {"length": 8192, "slots": [["past.0.key", "present.0.key", 2], ...]}}     where there is one
"""

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparc.encoding.operators import is_decode, is_quantize
from sparc.program import Entry
from sparc.serialize import schema
from sparc.serialize.cache import cache_from_json, cache_to_json
from sparc.serialize.check import check_types
from sparc.serialize.schema import malformed, unwritable
from sparc.serialize.signature import signature_from_json, signature_to_json
from sparc.serialize.symbols import symbols_from_json, symbols_to_json
from sparc.serialize.targets import target_from_text, target_to_text
from sparc.serialize.values import ArgumentReader, TypeReader, argument_to_json, symbols_of, type_to_json

MAX_NODES = 500_000
_META = {"module": "module", "class": "type", "source": "source"}


# writing ------------------------------------------------------------------------------------------------------------
def entry_to_json(entry: Entry) -> dict[str, Any]:
    """An entry as JSON-ready values.

    Raises:
        ArtifactError: SPARC508 when a node cannot be stored.
    """
    used: set[sympy.Symbol] = set()
    for node in entry.graph.nodes:
        used |= symbols_of(node.meta.get("val"))
    return {
        "symbols": symbols_to_json(entry.fake_mode.shape_env, used),
        "names": dict(entry.symbols),
        "signature": signature_to_json(entry.signature),
        **({"cache": cache_to_json(entry.cache)} if entry.cache is not None else {}),
        "nodes": [_node_to_json(node) for node in entry.graph.nodes if node.op != "output"],
        "results": [argument_to_json(result) for result in entry.output.args[0]],  # type: ignore[union-attr]
    }


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"op": "placeholder", "name": node.name, "type": type_to_json(node.meta["val"])}
    if node.op == "get_attr":
        return {"op": "weight", "name": node.name, "weight": str(node.target)}
    if node.op != "call_function":
        raise unwritable(f"a node of kind {node.op} cannot be stored")
    described: dict[str, Any] = {"op": "call", "name": node.name, "target": target_to_text(node.target)}
    described["args"] = [argument_to_json(value) for value in node.args]
    if node.kwargs:
        described["kwargs"] = {key: argument_to_json(value) for key, value in node.kwargs.items()}
    described["type"] = type_to_json(node.meta.get("val"))
    described.update({key: str(node.meta[name]) for key, name in _META.items() if node.meta.get(name)})
    return described


# reading ------------------------------------------------------------------------------------------------------------
def entry_from_json(described: Any, weights: Mapping[str, Tensor], register: Callable[[str], None]) -> Entry:
    """An entry over these weights, its types checked by inferring them again.

    Args:
        described: what `entry_to_json` gave.
        weights: the program's weights.
        register: makes a spec's text known to `sparc::decode`.

    Raises:
        ArtifactError: SPARC503.
    """
    found = schema.fields(described, "an entry", ["symbols", "names", "signature", "nodes", "results"], ["cache"])
    names = {
        key: schema.text(value, "a dimension's name") for key, value in schema.entries(found["names"], "names").items()
    }
    environment, symbols = symbols_from_json(found["symbols"])
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    entry = Entry(fx.Graph(), signature_from_json(found["signature"]), mode, names)
    nodes: dict[str, fx.Node] = {}
    arguments = ArgumentReader(nodes)
    types = TypeReader(mode, symbols, environment)
    rows = schema.items(found["nodes"], "nodes")
    if len(rows) > MAX_NODES:
        raise malformed(f"an entry has {len(rows)} nodes", f"the limit is {MAX_NODES}")
    for row in rows:
        node = _node_from_json(row, entry, weights, arguments, types)
        if row["name"] in nodes:
            raise malformed(f"two nodes are called {row['name'][:80]!r}")
        nodes[row["name"]] = node
        _register(node, register)
    results = [arguments.read(value) for value in schema.items(found["results"], "results")]
    entry.graph.output(results)
    _check_counts(entry, len(results))
    if "cache" in found:
        entry.cache = cache_from_json(found["cache"], entry)
    check_types(entry, {nodes[row["name"]]: row.get("type") for row in rows}, types, found["symbols"], symbols)
    return entry


def _node_from_json(
    row: Any, entry: Entry, weights: Mapping[str, Tensor], arguments: ArgumentReader, types: TypeReader
) -> fx.Node:
    op = schema.mapping(row, "a node").get("op")
    if op == "placeholder":
        schema.fields(row, "a placeholder", ["op", "name", "type"])
        node = entry.graph.create_node("placeholder", row["name"], name=schema.text(row["name"], "a name"))
        node.meta["val"] = types.read(row["type"])
        return node
    if op == "weight":
        schema.fields(row, "a weight's node", ["op", "name", "weight"])
        if row["weight"] not in weights:
            raise malformed(f"unknown weight {str(row['weight'])[:80]!r}")
        node = entry.graph.create_node("get_attr", row["weight"], name=schema.text(row["name"], "a name"))
        node.meta["val"] = entry.fake(weights[row["weight"]])
        return node
    if op != "call":
        raise malformed(f"unknown kind of node {str(op)[:40]!r}")
    schema.fields(row, "a node", ["op", "name", "target", "args", "type"], ["kwargs", *_META])
    target = target_from_text(schema.text(row["target"], "a target"))
    args = tuple(arguments.read(value) for value in schema.items(row["args"], "arguments"))
    kwargs = {key: arguments.read(value) for key, value in schema.entries(row.get("kwargs", {}), "arguments").items()}
    node = entry.graph.create_node("call_function", target, args, kwargs, name=schema.text(row["name"], "a name"))
    node.meta["val"] = types.read(row["type"])
    node.meta.update({name: schema.text(row[key], key) for key, name in _META.items() if key in row})
    return node


def _register(node: fx.Node, register: Callable[[str], None]) -> None:
    if is_decode(node):
        register(schema.text(node.args[1], "a spec"))
    elif is_quantize(node):
        register(schema.text(node.args[2], "a spec"))


def _check_counts(entry: Entry, results: int) -> None:
    if len(entry.placeholders) != len(entry.signature.input_names) or results != len(entry.signature.output_names):
        raise malformed("the signature does not fit the graph")
    if any(not isinstance(node, fx.Node) for node in entry.output.args[0]):  # type: ignore[union-attr]
        raise malformed("a result is no value of the graph")
    if any(not isinstance(node.meta["val"], torch.Tensor) for node in entry.placeholders):
        raise malformed("an input is no tensor")
