"""The form that looks sums up: in Triton's interpreter against float64, as machine code, and when it is chosen."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton import knobs

from sparc.codegen.triton import lookup
from sparc.codegen.triton.accept import fits
from sparc.codegen.triton.cubin import report, violations
from sparc.codegen.triton.generate import generate
from sparc.codegen.triton.launch import interpret_problem
from sparc.codegen.triton.lowerings import find_lowering
from sparc.codegen.triton.prior import candidates
from sparc.codegen.triton.problem import Configuration, Epilogue, EpilogueInput, Problem, Prologue
from sparc.codegen.triton.regimes import regimes
from sparc.codegen.triton.tiles import Product, WeightLowering
from sparc.codegen.triton.weights.binary_code import BinaryCodeWeight
from sparc.cost import device_of
from sparc.encoding.binary_code import BinaryCode
from sparc.encoding.grid import Grid
from sparc.encoding.groups import Group, group_count
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.nm import NM
from tests.codegen.triton.running import TOLERANCE, Case, relative, run_product

ROWS, COLUMNS = 45, 600  # neither is a multiple of a tile, of a unit or of a group
FORM = Configuration(1, 32, 256, form="lookup")
CODES = [BinaryCode(1), BinaryCode(2, 32), BinaryCode(3), BinaryCode(4, "channel", "float16"), BinaryCode(3, 48)]
RMS = Prologue("rms_norm", 1e-5, gain=True)
GATED = Epilogue((), ("value_0 = product * tl.sigmoid(product)",), "value_0 * product_1")


def random_case(encoding: BinaryCode, rows: int, columns: int, *, seed: int = 0) -> Case:
    """Random codes, alphas and offsets: fitting takes long, and is not what is tested."""
    generator = torch.Generator().manual_seed(seed)
    groups = int(group_count((1, columns), encoding.group))
    tensors = {
        "alphas": torch.rand(rows, groups, encoding.bits, generator=generator) + 0.1,
        "offset": torch.randn(rows, groups, generator=generator),
    }
    grid = Grid(encoding, {name: each.to(getattr(torch, encoding.scale_dtype)) for name, each in tensors.items()})
    parts = encoding.encode(encoding.round(torch.randn(rows, columns, generator=generator), grid), grid)
    dense = encoding.decode(parts, (rows, columns), torch.float32).double()
    return Case(encoding, BinaryCodeWeight(encoding, (rows, columns), parts), dense, parts)


# numerics -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("encoding", CODES, ids=str)
def test_products_are_right(encoding: BinaryCode, dtype: str) -> None:
    found, exact, kernel = run_product(random_case(encoding, ROWS, COLUMNS), FORM, 1, dtype)
    assert "tl.gather(table" in kernel.source
    assert relative(found, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("deterministic", [True, False])
def test_split_sums_are_right(deterministic: bool) -> None:
    split = Configuration(1, 32, 256, split=3, deterministic=deterministic, form="lookup")
    found, exact, kernel = run_product(random_case(BinaryCode(3), ROWS, COLUMNS), split, 1)
    assert "part * 1 + iteration" in kernel.source
    assert relative(found, exact) < TOLERANCE["float16"]


@pytest.mark.parametrize("encoding", [BinaryCode(2, 32), BinaryCode(3)], ids=str)
def test_a_normalised_gated_pair_is_right(encoding: BinaryCode) -> None:
    first, second = random_case(encoding, ROWS, COLUMNS), random_case(encoding, ROWS, COLUMNS, seed=1)
    x, gain = torch.randn(1, COLUMNS), torch.rand(COLUMNS) + 0.5
    problem = Problem((first.lowering, second.lowering), "float32", rms("float32"), float32(GATED))
    y = torch.empty(1, ROWS)
    interpret_problem(problem, FORM, [x, *buffers(first), *buffers(second), gain], y, 1)
    normalised = F.rms_norm(x.double(), (COLUMNS,), gain.double(), 1e-5)
    expected = F.silu(normalised @ first.dense.T) * (normalised @ second.dense.T)
    assert relative(y.double(), expected) < TOLERANCE["float32"]


def test_a_bias_and_a_residual_sum_are_right() -> None:
    case = random_case(BinaryCode(3), ROWS, COLUMNS)
    x, bias, residual = torch.randn(1, COLUMNS), torch.randn(ROWS), torch.randn(1, ROWS)
    inputs = (EpilogueInput("b", "float32", "feature"), EpilogueInput("r", "float32", "full"))
    epilogue = Epilogue(inputs, (), "product + b_value + 100.0 * r_value", "float32")
    y = torch.empty(1, ROWS)
    interpret_problem(
        Problem((case.lowering,), "float32", epilogue=epilogue), FORM, [x, *buffers(case), bias, residual], y, 1
    )
    assert relative(y.double(), x.double() @ case.dense.T + bias + 100 * residual) < TOLERANCE["float32"]


def buffers(case: Case) -> list[Tensor]:
    laid = case.lowering.layout(case.parts)
    return [laid[buffer.name] for buffer in case.lowering.buffers]


def rms(dtype: str) -> Prologue:
    return Prologue("rms_norm", 1e-5, gain=True, dtype=dtype)


def float32(epilogue: Epilogue) -> Epilogue:
    return Epilogue(epilogue.inputs, epilogue.lines, epilogue.result, "float32")


# layout ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group", [16, 32, 64, 128, "channel"])
def test_a_byte_is_the_signs_of_a_chunk_within_a_group(group: Group) -> None:
    case = random_case(BinaryCode(2, group), 3, 512)
    weight = case.lowering
    assert isinstance(weight, BinaryCodeWeight)
    assert weight.run is not None
    stub = SimpleNamespace(arange=torch.arange)
    columns = eval(lookup.columns("256", weight.run), {"tl": stub})  # of the second step
    codes = weight.unpacked(case.parts)
    words = weight.layout(case.parts)["codes"].reshape(3, 2, 2, 8)[:, :, 1]
    for chunk in range(lookup.TABLES):
        byte = chunk % 4
        planes = slice(8 * (byte % 2), 8 * (byte % 2) + 8)
        own = columns[planes, 2 * (chunk // 4) + byte // 2]
        keys = (words[..., chunk // 4] >> (8 * byte)) & 255
        for bit in range(2):
            assert torch.equal((keys[:, bit, None] >> torch.arange(8)) & 1, ((codes[:, own] >> bit) & 1).int())
        if isinstance(group, int):
            assert len(set((own // group).tolist())) == 1
    assert sorted(columns.flatten().tolist()) == list(range(256, 512))


# machine code ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


COSTS: list[tuple[BinaryCode, int, Product]] = [
    (BinaryCode(3), 256, "float16"),
    (BinaryCode(1), 256, "float16"),
    (BinaryCode(3, 32), 128, "float16"),
    (BinaryCode(4, "channel"), 256, "bfloat16"),
    (BinaryCode(2), 128, "float32"),
]


@pytest.mark.parametrize(
    ("encoding", "rows", "product", "capability"),
    [
        *((*each, 90) for each in COSTS),
        (*COSTS[0], 80),
        *(pytest.param(*each, 80, marks=pytest.mark.slow) for each in COSTS[1:]),
    ],
    ids=str,
)
def test_it_takes_what_its_cost_says(encoding: BinaryCode, rows: int, product: Product, capability: int) -> None:
    weight = sized(encoding, 256, 4096)
    problem = Problem((weight,), product, epilogue=Epilogue(dtype=product))
    chosen = Configuration(1, rows, 256, num_warps=rows // 32, num_stages=2, form="lookup")
    kernel = generate(problem, chosen)
    found, cost = report(kernel, capability), weight.lookup_cost(product, rows)
    assert cost is not None
    assert violations(kernel, found) == []
    assert found.tensor_core.keys() == {"HMMA" if capability == 80 else "HGMMA"}
    assert found.load_bytes[1] == 16
    assert found.shared_bytes <= lookup.shared_bytes(4 if product == "float32" else 2)
    assert found.slots is not None
    assert 0.6 * cost.issue < found.slots.issue < cost.issue
    assert 0.6 * cost.arithmetic < found.slots.arithmetic < cost.arithmetic


@pytest.mark.parametrize("capability", [80, 90])
def test_a_normalised_gated_pair_keeps_its_promises(capability: int) -> None:
    weight = sized(BinaryCode(3, scale_dtype="float16"), 4096, 4096)
    problem = Problem((weight, weight), "float16", RMS, GATED)
    kernels = (generate(problem, each.configuration) for each in candidates(problem, device_of(capability), 1))
    kernel = next(each for each in kernels if fits(each, capability))
    assert "tl.gather(table" in kernel.source
    assert violations(kernel, report(kernel, capability)) == []


# choice ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_it_serves_one_token_of_a_great_matrix(bits: int) -> None:
    found = regimes(Problem((sized(BinaryCode(bits), 4096, 4096),), "float16"), device_of(90))
    assert found[0].limit == 1
    first, *others = (each.configuration.form for each in found if each.configuration)
    assert first == "lookup"
    assert set(others) == {"product"}


def test_tables_do_not_pay_for_few_rows() -> None:
    found = regimes(Problem((sized(BinaryCode(3), 64, 4096),), "float16"), device_of(90))
    assert found[0].configuration is not None
    assert found[0].configuration.form == "product"


@pytest.mark.parametrize(("group", "offered"), [(128, True), (48, True), (40, False)])
def test_a_chunk_must_have_one_group(group: int, offered: bool) -> None:
    assert ("lookup" in forms(sized(BinaryCode(3, group), 4096, 960))) is offered


def test_other_weights_do_not_offer_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    for encoding in (IntGrid(4), NM(2, 4, of=BinaryCode(1, 64))):
        grid = encoding.fit(weight)
        found = find_lowering(encoding, (64, 256), encoding.encode(encoding.round(weight, grid), grid))
        assert isinstance(found, WeightLowering)
        assert forms(found) == {"product"}


def forms(weight: WeightLowering) -> set[str]:
    return {each.configuration.form for each in candidates(Problem((weight,), "float16"), device_of(90), 1)}


def sized(encoding: BinaryCode, rows: int, columns: int) -> WeightLowering:
    """A lowering whose tensors are of one row: the model asks only for sizes."""
    parts = random_case(encoding, 1, columns).parts
    weight = find_lowering(encoding, (rows, columns), parts)
    assert isinstance(weight, WeightLowering)
    return weight
