"""Activations on 8-bit grids with one scale: codes go from one kernel to the next."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparc
from sparc.artifact import Artifact
from sparc.codegen.triton import operator as operator_module
from sparc.codegen.triton.emission import TritonEmission
from sparc.codegen.triton.launch import make_scratch
from sparc.codegen.triton.operator import SiteTensors
from sparc.codegen.triton.operators import launch
from sparc.codegen.triton.sites import buffers
from sparc.codegen.triton.target import TritonTarget
from sparc.diag import SparcError
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import is_decode, is_quantize, spec_name
from sparc.passes.activation.static import CalibrateActivations
from sparc.passes.encode import Encode
from sparc.passes.recipes import prepare
from sparc.passes.round import Round
from sparc.program import Program
from sparc.target import EmitContext
from sparc.verify import relative_error
from tests.codegen.triton.test_static_kernels import UNSIGNED, random_codes
from tests.codegen.triton.test_target import QUICK, agrees, emission, sites


class Residual(nn.Module):
    """A window with a stride, a pointwise convolution, a window beside a residual sum, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.pointwise = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 1)
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.window(x))
        x = F.relu(x + self.second(F.relu6(self.pointwise(x))))
        return self.head(x.mean((2, 3)))


class Pooled(nn.Module):
    """Convolutions with poolings between them, and a head that reads the image as a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return self.head(F.max_pool2d(F.relu(self.second(x)), 2).flatten(1))


class Block(nn.Module):
    """A block of a transformer: products of one activation, heads, residual sums, a gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.q, self.k, self.v, self.o = (nn.Linear(48, 48) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(48, 80), nn.Linear(48, 80), nn.Linear(80, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (each(y).unflatten(-1, (4, 12)).transpose(1, 2) for each in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Hidden(nn.Module):
    """Two layers, with an activation that clips between them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(200, 45), nn.Linear(45, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.relu6(self.inner(x)))


class Read(nn.Module):
    """A hidden layer that is a result, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(48, 80), nn.Linear(80, 48)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.inner(x))
        return hidden, self.outer(hidden)


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    Residual: (2, 3, 7, 8), Pooled: (1, 3, 8, 8), Block: (2, 5, 48), Hidden: (7, 200), Read: (7, 48),
}  # fmt: skip


def data(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(SHAPES[kind], generator=generator).to(dtype),) for _ in range(2)]


def compiled(kind: type[nn.Module], recipe: Any = "w8a8-static", dtype: torch.dtype = torch.float32) -> Artifact:
    torch.manual_seed(0)
    given, axis = data(kind, dtype), 1 if kind is Block else 0
    return sparc.compile(
        kind().to(dtype).eval(), given[0], recipe=recipe, data=given, target="cuda:sm_90", options=QUICK,
        dynamic={"x": {axis: "size"}},
    )  # fmt: skip


def calls(artifact: Artifact) -> list[str]:
    graph = emission(artifact).lowered["forward"].graph
    return [
        str(node.target) for node in graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)
    ]


@pytest.fixture(scope="module")
def residual() -> Artifact:
    return compiled(Residual)


def test_a_network_of_convolutions_is_codes_from_kernel_to_kernel(residual: Artifact) -> None:
    found = sites(residual)
    assert [each.problem.epilogue.dtype for each in found.values()] == ["uint8", "uint8", "uint8", "float32"]
    assert [each.problem.access.kind for each in found.values()] == ["window", "channels", "window", "rows"]
    assert all(each.problem.prologue.codes == "uint8" for each in found.values())
    assert found["pointwise"].x is found["window"].result
    assert found["window"].result in found["second"].operands  # the residual sum reads codes
    rest = [name for name in calls(residual) if "sparc_triton" not in name]
    assert rest == ["sparc.quantize.default", "sparc.decode.default", "aten.mean.dim", "sparc.quantize.default"]
    for batch in (1, 3):
        agrees(residual, torch.randn(batch, 3, 7, 8), tolerance=1e-6)


@pytest.fixture(scope="module")
def hidden() -> Artifact:
    return compiled(Hidden)


def written(artifact: Artifact, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the first kernel of `Hidden` writes for random codes; in float64, the values that become codes, the error
    that float32 may add to them, and the scale and the zero point that they are quantized with.
    """
    operator = next(iter(emission(artifact).lowered["forward"].operators.values()))
    site, weights = operator.site, artifact.program.weights
    codes = random_codes((tokens, 200), UNSIGNED)
    operands = [weights[str(node.target)] for node in site.operands]  # type: ignore[union-attr]
    scratch = make_scratch(operator.scratch_sizes(tokens))
    found = operator.run(codes, SiteTensors(buffers(site), operands), scratch, launch)
    x_scale, x_zero, bias, scale, zero = (each.double() for each in operands)
    factor = weights["inner.weight_scale"].double().T * x_scale
    summed = (codes.double() - x_zero) @ weights["inner.weight_codes"].double().T * factor
    error = (summed.abs() + bias.abs()) * 5 * 2.0**-24  # of five operations, each rounded once
    return found, (summed + bias).clamp(0, 6), error, scale, zero


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_codes_that_are_written_are_the_nearest(hidden: Artifact, tokens: int) -> None:
    """But for sums so close to the middle between two codes that float32 does not tell the side."""
    found, values, error, scale, zero = written(hidden, tokens)
    steps = values / scale
    certain = (steps.frac() - 0.5).abs() > error / scale
    assert found.dtype == torch.uint8
    assert torch.equal(found[certain].double(), (steps.round() + zero).clamp(0, 255)[certain])
    assert (~certain).double().mean() < 1e-3


def emitted(program: Program) -> TritonEmission:
    made = TritonTarget(90).emit(program, EmitContext(options=QUICK))
    assert isinstance(made, TritonEmission)
    return made


def signed(program: Program) -> None:
    """Every activation on a grid around zero, of the same step."""
    spec = spec_name(IntGrid(8, "tensor"))
    for node in program.main.graph.nodes:
        if is_quantize(node):
            node.args = (node.args[0], node.args[1][:1], spec)
        elif is_decode(node) and "tensor" in str(node.args[1]):
            node.args = (node.args[0][:2], spec, *node.args[2:])
        if node.op == "call_function":
            program.main.infer(node)


def test_signed_codes_need_no_zero_point(residual: Artifact) -> None:
    program = residual.program.clone()
    signed(program)
    made = emitted(program)
    found = [each.site.problem for each in made.lowered["forward"].operators.values()]
    assert [each.prologue.codes for each in found] == ["int8"] * 4
    assert [each.epilogue.dtype for each in found] == ["int8", "int8", "int8", "float32"]
    made.check(program, {}, {})
    image = torch.randn(SHAPES[Residual])
    assert relative_error(program.run_flat([image])[0], made.runner()([image])[0]) < 1e-6


def test_poolings_and_reshapes_stand_between_codes() -> None:
    artifact = compiled(Pooled)
    assert all(each.problem.prologue.codes == "uint8" for each in sites(artifact).values())
    names = calls(artifact)
    assert names.index("aten.flatten.using_ints") > names.index("aten.max_pool2d.default")
    assert names[-2] == "aten.flatten.using_ints"
    agrees(artifact, torch.randn(2, 3, 8, 8), tolerance=1e-6)


def test_pairs_and_stacks_share_codes() -> None:
    artifact = compiled(Block)
    found = sites(artifact)
    assert list(found) == ["q+k+v", "o", "gate+up", "down"]
    assert all(each.problem.prologue.codes == "uint8" for each in found.values())
    assert found["down"].x is found["gate+up"].result
    for length in (1, 19):
        agrees(artifact, torch.randn(2, length, 48), tolerance=1e-6)


def test_a_value_that_is_read_otherwise_is_no_code() -> None:
    program = compiled(Read).program.clone()
    relu = program.main.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0]
    output = program.main.output
    output.args = ([relu, *output.args[0][1:]],)  # type: ignore[index, misc]
    made = emitted(program)
    found = [each.site.problem for each in made.lowered["forward"].operators.values()]
    assert [each.epilogue.dtype for each in found] == ["float32", "float32"]
    assert [each.prologue.codes for each in found] == ["uint8", "uint8"]
    x = torch.randn(5, 48)
    for expected, got in zip(program.run_flat([x]), made.runner()([x]), strict=True):
        assert relative_error(expected, got) < 1e-6


def test_half_precision_is_rounded_before_it_is_quantized() -> None:
    artifact = compiled(Hidden, dtype=torch.float16)
    found, values, error, scale, zero = written(artifact, 70)
    least, middle, most = (
        ((each.half().float() / scale.float()).round() + zero).clamp(0, 255)
        for each in (values - error, values, values + error)
    )
    certain = least == most
    assert torch.equal(found[certain].double(), middle[certain].double())
    assert (~certain).double().mean() < 1e-2
    agrees(artifact, torch.randn(9, 200).half(), tolerance=2e-2)  # a flipped rounding is worth half a step


def test_weights_that_do_not_fit_are_multiplied_in_floats() -> None:
    steps = (*prepare(), Round(IntGrid(8, symmetric=False)), CalibrateActivations(), Encode())
    artifact = compiled(Hidden, steps)
    assert all(each.problem.product == "float32" for each in sites(artifact).values())
    said = [each for each in artifact.diagnostics if each.code.id == "SPARC415"]
    assert [each.why for each in said] == ["8-bit codes less their zero point do not fit into 8 bits"] * 2
    agrees(artifact, torch.randn(5, 200), tolerance=1e-5)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("x_zero_code.to(tl.int32) - 128", "x_zero_code.to(tl.int32) - 127"), (", 255.0)", ", 99.0)")],
)
def test_a_wrong_code_is_caught(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    plain = operator_module.generate

    def broken(problem: Any, configuration: Any) -> Any:
        kernel = plain(problem, configuration)
        return replace(kernel, source=kernel.source.replace(right, wrong))

    monkeypatch.setattr(operator_module, "generate", broken)
    with pytest.raises(SparcError) as error:
        compiled(Hidden)
    assert error.value.code == "SPARC402"
