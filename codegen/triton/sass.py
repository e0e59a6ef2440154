"""Reading a GPU's machine code (SASS, as nvdisasm prints it) and PTX: instructions, loops, loads and arithmetic.

The units are those of an H100 (NVIDIA, *CUDA C++ programming guide*, arithmetic instructions): 64 lanes of a
multiprocessor take integer and logic instructions, 16 take conversions and transcendental functions.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# fmt: off
INTEGER_UNIT = frozenset({
    "BMSK", "F2FP", "FMNMX", "FSEL", "FSETP", "I2FP", "IABS", "IADD3", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT",
    "SEL", "SGXT", "SHF", "VABSDIFF", "VIADD", "VIMNMX",
})
# fmt: on
CONVERSION_UNIT = frozenset({"BREV", "F2F", "F2I", "FLO", "FRND", "I2F", "MUFU", "POPC"})

_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>.*)")
_SASS_LABEL = re.compile(r"^(\.L_\w+):")
_SASS_TARGET = re.compile(r"`\((\.L_\w+)\)")
_PTX = re.compile(r"^\s*(?:@!?%\w+\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>.*)")
_PTX_LABEL = re.compile(r"^(\$L_\w+):")
_PTX_TARGET = re.compile(r"(\$L_\w+)")

_LOAD = re.compile(r"(LDG|LDGSTS|UTMALDG|UBLKCP\.S|ld\.global|cp\.async\.c[ag]|cp\.async\.bulk\.tensor\.\dd\.shared)\b")
_PRODUCT = re.compile(r"([A-Z]*MMA|wgmma\.mma_async|mma\.sync|mma\.sp|tcgen05\.mma)\b")
_BULK = ("UTMALDG", "UBLKCP")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        opcode: with its modifiers: `LDG.E.128`.
        target: the label it jumps to; empty where it does not jump.
    """

    opcode: str
    target: str = ""

    @property
    def is_load(self) -> bool:
        """Whether it reads global memory."""
        return _LOAD.match(self.opcode) is not None

    @property
    def is_product(self) -> bool:
        """Whether it multiplies on tensor cores."""
        return _PRODUCT.match(self.opcode) is not None


@dataclass(frozen=True)
class Listing:
    """A function's instructions in order, and what each label stands before (an index into them)."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]

    def main_loop(self) -> tuple[Instruction, ...]:
        """The body of the innermost loop that multiplies on tensor cores, or else that loads; the longest of several.

        A loop is what lies between a jump backwards and where it leads: blocks that were moved out of line are missed.
        Empty if there is none.
        """
        ends: dict[int, int] = {}
        for at, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.target, at + 1)
            if start <= at:
                ends[start] = at
        bodies = [range(start, end + 1) for start, end in ends.items()]
        products = [body for body in bodies if any(self.instructions[at].is_product for at in body)]
        loads = [body for body in bodies if any(self.instructions[at].is_load for at in body)]
        found = products or loads
        inner = [body for body in found if not any(_inside(other, body) for other in found)]
        longest = max(inner, key=len, default=range(0))
        return self.instructions[longest.start : longest.stop]

    def loads(self) -> Counter[str]:
        """The main loop's loads by kind, or all: specialised warps that multiply leave loading to others."""
        return load_kinds(self.main_loop()) or load_kinds(self.instructions)


def parse_sass(text: str) -> Listing:
    """What `nvdisasm -c` printed."""
    return _parse(text.splitlines(), _SASS, _SASS_LABEL, _SASS_TARGET)


def parse_ptx(text: str) -> Listing:
    """A module in PTX."""
    statements = (part for line in text.splitlines() for part in line.split("//")[0].split(";"))
    return _parse(statements, _PTX, _PTX_LABEL, _PTX_TARGET)


def begins(opcode: str, prefix: str) -> bool:
    """Whether an opcode begins with `prefix`, compared in whole parts: `I2F` begins `I2F.U16` and not `I2FP.F32`."""
    return f"{opcode}.".startswith(f"{prefix}.")


def copies(machine: Sequence[Instruction], virtual: Sequence[Instruction]) -> int:
    """How often ptxas repeated the body of a PTX loop in the loop that it made of it: by their loads, else products."""
    for kind in ("is_load", "is_product"):
        before = sum(getattr(each, kind) for each in virtual)
        after = sum(getattr(each, kind) for each in machine)
        if before and after:
            return max(1, round(after / before))
    return 1


def memory_width(opcode: str) -> int:
    """The bytes that a load or store moves for one thread: 1 to 32; a bulk copy, which has no threads, counts as 16."""
    parts = opcode.split(".")
    if parts[0] in _BULK:
        return 16
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((bits[part] for part in parts[1:] if part in bits), 32) // 8


def load_kinds(instructions: Iterable[Instruction]) -> Counter[str]:
    """The global loads, by unit and bits: `{"LDGSTS.128": 20, "LDG.32": 2}`."""
    loads = [each.opcode for each in instructions if each.is_load]
    return Counter(f"{opcode.split('.')[0]}.{8 * memory_width(opcode)}" for opcode in loads)


def product_kinds(instructions: Iterable[Instruction]) -> Counter[str]:
    """The products on tensor cores: `{"HGMMA": 8}`; those that take a sparse operand as `HMMA.SP`."""
    parts = [each.opcode.split(".") for each in instructions if each.is_product]
    return Counter(f"{first}.SP" if "SP" in rest else first for first, *rest in parts)


def spilled_bytes(instructions: Iterable[Instruction]) -> int:
    """The bytes that all stores to and loads from a thread's local memory move."""
    return sum(memory_width(each.opcode) for each in instructions if each.opcode.split(".")[0] in ("STL", "LDL"))


def _inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def _parse(lines: Iterable[str], pattern: re.Pattern[str], label: re.Pattern[str], target: re.Pattern[str]) -> Listing:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if found := label.match(line):
            labels[found[1]] = len(instructions)
        elif found := pattern.match(line):
            jump = target.search(found["operands"]) if found["opcode"].split(".")[0] in ("BRA", "bra") else None
            instructions.append(Instruction(found["opcode"], jump[1] if jump else ""))
    return Listing(tuple(instructions), labels)
