"""Kernels judged on their machine code: what is counted, and that every broken promise is told."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console
from triton import knobs

from sparc.codegen.triton.cubin import KernelReport, Slots, compile_kernel, report, table, violations
from sparc.codegen.triton.kernel import Argument, Kernel, Resources
from sparc.diag import LoweringError

HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
THREADS = 128

GEMV = """def gemv(x, w, y, K):
    n = tl.program_id(0) * 4 + tl.arange(0, 4)
    k = tl.arange(0, 1024)
    total = tl.zeros((4, 1024), tl.float32)
    for start in range(0, SIZE, 1024):
        weight = tl.load(w + n[:, None] * SIZE + (start + k)[None, :]).to(tl.float32)
        total += weight * tl.load(x + start + k).to(tl.float32)[None, :]
    tl.store(y + n, tl.sum(total, 1).to(tl.float16))
"""
PRODUCT = """def product(x, w, scales, y, M):
    n = tl.program_id(0) * 64 + tl.arange(0, 64)
    m = tl.arange(0, 16)
    total = tl.zeros((64, 16), tl.float32)
    for start in range(0, 4096, 512):
        words = tl.load(w + n[:, None] * 512 + (start // 8 + tl.arange(0, 64))[None, :])
        for j in tl.static_range(4):
            k = start + j * 128 + tl.arange(0, 128)
            tokens = tl.load(x + k[:, None] + m[None, :] * 4096, mask=(m < M)[None, :], other=0.0)
UNPACK
            scale = tl.load(scales + (start // 128 + j) * 4096 + n)
            total = tl.dot(tl.join(low, high).reshape(64, 128) * scale[:, None], tokens, total)
    tl.store(y + m[None, :] * 4096 + n[:, None], total.to(tl.float16), mask=(m < M)[None, :])
"""
MASKED = """            pair = ((words >> (4 * j)) & 0x000F000F) | 0x64006400
            low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True) - 1032.0
            high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True) - 1032.0"""
CONVERTED = """            low = ((words >> (8 * j)) & 0xF).to(tl.float16) - 8.0
            high = ((words >> (8 * j + 4)) & 0xF).to(tl.float16) - 8.0"""
DENSE = """def dense(x, w, y):
    i = tl.arange(0, 128)
    total = tl.zeros((128, 128), tl.float32)
    for start in range(0, 4096, 128):
        left = tl.load(w + i[:, None] * 4096 + start + i[None, :])
        total = tl.dot(left, tl.load(x + start + i[:, None] + i[None, :] * 4096), total)
    tl.store(y + i[:, None] * 128 + i[None, :], total.to(tl.float16))
"""
KEEP = """def keep(x, y):
    i = tl.arange(0, 16384)
    values = tl.load(x + i)
    tl.store(y + i, values / tl.sum(values, 0))
"""


def pointers(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "*fp16", aligned=True) for name in names)


def gemv(size: str, iterations: int = 0) -> Kernel:
    arguments = (*pointers("x", "w", "y"), Argument("K", "i32", aligned=True))
    expects = Resources(shared_bytes=4096, load_bytes=16, issue_slots=5)
    return Kernel(
        "gemv",
        HEAD + GEMV.replace("SIZE", size),
        arguments,
        loop_weights=4 * 1024,
        iterations=iterations,
        weight_bits=16,
        expects=expects,
    )


def product(unpack: str, *multiplies: str) -> Kernel:
    arguments = (*pointers("x", "w", "scales", "y"), Argument("M", "i32"))
    return Kernel(
        "product",
        HEAD + PRODUCT.replace("UNPACK", unpack),
        tuple(replace(each, type="*i32") if each.name == "w" else each for each in arguments),
        num_stages=4,
        loop_weights=64 * 512,
        weight_bits=4.125,
        expects=Resources(tensor_core=multiplies, issue_slots=4.5, arithmetic_slots=2.5, forbidden=("I2F",)),
    )


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.fixture
def held() -> KernelReport:
    """A report that keeps every promise of `promise`."""
    return KernelReport(
        "k", 90, 80, 0, 1024, 4, {"LDG.128": 4, "LDG.16": 1}, {"HGMMA": 2}, {"LOP3.LUT": 9, "I2FP.F32.S32": 3},
        whole_kernel=False, copies=1, slots=Slots(2.0, 1.0, 0.0, 5.0),
    )  # fmt: skip


@pytest.fixture
def promise() -> Kernel:
    return Kernel("k", "", (), expects=Resources(1024, 16, ("HGMMA", "QGMMA"), 2.0, 1.0, ("I2F", "LDL")))


def test_a_matrix_vector_product_loads_wide_and_spills_nothing() -> None:
    kernel = gemv("14336")
    found = report(kernel, 90)
    assert found.load_bytes == (16, 16)
    assert not found.tensor_core
    assert found.spill_bytes == 0
    assert not found.whole_kernel
    # A thread's registers are given out by eights.
    assert found.programs_per_sm == 65536 // (-(-found.registers // 8) * 8 * THREADS)
    assert violations(kernel, found) == []


@pytest.mark.parametrize(("size", "iterations"), [("14336", 14), ("4096", 4), ("K", 0)])
def test_iterations_that_a_compiler_put_side_by_side_are_told_apart(size: str, iterations: int) -> None:
    found = report(gemv(size, iterations), 90)
    loaded = sum(int(kind.split(".")[1]) // 8 * count for kind, count in found.loads.items())
    assert loaded * THREADS == found.copies * (4 + 1) * 1024 * 2
    assert found.whole_kernel == (size == "4096")
    # A conversion, a product with a sum, and a share of the loads, however often the body is repeated.
    assert found.slots is not None
    assert 2.0 < found.slots.issue < 4.0


def test_unpacking_by_masks_is_bound_by_memory() -> None:
    kernel = product(MASKED, "HGMMA")
    found = report(kernel, 90)
    assert found.tensor_core.keys() == {"HGMMA"}
    assert found.load_bytes[1] == 16
    assert found.slots is not None
    assert found.slots.conversion == 0
    assert found.slots.ceiling >= 3.0
    # Three iterations are in flight at least: 64 rows of 64 words, and 512 numbers of each of 16 tokens.
    assert found.shared_bytes >= 3 * (64 * 64 * 4 + 512 * 16 * 2)
    assert found.programs_per_sm == 2
    assert violations(kernel, found) == []


def test_unpacking_by_conversion_is_found() -> None:
    kernel = product(CONVERTED, "HGMMA")
    found = report(kernel, 90)
    assert found.slots is not None
    assert found.slots.conversion == 1.0
    assert found.slots.ceiling == pytest.approx(132 * 1.755e9 * 16 * 4.125 / 8 / 1e12)
    told = violations(kernel, found)
    assert f"it has {64 * 512 // THREADS} I2F in its main loop, and 0 are allowed" in told
    assert any("issue slots for one weight" in each for each in told)


def test_an_older_gpu_multiplies_with_its_own_instruction() -> None:
    kernel = product(MASKED, "HMMA")
    found = report(kernel, 80)
    # One instruction of a warp multiplies 16 by 16 with 16 by 8.
    assert found.tensor_core == {"HMMA": 64 * 16 * 512 // (16 * 16 * 8) // (THREADS // 32)}
    assert violations(kernel, found) == []
    assert any("0 of the promised HGMMA" in each for each in violations(product(MASKED, "HGMMA"), found))


def test_spills_are_found() -> None:
    arguments = tuple(replace(each, type="*fp32") for each in pointers("x", "y"))
    kernel = Kernel("keep", HEAD + KEEP, arguments, num_warps=1)
    found = report(kernel, 90)
    assert found.spill_bytes > 0
    assert violations(kernel, found) == [f"it spills {found.spill_bytes} bytes, and 0 are allowed"]
    assert found.whole_kernel
    assert found.slots is None


def test_too_much_shared_memory_is_found() -> None:
    kernel = Kernel("dense", HEAD + DENSE, pointers("x", "w", "y"), num_stages=8)
    found = report(kernel, 90)
    assert found.shared_bytes >= 7 * 2 * 128 * 128 * 2
    told = violations(kernel, found)
    assert f"it takes {found.shared_bytes} bytes of shared memory, and {227 * 1024} are allowed" in told
    assert "0 programs fit on a multiprocessor of sm_90, and 1 must" in told


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("    tl.store(x, nothing)\n", "nothing is not defined"),
        ("    tl.store(x + tl.arange(0, 3), 0)\n", "arange's range must be a power of 2"),
        (
            "    one = tl.inline_asm_elementwise('nonsense $0, $1;', '=r,r', [tl.program_id(0)], tl.int32, True, 1)\n"
            "    tl.store(x, one.to(tl.float16))\n",
            "Not a name of any known instruction: 'nonsense'",
        ),
    ],
)
def test_a_kernel_that_does_not_compile_is_told(body: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoweringError) as caught:
        compile_kernel(Kernel("wrong", f"{HEAD}def wrong(x):\n{body}", pointers("x")), 90)
    assert caught.value.code == "SPARC409"
    assert "`wrong`" in caught.value.diagnostic.what
    assert why in caught.value.diagnostic.why
    assert "\n" not in caught.value.diagnostic.why
    assert capsys.readouterr().out == ""


def test_a_gpu_whose_limits_are_not_known_is_refused() -> None:
    with pytest.raises(LoweringError, match="sm_75 is none of sm_80"):
        compile_kernel(gemv("4096"), 75)


def test_a_kept_promise_breaks_nothing(promise: Kernel, held: KernelReport) -> None:
    assert violations(promise, held) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"spill_bytes": 8}, "it spills 8 bytes, and 0 are allowed"),
        ({"shared_bytes": 1025}, "it takes 1025 bytes of shared memory, and 1024 are allowed"),
        ({"programs_per_sm": 0}, "0 programs fit on a multiprocessor of sm_90, and 1 must"),
        ({"loads": {"LDG.64": 4}}, "its widest load takes 8 bytes, and 16 are promised"),
        ({"loads": {}}, "its widest load takes 0 bytes, and 16 are promised"),
        ({"tensor_core": {"HMMA": 3}}, "it has 0 of the promised HGMMA or QGMMA in its main loop, but 3 HMMA"),
        ({"tensor_core": {}}, "it has 0 of the promised HGMMA or QGMMA in its main loop, but nothing on tensor cores"),
        ({"slots": Slots(2.25, 1, 0, 5)}, "it takes 2.25 issue slots for one weight, and 2.00 are allowed"),
        (
            {"slots": Slots(2, 1.25, 0, 5)},
            "it takes 1.25 integer and logic instructions for one weight, and 1.00 are allowed",
        ),
        ({"slots": None}, "it limits its slots for one weight, but says 0 weights for its loop"),
        ({"instructions": {"I2F.U16": 2, "I2F.F16": 3}}, "it has 5 I2F in its main loop, and 0 are allowed"),
    ],
)
def test_every_broken_promise_is_told(promise: Kernel, held: KernelReport, changes: dict, told: str) -> None:
    assert violations(promise, replace(held, **changes)) == [told]


def test_the_table_says_that_nothing_was_measured(held: KernelReport) -> None:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table([held, replace(held, name="other", slots=None, tensor_core={}, loads={"LDG.64": 1})]))
    head, first, second = (" ".join(line.split()) for line in captured.get().splitlines())
    assert head == "kernel registers spills shared load tensor core slots TB/s measured"
    assert first == "k (sm_90) 80 0 1024 2 to 16 2 HGMMA 2.00 5.0 unmeasured"
    assert second == "other (sm_90) 80 0 1024 8 – – – unmeasured"
