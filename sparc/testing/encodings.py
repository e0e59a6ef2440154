"""The contract of an encoding, as one assertion."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

import sympy
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparc.encoding.base import ElementEncoding, Encoding
from sparc.encoding.grid import Grid
from sparc.encoding.mask import MaskEncoding
from sparc.encoding.operators import encode_weight, round_weight, spec_name
from sparc.encoding.parse import BUILTIN, parse_spec
from sparc.encoding.view import WeightView

SHAPES: tuple[tuple[int, ...], ...] = ((48, 64), (70, 128), (5, 12), (1, 7), (3, 1), (2, 6, 20), (17, 33))
USUAL = ("sparse", "shifted")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_encoding(
    encoding: Encoding,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    *,
    seed: int = 0,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Check everything that sparc relies on in an encoding, on seeded weights.

    For fits with and without search and importance: `decode(encode(round(w)))` is `round(w)` bitwise, and so is
    `round(round(w))`; rounding is to the nearest, and with search keeps some of the weight; dropped elements are
    exactly 0; equal inputs give equal outputs and are not written to; parts are plain tensors with the names and the
    bytes that the encoding states, also in symbols, and survive being saved; `sparc::decode` gives the same tensor in
    every view, and its type for FakeTensors; the spec's text can be read back.

    Args:
        encoding: the encoding.
        shapes: of matrices `[batch..., out, reduce]`; those that `accepts` refuses are left out. The first one left
            sees every kind of weight in every dtype, the others two kinds in the first dtype.
        seed: of the weights.
        dtypes: of the weights.

    Raises:
        AssertionError: it says what does not hold, and for which weight.
    """
    _check_text(encoding)
    accepted = [shape for shape in shapes if _accepts(encoding, shape)]
    assert accepted, f"{encoding} accepts none of the shapes {list(shapes)}"
    assert encoding.accepts((4,)) is not None, f"{encoding} accepts a vector, which is no matrix"
    for shape in accepted:
        first = shape == accepted[0]
        for dtype in dtypes if first else dtypes[:1]:
            for kind, weight in _weights(shape, dtype, seed).items():
                if first or kind in USUAL:
                    _check_weight(encoding, weight, kind)
        _check_other_weight(encoding, shape, seed)
        _check_views(encoding, shape, seed)


def _check_weight(encoding: Encoding, weight: Tensor, kind: str) -> None:
    importance = torch.linspace(0.5, 2, weight.shape[-1])
    for search in (False, True):
        for columns in (None, importance):
            about = f"{encoding}, {kind} weight {list(weight.shape)} {weight.dtype}, search={search}"
            about += "" if columns is None else ", with importance"
            before = weight.clone()
            grid = encoding.fit(weight, importance=columns, search=search)
            again = encoding.fit(weight, importance=columns, search=search)
            assert grid.spec == encoding, f"{about}: fit made a grid of {grid.spec}"
            assert _same_tensors(grid.tensors, again.tensors), f"{about}: fitting twice gives two grids"
            _check_laws(encoding, weight, grid, about)
            if search and kind in USUAL:
                _check_kept(encoding, weight, grid, about)
            assert same_bits(weight, before), f"{about}: the weight was written to"


def _check_other_weight(encoding: Encoding, shape: tuple[int, ...], seed: int) -> None:
    """The laws hold for any weight on a grid, not only for the one that the grid was fitted to."""
    weights = _weights(shape, torch.float32, seed)
    about = f"{encoding}, large weight {list(shape)} on the grid of a sparse one"
    _check_laws(encoding, weights["large"], encoding.fit(weights["sparse"]), about)


def _check_laws(encoding: Encoding, weight: Tensor, grid: Grid, about: str) -> None:
    rounded = encoding.round(weight, grid)
    assert rounded.shape == weight.shape, f"{about}: round gave the shape {list(rounded.shape)}"
    assert rounded.dtype == weight.dtype, f"{about}: round gave {rounded.dtype}"
    assert bool(torch.isfinite(rounded).all()), f"{about}: round gave NaN or Inf"
    assert same_bits(encoding.round(rounded, grid), rounded), f"{about}: round(round(w)) is not round(w)"
    _check_nearest(encoding, weight, rounded, grid, about)
    parts = encoding.encode(rounded, grid)
    _check_parts(encoding, weight, grid, parts, about)
    decoded = encoding.decode(parts, tuple(weight.shape), weight.dtype)
    assert decoded.dtype == weight.dtype, f"{about}: decode gave {decoded.dtype}"
    assert same_bits(decoded, rounded), f"{about}: decode(encode(round(w))) is not round(w)"
    assert not any(decoded.data_ptr() == part.data_ptr() for part in parts.values()), f"{about}: decode returned a part"
    dropped = _dropped(encoding, grid, weight)
    if dropped is not None:
        assert not bool(rounded[dropped].any()), f"{about}: a dropped element is not 0"


def _check_nearest(encoding: Encoding, weight: Tensor, rounded: Tensor, grid: Grid, about: str) -> None:
    """No other value is nearer than the rounded one: none of those that weights close by are rounded to.

    Element by element where each has its own code, else summed over the matrix.
    """
    dropped = _dropped(encoding, grid, weight)
    original = weight.double() if dropped is None else weight.double().masked_fill(dropped, 0)
    own = (rounded.double() - original).abs()
    step = own.amax()
    slack = 2 * torch.finfo(weight.dtype).eps * torch.maximum(original.abs(), rounded.double().abs()).amax()
    for part in (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0):
        other = (encoding.round((original + part * step).to(weight.dtype), grid).double() - original).abs()
        if isinstance(encoding, ElementEncoding | MaskEncoding):
            nearest = bool((own <= other + slack).all())
        else:
            nearest = bool(own.square().sum() <= (other + slack).square().sum())
        assert nearest, f"{about}: round(w) is not the nearest to w"


def _check_kept(encoding: Encoding, weight: Tensor, grid: Grid, about: str) -> None:
    rounded = encoding.round(weight, grid).double()
    dropped = _dropped(encoding, grid, weight)
    original = weight.double() if dropped is None else weight.double().masked_fill(dropped, 0)
    error, energy = (rounded - original).square().sum(), original.square().sum()
    assert error < energy or energy == 0, f"{about}: rounding leaves an error as large as the weight"


def _check_parts(encoding: Encoding, weight: Tensor, grid: Grid, parts: dict[str, Tensor], about: str) -> None:
    names = tuple(parts)
    assert names == encoding.part_names, (
        f"{about}: encode gave the parts {names}, part_names says {encoding.part_names}"
    )
    for name, part in parts.items():
        plain = type(part) is Tensor and part.is_contiguous() and part.device.type == "cpu" and not part.requires_grad
        assert plain, f"{about}: the part {name!r} is no plain contiguous tensor"
    again = encoding.encode(encoding.round(weight, grid), grid)
    assert _same_tensors(parts, again), f"{about}: encoding twice gives two results"
    assert _same_tensors(load(save(parts)), parts), f"{about}: the parts change when they are saved"
    stored = sum(part.nbytes for part in parts.values())
    shape = tuple(weight.shape)
    assert encoding.bytes_on(grid, shape) == stored, (
        f"{about}: bytes says {encoding.bytes_on(grid, shape)}, {stored} are stored"
    )
    assert stored <= encoding.bytes(shape), f"{about}: bytes says at most {encoding.bytes(shape)}, {stored} are stored"
    symbols = sympy.symbols(f"d0:{len(shape)}", integer=True, positive=True)
    values = dict(zip(symbols, shape, strict=True))
    for formula, expected in (
        (encoding.bytes_on(grid, symbols), sympy.Integer(stored)),
        (encoding.bytes(symbols), encoding.bytes(shape)),
    ):
        assert formula.subs(values) == expected, f"{about}: in symbols, bytes is {formula}, which is not {expected}"


def _check_views(encoding: Encoding, shape: tuple[int, ...], seed: int) -> None:
    """`sparc::decode` restores a weight in the layout of each view, and knows its type without running."""
    matrix = _weights(shape, torch.float32, seed)["sparse"]
    for view in ("matrix", "transposed", "conv"):
        if view == "conv" and len(shape) != 2:
            continue
        own = {"matrix": shape, "transposed": (*shape[:-2], shape[-1], shape[-2]), "conv": (*shape, 1, 1)}[view]
        weight = WeightView.parse(view).from_matrix(matrix, own)
        fitted = encoding.fit(WeightView.parse(view).to_matrix(weight))
        grid = Grid(fitted.spec, fitted.tensors, view)
        rounded = round_weight(weight, grid)
        parts = list(encode_weight(rounded, grid).values())
        decoded = torch.ops.sparc.decode(parts, spec_name(encoding), view, own, torch.float32)
        assert same_bits(decoded, rounded), f"{encoding}: sparc::decode differs in the view {view!r} of {list(own)}"
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(part) for part in parts]
            fake = torch.ops.sparc.decode(fakes, spec_name(encoding), view, own, torch.bfloat16)
        assert tuple(fake.shape) == own, f"{encoding}: the type of sparc::decode has the shape {list(fake.shape)}"
        assert fake.dtype == torch.bfloat16, f"{encoding}: the type of sparc::decode has the dtype {fake.dtype}"


def _check_text(encoding: Encoding) -> None:
    text = str(encoding)
    read = parse_spec(text, {**BUILTIN, **{type(each).__name__: type(each) for each in _nested(encoding)}})
    assert (read, str(read)) == (encoding, text), f"the text {text!r} reads as {read}"
    assert hash(read) == hash(encoding), f"two equal {text} have two hashes"


def _nested(encoding: Encoding) -> Iterator[Encoding]:
    yield encoding
    for field in fields(encoding):
        value = getattr(encoding, field.name)
        if isinstance(value, Encoding):
            yield from _nested(value)


def _accepts(encoding: Encoding, shape: tuple[int, ...]) -> bool:
    reason = encoding.accepts(shape)
    assert reason is None or (isinstance(reason, str) and reason), f"{encoding} refuses {list(shape)} without a reason"
    return reason is None


def _weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Weights as they occur, and as they should not."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sparse = normal * 0.02
    sparse[..., : shape[-1] // 2] = 0
    limits = torch.finfo(dtype)
    kinds = {
        "large": normal * 20,
        "sparse": sparse,
        "shifted": normal * 0.01 + 3,
        "heavy": normal**5,
        "constant": torch.full(shape, -0.3),
        "zero": torch.zeros(shape),
        "tiny": normal * limits.tiny * 16,
        "huge": normal.clamp(-3, 3) * (limits.max / 4),
    }
    return {kind: weight.to(dtype) for kind, weight in kinds.items()}


def _dropped(encoding: Encoding, grid: Grid, weight: Tensor) -> Tensor | None:
    return ~encoding.spread(grid.tensors["mask"], weight.shape) if isinstance(encoding, MaskEncoding) else None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (so that -0 differs from 0, and NaN equals itself)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def _same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)
