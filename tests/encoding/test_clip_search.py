import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc.encoding import clip_search
from sparc.encoding.int_grid import IntGrid

SPECS = [
    IntGrid(bits, group, *kind, dtype)
    for bits in (2, 3, 4, 8)
    for group, dtype in ((8, "float16"), (7, "float32"), ("channel", "bfloat16"), ("tensor", "float32"))
    for kind in ((True, "integer"), (False, "integer"), (False, "minimum"))
]


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def errors(spec, weight, grid, importance=None):
    """The weighted squared error of every group, in float64."""
    error = (spec.round(weight, grid).double() - weight.double()).square()
    error = error if importance is None else error * importance
    if spec.group == "tensor":
        return error.sum()
    if spec.group == "channel":
        return error.sum(-1)
    return torch.stack([part.sum(-1) for part in error.split(spec.group, dim=-1)], dim=-1)


@given(
    st.sampled_from(SPECS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_no_group_is_ever_worse_than_min_max(spec, dtype, power, weighted, seed):
    weight = (weights(6, 24, seed=seed) ** power + 0.5).to(dtype)
    importance = weights(24, seed=seed + 1).square() if weighted else None
    least = errors(spec, weight, spec.fit(weight, importance=importance), importance)
    found = errors(spec, weight, spec.fit(weight, importance=importance, search=True), importance)
    # two sums of the same squares in float32 may differ by a few ulps, and so may the choice made by them
    assert bool((found <= least * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("kind", [(True, "integer"), (False, "integer"), (False, "minimum")])
def test_outliers_are_clipped(kind):
    # covering ±10 costs a step of 4/3 and 4096 * step² / 12 = 607; clipping at ±4 costs 97 and 2 * 6² = 72
    weight = weights(8, 4096)
    weight[:, 0], weight[:, 1] = -10, 10
    spec = IntGrid(4, "channel", *kind)
    found, least = spec.fit(weight, search=True), spec.fit(weight)
    assert float(errors(spec, weight, found).sum()) < 0.5 * float(errors(spec, weight, least).sum())


def test_as_good_as_trying_every_scale():
    weight = weights(32, 32)
    spec = IntGrid(4, 32)
    start = spec.fit(weight).tensors["scale"]
    best = torch.full((32, 1), torch.inf, dtype=torch.float64)
    for part in torch.linspace(0.3, 1.2, 1801):
        scale = start * part
        rounded = (weight / scale).round().clamp(-8, 7) * scale
        best = torch.minimum(best, (rounded.double() - weight).square().sum(-1, keepdim=True))
    found = errors(spec, weight, spec.fit(weight, search=True))
    assert float(found.sum()) <= 1.01 * float(best.sum())


@pytest.mark.parametrize("kind", [(True, "integer"), (False, "integer"), (False, "minimum")])
def test_no_other_scale_or_minimum_fits_the_codes_better(kind):
    weight, spec = weights(64, 32), IntGrid(4, 32, *kind)
    grid = spec.fit(weight, search=True)
    codes = spec.codes(weight, grid.tensors).double() - grid.tensors.get("zero", torch.zeros(1)).double()
    columns = [codes, torch.ones_like(codes)] if "minimum" in grid.tensors else [codes]
    system = torch.stack(columns, dim=-1)
    best = system @ torch.linalg.lstsq(system, weight.double().unsqueeze(-1)).solution
    least = (best.squeeze(-1) - weight).square().sum()
    assert float(errors(spec, weight, grid).sum()) <= 1.005 * float(least)


def hidden_grid(kind):
    """Weights on a 4-bit grid whose outermost codes are not used, so that min-max misses it."""
    codes = torch.randint(3, 12, (8, 4, 16), generator=torch.Generator().manual_seed(0))
    codes[..., 0], codes[..., 1] = 3, 11
    scale, offset = torch.rand(8, 4, 1) + 0.5, {"integer": -6.0, "minimum": 1.7}[kind[1]]
    if kind[0]:
        codes, offset = codes - 11, 0.0  # -8 to 0
    return ((codes + offset) * scale).flatten(-2)


@pytest.mark.parametrize("kind", [(True, "integer"), (False, "integer"), (False, "minimum")])
def test_a_grid_whose_outer_codes_are_unused_is_found_again(kind):
    weight, spec = hidden_grid(kind), IntGrid(4, 16, *kind)
    assert not torch.allclose(spec.round(weight, spec.fit(weight)), weight, rtol=1e-3, atol=1e-3)
    rounded = spec.round(weight, spec.fit(weight, search=True))
    torch.testing.assert_close(rounded, weight, rtol=1e-5, atol=1e-5)


def test_importance_decides_where_the_error_goes():
    weight = weights(8, 64) ** 3
    spec, importance = IntGrid(4), torch.ones(64)
    importance[:32] = 1e4
    plain = spec.round(weight, spec.fit(weight, search=True)) - weight
    weighed = spec.round(weight, spec.fit(weight, importance=importance, search=True)) - weight
    assert float(weighed[:, :32].square().sum()) < float(plain[:, :32].square().sum())
    assert float(weighed[:, 32:].square().sum()) > float(plain[:, 32:].square().sum())


@pytest.mark.parametrize("group", [5, "channel", "tensor"])
def test_every_chunk_is_searched(group, monkeypatch):
    monkeypatch.setattr(clip_search, "_CHUNK", 40)  # a row and a half
    weight = weights(3, 7, 26) ** 3
    spec = IntGrid(4, group, symmetric=False)
    least, found = errors(spec, weight, spec.fit(weight)), errors(spec, weight, spec.fit(weight, search=True))
    assert bool((found <= least * (1 + 1e-5)).all())
    by_row = (found < least).reshape(-1) if group == "tensor" else (found < least).reshape(21, -1).any(-1)
    assert float(by_row.float().mean()) > 0.8


@settings(max_examples=20)
@given(st.sampled_from(SPECS), st.integers(-120, 120))
def test_the_scale_of_the_weights_does_not_matter(spec, exponent):
    if spec.scale_dtype != "float32":
        spec = IntGrid(spec.bits, spec.group, spec.symmetric, spec.zero)
    weight = weights(4, 24)
    one, other = spec.fit(weight, search=True), spec.fit(weight * 2.0**exponent, search=True)
    torch.testing.assert_close(other.tensors["scale"], one.tensors["scale"] * 2.0**exponent, rtol=1e-4, atol=0)


def test_constant_and_zero_groups():
    weight = torch.cat([torch.zeros(2, 8), torch.full((2, 8), -0.3)], dim=-1)
    for kind in ((True, "integer"), (False, "integer"), (False, "minimum")):
        spec = IntGrid(4, 8, *kind)
        grid = spec.fit(weight, search=True)
        torch.testing.assert_close(spec.round(weight, grid), weight, rtol=1e-6, atol=0)
