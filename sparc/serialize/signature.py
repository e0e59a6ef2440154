"""Signatures as JSON, checked on reading."""

import math
from typing import Any

from sparc.serialize import schema
from sparc.serialize.schema import malformed
from sparc.signature import Signature

_KINDS = ("leaf", "tuple", "list", "dict", "class")
_KEYS = ("parameters", "positional", "inputs", "input_leaves", "output", "output_leaves")


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """`Signature.to_dict`, with frozen floats that JSON lacks written as `{"float": "inf"}`."""
    described = signature.to_dict()
    for leaf in (*described["input_leaves"], *described["output_leaves"]):
        value = leaf.get("frozen")
        if isinstance(value, float) and not math.isfinite(value):
            leaf["frozen"] = {"float": str(value)}
    return described


def signature_from_json(described: Any) -> Signature:
    """The inverse of `signature_to_json`.

    Raises:
        ArtifactError: SPARC503.
    """
    found = dict(schema.fields(described, "a signature", _KEYS))
    for key in ("parameters", "positional"):
        schema.texts(found[key], key)
    for structure in (*schema.items(found["inputs"], "inputs"), found["output"]):
        _check_structure(structure, 0)
    for key in ("input_leaves", "output_leaves"):
        found[key] = [_leaf(leaf) for leaf in schema.items(found[key], key)]
    signature = Signature.from_dict(found)
    sizes = [structure.size for structure in signature.inputs]
    if len(signature.parameters) != len(sizes) or sum(sizes) != len(signature.input_leaves):
        raise malformed("a signature's inputs do not fit its structure")
    if signature.output.size != len(signature.output_leaves):
        raise malformed("a signature's outputs do not fit its structure")
    return signature


def _leaf(described: Any) -> dict[str, Any]:
    leaf = dict(schema.fields(described, "a leaf", ["name"], ["is_tensor", "frozen"]))
    schema.text(leaf["name"], "a leaf's name")
    frozen = leaf.get("frozen")
    if isinstance(frozen, dict):
        leaf["frozen"] = float(schema.text(schema.fields(frozen, "a number", ["float"])["float"], "a number", 8))
    elif not (frozen is None or isinstance(frozen, (bool, int, float, str))) or not isinstance(
        leaf.get("is_tensor", True), bool
    ):
        raise malformed("a leaf is malformed")
    return leaf


def _check_structure(described: Any, depth: int) -> None:
    if depth > schema.MAX_DEPTH:
        raise malformed("a signature is nested too deeply")
    found = schema.fields(described, "a structure", ["kind"], ["children", "keys", "type"])
    children = schema.items(found.get("children", []), "children")
    if found["kind"] not in _KINDS or (found["kind"] == "leaf" and children):
        raise malformed("a structure is of no known kind")
    keys = schema.texts(found.get("keys", []), "keys")
    if (keys and len(keys) != len(children)) or (found["kind"] in ("dict", "class") and len(keys) != len(children)):
        raise malformed("a structure's keys do not fit its children")
    schema.text(found.get("type", ""), "a type's name")
    for child in children:
        _check_structure(child, depth + 1)
