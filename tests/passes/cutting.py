"""Cutting every group of a program, compared with making the same weights zero."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparc.analysis.dependency import Group, groups
from sparc.capture import capture
from sparc.pass_base import PassContext
from sparc.passes.canonicalize import Canonicalize
from sparc.passes.cut import cut, mask
from sparc.program import Program
from sparc.verify import relative_error


def error(a: Program, b: Program, flat: list[Tensor], wide: bool = True) -> float:
    pairs = zip(a.run_flat(flat, wide=wide), b.run_flat(flat, wide=wide), strict=True)
    return max(relative_error(x, y) for x, y in pairs if isinstance(x, Tensor))


def cuttable(program: Program) -> list[int]:
    return [at for at, group in enumerate(groups(program)) if group.units > 1 and not group.frozen]


def check_every_group(program: Program, flat: list[Tensor]) -> list[Group]:
    """Cut a third of every group; where no statistic runs over it, compare with zero weights. Returns those."""
    compared = []
    for at in cuttable(program):
        sliced, masked = program.clone(), program.clone()
        group, same = groups(sliced)[at], groups(masked)[at]
        keep = [unit for unit in range(group.units) if unit % 3 != 1]
        before = sum(tensor.numel() for tensor in program.weights.values())
        gone = {(member.weight, member.axis): len(member.index) - len(keep) for member in group.members}
        cut(sliced, group, keep)
        mask(masked, same, keep)
        assert gone
        assert sum(tensor.numel() for tensor in sliced.weights.values()) < before
        if same.statistic:
            sliced.run_flat(flat)
            continue
        assert error(sliced, masked, flat) < 1e-9, str(same)
        compared.append(same)
    return compared


def canonical(model: nn.Module, inputs: Any, dynamic: Mapping[str, Any] | None = None) -> Program:
    program = capture(model.eval(), inputs, dynamic=dynamic)
    Canonicalize().run(program, PassContext())
    return program
