"""`sparc::decode` and `sparc::quantize`: the two operators that carry encodings through torch graphs.

`decode(parts, spec, view, shape, dtype)` means the dense tensor. `quantize(x, params, spec)` turns an activation into
parts. Both run in eager torch, know their output types under FakeTensor, and name their encoding by its spec text,
which is looked up in an append-only table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.library import Library, impl, register_fake

from sparc import codes
from sparc.diag import PassError
from sparc.encoding.base import ElementEncoding, Encoding
from sparc.encoding.grid import Grid
from sparc.encoding.view import WeightView

_SPECS: dict[str, Encoding] = {}

_library = Library("sparc", "DEF")
_library.define("decode(Tensor[] parts, str spec, str view, SymInt[]? shape, ScalarType dtype) -> Tensor")
_library.define("quantize(Tensor x, Tensor[] params, str spec) -> Tensor[]")


def spec_name(encoding: Encoding) -> str:
    """The spec's text, which `decode` and `quantize` will find the encoding by."""
    return str(_SPECS.setdefault(str(encoding), encoding))


def find_spec(name: str) -> Encoding:
    """The encoding of a spec's text.

    Raises:
        PassError: SPARC201 when the spec was never named in this process.
    """
    try:
        return _SPECS[name]
    except KeyError:
        raise PassError(codes.UNKNOWN_NAME, f"unknown encoding {name!r}") from None


@impl(_library, "decode", "CompositeExplicitAutograd")
def _decode(parts: Sequence[Tensor], spec: str, view: str, shape: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
    encoding = find_spec(spec)
    own = tuple(shape) if shape is not None else tuple(parts[0].shape)
    weight_view = WeightView.parse(view)
    matrix = encoding.decode(dict(zip(encoding.part_names, parts, strict=True)), weight_view.matrix_shape(own), dtype)
    return weight_view.from_matrix(matrix, own)


@register_fake("sparc::decode", lib=_library)  # type: ignore[untyped-decorator]
def _decode_type(
    parts: Sequence[Tensor], spec: str, view: str, shape: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    return parts[0].new_empty(shape if shape is not None else parts[0].shape, dtype=dtype)


def _activation_spec(spec: str) -> ElementEncoding:
    encoding = find_spec(spec)
    if not isinstance(encoding, ElementEncoding) or encoding.code_bytes(8) < 8:
        raise PassError(codes.BAD_OPTION, f"activations cannot be quantized to {spec}", hint="use 8-bit codes")
    return encoding


@impl(_library, "quantize", "CompositeExplicitAutograd")
def _quantize(x: Tensor, params: Sequence[Tensor], spec: str) -> list[Tensor]:
    encoding = _activation_spec(spec)
    if params:
        return [encoding.codes(x, dict(zip(encoding.grid_names, params, strict=True)))]
    return list(encoding.encode(x, encoding.fit(x)).values())


@register_fake("sparc::quantize", lib=_library)  # type: ignore[untyped-decorator]
def _quantize_type(x: Tensor, params: Sequence[Tensor], spec: str) -> list[Tensor]:
    return _quantize(x, params, spec)


def is_decode(node: object) -> bool:
    """Whether a value is a node that decodes an encoded tensor."""
    return isinstance(node, fx.Node) and node.target is torch.ops.sparc.decode.default


def is_quantize(node: object) -> bool:
    """Whether a value is a node that quantizes an activation."""
    return isinstance(node, fx.Node) and node.target is torch.ops.sparc.quantize.default


def round_weight(weight: Tensor, grid: Grid) -> Tensor:
    """A weight, in its own layout, rounded to a grid in the grid's view."""
    view = WeightView.parse(grid.view)
    return view.from_matrix(grid.spec.round(view.to_matrix(weight), grid), weight.shape)


def encode_weight(weight: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The stored parts of a weight, in its own layout, that lies on a grid."""
    return grid.spec.encode(WeightView.parse(grid.view).to_matrix(weight), grid)
