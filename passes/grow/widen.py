"""Net2WiderNet: a layer gets copies of its units, and what reads them shares its columns out among the copies."""

import torch
from torch import Tensor

from sparc import codes
from sparc.analysis.axes import positions
from sparc.analysis.dependency import Group, Member, groups
from sparc.diag import PassError
from sparc.passes.coalesce.units import obstacle
from sparc.passes.cut.slice import resize
from sparc.program import Program


def widen(
    program: Program, layer: str, units: int, *, kind: str | None = None, seed: int = 0, noise: float = 0.0
) -> Program:
    """A program with more units in a layer that computes the same.

    W1'[j] = W1[g(j)], W2'[:, j] = W2[:, g(j)] / |g^-1(g(j))|, where g is the identity on the units there are and random
    behind them (Net2WiderNet, Chen et al. 2016, section 3.1). Units are those of dependency groups: gated layers,
    convolutions with batch norms, and whole attention heads are widened alike. `merge_neurons` undoes it.

    Args:
        program: stays as it is. Canonicalise it first, so that attention is one operator.
        layer: a weight that writes the units, or the path of the module that holds it (`layers.0.mlp.up_proj`).
        units: how many there shall be, more than there are.
        kind: the kind of units, where a weight writes several (`head`, and with grouped queries `queries of a head`).
        seed: of the choice of what is copied, and of the noise.
        noise: of the copies' own weights, as a part of each matrix's standard deviation. It breaks the symmetry that
            training would keep, and the function is then only nearly the same.

    Returns:
        A program with the same names of weights. Columns are divided in float64 and rounded once.

    Raises:
        PassError: SPARC209 when no layer of that name can be widened, several groups of units are written by it, there
            are as many units already, or the noise is negative.
    """
    grown = program.clone()
    group = _find(grown, layer, kind)
    if units <= group.units:
        raise PassError(codes.BAD_OPTION, f"{group} cannot be widened to {units}", hint=f"units from {group.units + 1}")
    if noise < 0:
        raise PassError(codes.BAD_OPTION, f"noise={noise} is negative", hint="0 keeps the function, 0.01 nearly")
    generator = torch.Generator().manual_seed(seed)
    copied = torch.randint(group.units, (units - group.units,), generator=generator)
    source = torch.cat([torch.arange(group.units), copied])
    share = 1 / torch.bincount(source).double()[source]
    resize(grown, group.coupling, {group.channels: source})
    group.channels.size = units
    for member in group.members:
        index = _index(group, member)
        weight = grown.weights[member.weight]
        if member.read:
            factors = torch.ones(weight.shape[member.axis], dtype=torch.float64)
            factors[index.flatten()] = share.repeat_interleave(index.shape[1])
            shared = weight.double() * factors.reshape(-1, *[1] * (weight.ndim - 1 - member.axis))
            grown.set_weight(member.weight, shared.to(weight.dtype))
        elif noise and weight.is_floating_point() and weight.ndim > 1:
            places = index[group.units :].flatten()
            grown.set_weight(member.weight, _noisy(weight, member.axis, places, noise, generator))
    return grown


def _find(program: Program, layer: str, kind: str | None) -> Group:
    """The one group of units that a layer writes and that can be widened."""
    written = [group for group in groups(program) if any(_writes(member, layer) for member in group.members)]
    written = [group for group in written if kind in (None, group.kind)]
    if not written:
        hint = "a weight's name, or the path of the module that holds it"
        raise PassError(codes.BAD_OPTION, f"no layer {layer!r} writes {kind or 'unit'}s", hint=hint)
    free = [group for group in written if not obstacle(group)]
    if not free:
        raise PassError(codes.BAD_OPTION, f"{layer} cannot be widened", why=obstacle(written[0]))
    if len(free) > 1:
        what, hint = "; ".join(map(str, free)), "name one weight, and give kind= where it writes several"
        raise PassError(codes.BAD_OPTION, f"{layer} writes several groups of units", why=what, hint=hint)
    return free[0]


def _writes(member: Member, layer: str) -> bool:
    return not member.read and (member.weight == layer or member.weight.startswith(f"{layer}."))


def _index(group: Group, member: Member) -> Tensor:
    """`[units, each]`: the places of the units along the member's axis as it is now."""
    found = positions(group.coupling.weights[member.weight][member.axis], group.channels)
    assert found is not None  # a group that is coupled with itself is frozen
    return found


def _noisy(weight: Tensor, axis: int, places: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    rows = weight.index_select(axis, places).double()
    rows += noise * weight.double().std() * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    return weight.index_copy(axis, places, rows.to(weight.dtype))
