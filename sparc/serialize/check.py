"""Check the stored types of a graph: run it on FakeTensors of concrete sizes and compare what comes out.

Every symbol gets a prime of its own, so a wrong size is not hidden by a coincidence. Where the result's shape depends
on data, the stored type is believed.
"""

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from sparc.program import Entry
from sparc.serialize.schema import MAX_INT, malformed
from sparc.serialize.symbols import prime_sizes
from sparc.serialize.values import TypeReader

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


def check_types(
    entry: Entry,
    stored: Mapping[fx.Node, Any],
    types: TypeReader,
    described: Mapping[str, Any],
    symbols: Mapping[str, sympy.Symbol],
) -> None:
    """Compare every node's stored type with the inferred one.

    Args:
        entry: the entry.
        stored: the JSON type of each node; None for weights.
        types: reads JSON types.
        described: the JSON of the symbols.
        symbols: the symbols by name.

    Raises:
        ArtifactError: SPARC503 where they differ, or where an operator does not take its arguments.
    """
    sizes = prime_sizes(described, symbols)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    read = types.at(sizes, mode)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in entry.graph.nodes:
            if node.op == "placeholder":
                values[node] = read(stored[node])
            elif node.op == "get_attr":
                with mode:
                    own = node.meta["val"]
                    values[node] = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype)
            elif node.op == "call_function":
                expected = read(stored[node])
                values[node] = _infer(node, values, mode, expected)
                if not _agree(values[node], expected):
                    raise malformed(
                        f"the stored type of node {node.name} is wrong",
                        f"{_short(expected)}, but it is {_short(values[node])}",
                    )


def _infer(node: fx.Node, values: Mapping[fx.Node, Any], mode: FakeTensorMode, expected: Any) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: values[used])
    try:
        with mode:
            found = node.target(*args, **kwargs)  # type: ignore[operator]
    except _DATA_DEPENDENT:
        return expected
    except Exception as error:  # an operator refuses its arguments in ways of its own
        raise malformed(f"node {node.name} cannot be computed", f"{type(error).__name__}: {error}"[:300]) from None
    if isinstance(found, int) and abs(found) > MAX_INT:
        raise malformed(f"node {node.name} computes a number out of bounds")
    return found


def _agree(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and found.dtype == expected.dtype and found.shape == expected.shape
    if isinstance(expected, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(expected) and all(map(_agree, found, expected))
    if isinstance(expected, (bool, int)) or expected is None:
        return type(found) is type(expected) and bool(found == expected)
    return isinstance(found, float)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{len(value)} values" if isinstance(value, (list, tuple)) else repr(value)[:80]
