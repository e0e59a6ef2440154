"""What a site is made of: the encoded weight, and how the activation it meets is quantized."""

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from sparc.encoding.base import Encoding
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import find_spec, is_decode, is_quantize
from sparc.encoding.view import WeightView
from sparc.program import Program, is_weight

Kind = Literal["float", "tensor", "token", "block", "static", "split", "split_block", "other"]


@dataclass(frozen=True)
class Encoded:
    """A weight behind `sparc::decode`.

    Args:
        node: the decode.
        site: the weight's own name.
        parts: the names of the stored parts, by part name.
        spec: the encoding.
        view: how the weight is a matrix.
        shape: the weight's own shape.
        dtype: what it decodes to.
    """

    node: fx.Node
    site: str
    parts: dict[str, str]
    spec: Encoding
    view: WeightView
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`[batch..., out, reduce]`."""
        return self.view.matrix_shape(self.shape)

    @property
    def grid(self) -> IntGrid | None:
        """The encoding, if it is an integer grid."""
        return self.spec if isinstance(self.spec, IntGrid) else None

    def tensors(self, program: Program) -> dict[str, Tensor]:
        """The stored parts."""
        return {part: program.weights[name] for part, name in self.parts.items()}


@dataclass(frozen=True)
class Activation:
    """An activation as a product meets it.

    Args:
        node: its value, a float tensor.
        kind: `float` when it is not quantized; `tensor`, `token` or `block` for a dynamic scale; `static`; `split` and
            `split_block` for two codes that add up to 16 bits; `other` for a quantization no operator carries.
        source: the value before quantization.
        spec: the grid of the codes; None when float or split.
        params: static scale and zero point.
        halves: the coarse and the fine part of a split.
    """

    node: fx.Node
    kind: Kind
    source: fx.Node
    spec: IntGrid | None = None
    params: tuple[fx.Node, ...] = ()
    halves: "tuple[Activation, Activation] | None" = None


def match_encoded(program: Program, node: Any) -> Encoded | None:
    """The encoded weight that a node decodes; None when it is something else."""
    if not is_decode(node) or not all(is_weight(part) for part in node.args[0]):
        return None
    names, spec_text, view, shape, dtype = node.args
    spec = find_spec(spec_text)
    parts = {part: str(each.target) for part, each in zip(spec.part_names, names, strict=True)}
    codes = next(iter(parts.values()))
    origins = program.weights.record(codes).origins
    site = origins[0] if origins else codes.removesuffix("_codes")
    own = tuple(shape) if shape is not None else tuple(program.weights[codes].shape)
    return Encoded(node, site, parts, spec, WeightView.parse(view), own, dtype)


def match_activation(node: Any) -> Activation:
    """How an activation is quantized."""
    if isinstance(node, fx.Node) and node.target is torch.ops.aten.add.Tensor:
        found = _match_split(node)
        if found is not None:
            return found
    found = _match_decoded(node)
    return found if found is not None else Activation(node, "float", node)


def _match_decoded(node: Any) -> Activation | None:
    """`decode(quantize(x))`, all of whose codes and parameters belong together."""
    if not is_decode(node):
        return None
    codes, *params = node.args[0]
    spec = find_spec(node.args[1])
    if not (isinstance(codes, fx.Node) and codes.target is operator.getitem and is_quantize(codes.args[0])):
        return None
    quantize = codes.args[0]
    assert isinstance(quantize, fx.Node)
    source, given, name = quantize.args
    if name != node.args[1] or codes.args[1] != 0 or not isinstance(spec, IntGrid) or node.args[2] != "matrix":
        return None
    if given:
        if list(given) != params:  # type: ignore[arg-type]
            return None
        kind: Kind = "static" if spec.group == "tensor" and spec.bits == 8 and spec.zero == "integer" else "other"
        return Activation(node, kind, source, spec, tuple(params))  # type: ignore[arg-type]
    own = [item for item in params if item.target is operator.getitem and item.args[0] is quantize]
    if len(own) != len(params) or [item.args[1] for item in own] != list(range(1, len(params) + 1)):
        return None
    return Activation(node, _dynamic_kind(spec), source, spec)  # type: ignore[arg-type]


def _dynamic_kind(spec: IntGrid) -> Kind:
    if spec.bits != 8 or spec.scale_dtype != "float32" or (not spec.symmetric and spec.zero != "integer"):
        return "other"
    if spec.group == "tensor":
        return "tensor"
    if not spec.symmetric:
        return "other"
    return "token" if spec.group == "channel" else "block"


def _match_split(node: fx.Node) -> Activation | None:
    """`decode(quantize(x)) + decode(quantize(x - decode(quantize(x))))`."""
    if len(node.args) != 2 or node.kwargs:
        return None
    coarse, fine = (_match_decoded(arg) for arg in node.args)
    if coarse is None or fine is None or coarse.kind not in ("tensor", "block"):
        return None
    rest = fine.source
    if rest.target is not torch.ops.aten.sub.Tensor or rest.args != (coarse.source, coarse.node) or rest.kwargs:
        return None
    if coarse.kind == "block":
        return (
            Activation(node, "split_block", coarse.source, halves=(coarse, fine)) if fine.spec == coarse.spec else None
        )
    if fine.kind not in ("static", "tensor") or fine.spec is None or not fine.spec.symmetric:
        return None
    return Activation(node, "split", coarse.source, halves=(coarse, fine))
