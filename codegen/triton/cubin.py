"""Judging a kernel on its machine code, which needs no GPU: what it takes, and whether that is what it promises.

The compiler and its tools come with Triton. Every number is counted in the code; none is a timing.
"""

import contextlib
import io
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparc.codegen.triton import sass
from sparc.codegen.triton.kernel import Kernel, signature
from sparc.codegen.triton.load import failure, load_function


@dataclass(frozen=True)
class Multiprocessor:
    """What one streaming multiprocessor holds (NVIDIA, *CUDA C++ programming guide*, technical specifications)."""

    shared_bytes: int
    threads: int
    programs: int


MULTIPROCESSORS: Mapping[int, Multiprocessor] = {
    80: Multiprocessor(164 * 1024, 2048, 32),
    86: Multiprocessor(100 * 1024, 1536, 16),
    89: Multiprocessor(100 * 1024, 1536, 24),
    90: Multiprocessor(228 * 1024, 2048, 32),
    100: Multiprocessor(228 * 1024, 2048, 32),
    120: Multiprocessor(100 * 1024, 1536, 24),
}
REGISTERS = 65536
# What the system takes of shared memory for each program.
RESERVED_BYTES = 1024

# An H100 SXM: multiprocessors times clock, and the lanes of one that take instructions each cycle.
H100_CYCLES = 132 * 1.755e9
ISSUE_LANES, INTEGER_LANES, CONVERSION_LANES = 128, 64, 16


@dataclass(frozen=True)
class Compiled:
    """A kernel for one capability.

    Args:
        kernel: what was compiled.
        capability: of the GPU, ten times its number: 90 for sm_90.
        cubin: the machine code, as the driver loads it.
        ptx: the virtual code before it.
        shared_bytes: shared memory of one program.
    """

    kernel: Kernel
    capability: int
    cubin: bytes
    ptx: str
    shared_bytes: int


@dataclass(frozen=True)
class Slots:
    """Instructions of all threads in the main loop for one weight, and what they allow.

    Args:
        issue: all of them.
        arithmetic: those for the integer and logic units.
        conversion: those for the units that convert and compute transcendental functions.
        ceiling: TB/s of stored weights that an H100 can take in at most.
    """

    issue: float
    arithmetic: float
    conversion: float
    ceiling: float


@dataclass(frozen=True)
class KernelReport:
    """What a kernel takes. Loads, products and slots are of the main loop.

    Args:
        name: the kernel's.
        capability: ten times the number: 90 for sm_90.
        registers: of one thread.
        spill_bytes: that stores to and loads from local memory move, for one thread.
        shared_bytes: of one program.
        programs_per_sm: how many programs fit at once on a multiprocessor.
        loads: global loads by unit and bits: `{"LDGSTS.128": 20}`. Which of them are the weight's is not known.
        tensor_core: products on tensor cores by kind: `{"HGMMA": 32}`.
        instructions: by opcode with modifiers.
        whole_kernel: that there is no loop, it being unrolled fully or run once: the counts are of the whole kernel.
        copies: how many iterations the counts are of, where the compiler unrolled the loop.
        slots: for one weight; None where the kernel has no `loop_weights`.
    """

    name: str
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs_per_sm: int
    loads: Mapping[str, int]
    tensor_core: Mapping[str, int]
    instructions: Mapping[str, int]
    whole_kernel: bool
    copies: int
    slots: Slots | None

    @property
    def load_bytes(self) -> tuple[int, int]:
        """Bytes that the narrowest and the widest global load take for one thread; zeros if there is none."""
        widths = [int(kind.rsplit(".", 1)[1]) // 8 for kind in self.loads]
        return min(widths, default=0), max(widths, default=0)


def compile_kernel(kernel: Kernel, capability: int) -> Compiled:
    """Compile for a GPU of this capability (80, 86, 89, 90, 100, 120), which need not be there.

    Raises:
        LoweringError: SPARC409 with the first line of what Triton or ptxas said.
    """
    if capability not in MULTIPROCESSORS:
        raise failure(kernel.name, f"sm_{capability} is none of {', '.join(f'sm_{each}' for each in MULTIPROCESSORS)}")
    # A number that 16 does not divide is named with no property, as a launch does: so both find one cache entry.
    known = {i: each for i, each in enumerate(kernel.arguments) if each.aligned or each.type == "i32"}
    aligned = {(i,): [["tt.divisibility", 16]] if each.aligned else [] for i, each in known.items()}
    # Triton 3.9 changes the default for fusing products and sums and warns about it.
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    function = load_function(kernel)
    try:
        source = ASTSource(function, signature(kernel.arguments), constexprs={}, attrs=aligned)
        # Triton prints the whole code when ptxas refuses it.
        with contextlib.redirect_stdout(io.StringIO()):
            code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        raise failure(kernel.name, error) from error
    text = code.asm
    return Compiled(kernel, capability, text["cubin"], text["ptx"], code.metadata.shared)


def report(kernel: Kernel, capability: int) -> KernelReport:
    """Compile, take apart and count.

    Where the machine code has a loop, ptxas may have repeated its body: the number of its loads over that of the loop
    in PTX says how often, and the slots for one weight are divided by it. Where no loop is left, the whole kernel is
    counted and divided by the kernel's `iterations`: prologue and epilogue are then in it, so that the slots are
    too many rather than too few. So they are where a loop stays while one inside it is unrolled, which counts as one
    iteration.

    Raises:
        LoweringError: SPARC409, as `compile_kernel`, or when a tool cannot read the code.
    """
    compiled = compile_kernel(kernel, capability)
    registers, listing = _disassemble(compiled)
    loop = listing.main_loop()
    body = loop or listing.instructions
    copies = sass.copies(loop, sass.parse_ptx(compiled.ptx).main_loop()) if loop else max(1, kernel.iterations)
    instructions = Counter(each.opcode for each in body if each.opcode != "NOP")
    return KernelReport(
        name=kernel.name,
        capability=capability,
        registers=registers,
        spill_bytes=sass.spilled_bytes(listing.instructions),
        shared_bytes=compiled.shared_bytes,
        programs_per_sm=_programs_per_sm(compiled, registers),
        loads=listing.loads(),
        tensor_core=sass.product_kinds(body),
        instructions=instructions,
        whole_kernel=not loop,
        copies=copies,
        slots=_slots(kernel, instructions, copies),
    )


def violations(kernel: Kernel, report: KernelReport) -> list[str]:
    """Every way in which a kernel takes more, or multiplies otherwise, than it promises; a sentence each."""
    promised = kernel.expects
    widest = report.load_bytes[1]
    found = []
    if report.spill_bytes:
        found.append(f"it spills {report.spill_bytes} bytes, and 0 are allowed")
    if report.shared_bytes > promised.shared_bytes:
        found.append(f"it takes {report.shared_bytes} bytes of shared memory, and {promised.shared_bytes} are allowed")
    if not report.programs_per_sm:
        found.append(f"0 programs fit on a multiprocessor of sm_{report.capability}, and 1 must")
    if widest < promised.load_bytes:
        found.append(f"its widest load takes {widest} bytes, and {promised.load_bytes} are promised")
    if promised.tensor_core and not any(
        sass.begins(kind, prefix) for kind in report.tensor_core for prefix in promised.tensor_core
    ):
        others = _counts(report.tensor_core) or "nothing on tensor cores"
        found.append(f"it has 0 of the promised {' or '.join(promised.tensor_core)} in its main loop, but {others}")
    return found + _too_many_slots(kernel, report.slots) + _forbidden(kernel, report)


def table(reports: Iterable[KernelReport]) -> Table:
    """The reports, one a row. No time is in them, and the last column says so."""
    shown = Table(box=None, header_style="bold")
    columns = ("registers", "spills", "shared", "load", "slots", "TB/s")
    for name in ("kernel", *columns[:4], "tensor core", *columns[4:], "measured"):
        shown.add_column(name, justify="right" if name in columns else "left")
    for each in reports:
        narrowest, widest = each.load_bytes
        shown.add_row(
            f"{each.name} (sm_{each.capability})",
            str(each.registers),
            str(each.spill_bytes),
            str(each.shared_bytes),
            str(widest) if narrowest == widest else f"{narrowest} to {widest}",
            _counts(each.tensor_core) or "–",
            f"{each.slots.issue:.2f}" if each.slots else "–",
            f"{each.slots.ceiling:.1f}" if each.slots else "–",
            "unmeasured",
        )
    return shown


def _too_many_slots(kernel: Kernel, slots: Slots | None) -> list[str]:
    promised = kernel.expects
    if slots is None:
        limited = math.isfinite(min(promised.issue_slots, promised.arithmetic_slots))
        return ["it limits its slots for one weight, but says 0 weights for its loop"] if limited else []
    pairs = (
        ("issue slots", slots.issue, promised.issue_slots),
        ("integer and logic instructions", slots.arithmetic, promised.arithmetic_slots),
    )
    return [
        f"it takes {has:.2f} {what} for one weight, and {most:.2f} are allowed"
        for what, has, most in pairs
        if has > most
    ]


def _forbidden(kernel: Kernel, report: KernelReport) -> list[str]:
    counts = {
        prefix: sum(count for opcode, count in report.instructions.items() if sass.begins(opcode, prefix))
        for prefix in kernel.expects.forbidden
    }
    return [f"it has {count} {prefix} in its main loop, and 0 are allowed" for prefix, count in counts.items() if count]


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _disassemble(compiled: Compiled) -> tuple[int, sass.Listing]:
    """Registers of one thread, and the instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.cubin)
        try:
            usage, listing = (
                subprocess.run([tools / tool, option, path], capture_output=True, text=True, check=True).stdout
                for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "--print-code"))
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise failure(compiled.kernel.name, error) from error
    found = re.search(rf"Function {re.escape(compiled.kernel.name)}:\s*REG:(\d+)", usage)
    if found is None:
        raise failure(compiled.kernel.name, "cuobjdump does not list its registers")
    return int(found[1]), sass.parse_sass(listing)


def _programs_per_sm(compiled: Compiled, registers: int) -> int:
    """Programs that fit on a multiprocessor: by registers, given out 256 to a warp, shared memory and threads."""
    limits = MULTIPROCESSORS[compiled.capability]
    # A kernel with specialised warps has more of them than it was asked for.
    found = re.search(r"\.(?:reqntid|maxntid) (\d+)", compiled.ptx)
    warps = int(found[1]) // 32 if found else compiled.kernel.num_warps
    return min(
        REGISTERS // (warps * 256 * math.ceil(max(registers, 1) * 32 / 256)),
        limits.shared_bytes // (compiled.shared_bytes + RESERVED_BYTES),
        limits.threads // (warps * 32),
        limits.programs,
    )


def _slots(kernel: Kernel, instructions: Mapping[str, int], copies: int) -> Slots | None:
    if not kernel.loop_weights:
        return None
    share = kernel.num_warps * 32 / (kernel.loop_weights * copies)

    def of(units: frozenset[str]) -> float:
        return share * sum(count for opcode, count in instructions.items() if opcode.split(".")[0] in units)

    issue, arithmetic, conversion = share * sum(instructions.values()), of(sass.INTEGER_UNIT), of(sass.CONVERSION_UNIT)
    demands = ((issue, ISSUE_LANES), (arithmetic, INTEGER_LANES), (conversion, CONVERSION_LANES))
    weights = min(H100_CYCLES * lanes / slots for slots, lanes in demands if slots)
    return Slots(issue, arithmetic, conversion, weights * kernel.weight_bits / 8 / 1e12)
