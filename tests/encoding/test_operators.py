import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparc.diag import PassError
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from sparc.encoding.operators import find_spec, spec_name
from sparc.encoding.view import WeightView


@pytest.mark.parametrize("group", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_are_quantized_per_token_or_at_once(group, symmetric):
    spec, x = IntGrid(8, group, symmetric), torch.randn(2, 5, 16)
    parts = torch.ops.sparc.quantize(x, [], spec_name(spec))
    assert [part.shape for part in parts[1:]] == [((2, 5, 1) if group == "channel" else (1, 1, 1))] * len(parts[1:])
    decoded = torch.ops.sparc.decode(parts, spec_name(spec), "matrix", None, torch.float32)
    assert float((decoded - x).abs().max()) <= float(parts[1].max()) / 2 * (1 + 1e-5)


def test_static_parameters_give_the_codes_only():
    spec, x = IntGrid(8, "tensor", symmetric=False), torch.randn(3, 16)
    dynamic = torch.ops.sparc.quantize(x, [], spec_name(spec))
    static = torch.ops.sparc.quantize(x, dynamic[1:], spec_name(spec))
    assert len(static) == 1
    assert torch.equal(static[0], dynamic[0])


@pytest.mark.parametrize("group", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_types_are_known_for_dynamic_sizes(group, symmetric):
    name = spec_name(IntGrid(8, group, symmetric))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(torch.randn(2, 5, 16))
        tokens = mode.shape_env.create_unbacked_symint()
        torch._check(tokens >= 1)
        x = x.new_empty(2, tokens, 16)
        parts = torch.ops.sparc.quantize(x, [], name)
        assert parts[0].dtype == (torch.int8 if symmetric else torch.uint8)
        assert parts[0].shape == x.shape
        decoded = torch.ops.sparc.decode(parts, name, "matrix", None, torch.float16)
        assert decoded.shape == x.shape
        assert decoded.dtype == torch.float16


@pytest.mark.parametrize("spec", [IntGrid(4), IntGrid(2, "tensor"), NM(2, 4)])
def test_codes_that_share_bytes_are_refused_for_activations(spec):
    with pytest.raises(PassError) as caught:
        torch.ops.sparc.quantize(torch.randn(2, 8), [], spec_name(spec))
    assert caught.value.code == "SPARC209"


def test_a_spec_that_was_never_named_is_refused():
    with pytest.raises(PassError) as caught:
        find_spec("IntGrid(bits=4, group=123457)")
    assert caught.value.code == "SPARC201"


def test_equal_specs_share_a_name():
    assert find_spec(spec_name(IntGrid(4, 32))) == IntGrid(4, 32)
    assert spec_name(IntGrid(bits=4, group=32)) == spec_name(IntGrid(4, 32))


@pytest.mark.parametrize(
    ("view", "shape", "matrix"),
    [
        ("matrix", (3, 5), (3, 5)),
        ("matrix", (4, 3, 5), (4, 3, 5)),
        ("transposed", (3, 5), (5, 3)),
        ("transposed", (4, 3, 5), (4, 5, 3)),
        ("conv", (6, 3, 2, 2), (6, 12)),
        ("conv", (6, 3, 7), (6, 21)),
        ("conv_transposed:1", (6, 4, 3), (1, 4, 18)),
        ("conv_transposed:2", (6, 4, 3, 3), (2, 4, 27)),
    ],
)
def test_views_are_bijections(view, shape, matrix):
    parsed = WeightView.parse(view)
    weight = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    seen = parsed.to_matrix(weight)
    assert str(parsed) == view
    assert tuple(seen.shape) == parsed.matrix_shape(shape) == matrix
    assert torch.equal(parsed.from_matrix(seen, shape), weight)
    assert parsed.from_matrix(seen, shape).is_contiguous()
