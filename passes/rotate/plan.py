"""Which streams can be rotated, and what becomes of every weight around them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparc.analysis.features import carries_shift, is_norm, operator_name, packet, product_axes
from sparc.analysis.residual import Stream, Streams
from sparc.passes.fold.norm import Affine, affine_at, bias_of, uses, weight_reason
from sparc.passes.rotate.weights import Refusal, Store, name_of
from sparc.program import Program, is_weight

aten = torch.ops.aten


@dataclass(frozen=True)
class Turn:
    """One axis of a weight is rotated.

    Args:
        size: how many features the stream has.
        centred: whether the mean over the features is removed.
        axis: the axis of the weight, from the front.
        affine: names of the gains and shifts that the weight takes over before, in the order they were applied.
    """

    size: int
    centred: bool
    axis: int
    affine: tuple[tuple[str | None, str | None], ...] = ()


@dataclass(frozen=True)
class Role:
    """What becomes of a weight where one operator reads it: of its inputs' features, and of its results'."""

    columns: Turn | None = None
    rows: Turn | None = None

    @property
    def matrix(self) -> "Role":
        """What becomes of the weight itself: shifts only change its bias."""
        if self.columns is None:
            return self
        gains = tuple((gain, None) for gain, _ in self.columns.affine if gain is not None)
        return Role(replace(self.columns, affine=gains), self.rows)

    @property
    def shifts(self) -> bool:
        """Whether something is added to the bias."""
        return self.columns is not None and any(shift is not None for _, shift in self.columns.affine)


@dataclass
class Plan:
    """What a rotation of some streams does.

    Args:
        roles: by the node that reads a weight (an operator); for constants, by the constant's own node.
        norms: the norms and gains per feature that lose what the weights take over.
        rotated: the streams.
        refused: the streams that cannot be rotated: a node of each, and why.
    """

    roles: dict[fx.Node, Role] = field(default_factory=dict)
    norms: dict[fx.Node, Affine] = field(default_factory=dict)
    rotated: list[Stream] = field(default_factory=list)
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)


def weight_of(node: fx.Node) -> Any:
    """The weight that a writer or reader has; for a constant, itself."""
    return node if is_weight(node) else node.args[0 if packet(node) is aten.embedding else 1]


def make_plan(program: Program, selected: Mapping[str, bool], untie: bool) -> Plan:
    """The plan that rotates every residual stream that can be.

    Streams that share a weight are rotated together or not at all: refusing one may refuse others.

    Args:
        program: the program.
        selected: whether the step's selector claims a weight, by the names of the weights that are sites.
        untie: store a tied weight twice where its readers need different ones.
    """
    every = [Streams(program, entry.graph) for entry in program.entries.values()]
    candidates = {id(stream): (streams, stream) for streams in every for stream in streams if stream.residual}
    refused: dict[int, str] = {}
    while True:
        plan, owners = Plan(), defaultdict[fx.Node, list[int]](list)
        for key, (streams, stream) in candidates.items():
            if key in refused:
                continue
            try:
                part = _part(program, streams, stream, selected)
            except Refusal as refusal:
                refused[key] = str(refusal)
                continue
            plan.rotated.append(stream)
            plan.norms |= part.norms
            for node, role in part.roles.items():
                known = plan.roles.get(node, Role())
                plan.roles[node] = Role(role.columns or known.columns, role.rows or known.rows)
                owners[node].append(key)
        broken = {owner: why for node, why in _conflicts(program, plan, untie) for owner in owners[node]}
        if not broken:
            break
        refused |= {key: why for key, why in broken.items() if key not in refused}
    plan.refused = [(candidates[key][1].writers[0], why) for key, why in refused.items()]
    return plan


def _part(program: Program, streams: Streams, stream: Stream, selected: Mapping[str, bool]) -> Plan:
    """What rotating one stream does.

    Raises:
        Refusal: it cannot be rotated.
    """
    if stream.frozen:
        raise Refusal(stream.frozen)
    part, centred = Plan(), any(packet(each) is aten.layer_norm for each in stream.readers)
    unable = next((each for each in stream.writers if not _takes_rotations(each)), None)
    if unable is not None:
        raise Refusal(f"it is written by {operator_name(unable)}, which cannot take a rotation over")
    for reader in stream.readers:
        if centred and packet(reader) is not aten.layer_norm:
            raise Refusal(f"a layer norm takes its mean away, but {operator_name(reader)} reads it too")
    for product, affine in _products(program, streams, stream, part, behind=False):
        part.roles[product] = Role(columns=Turn(stream.size, centred, 1, affine))
    for writer in stream.writers:
        turn = Turn(stream.size, centred, 0)
        if product_axes(writer) is not None:
            columns = part.roles.get(writer, Role()).columns
            part.roles[writer] = Role(columns, turn)
        elif packet(writer) is aten.embedding:
            part.roles[writer] = Role(columns=Turn(stream.size, centred, 1))
        elif is_weight(writer):
            axis = stream.values[writer] + writer.meta["val"].ndim
            part.roles[writer] = Role(columns=Turn(stream.size, centred, axis))
    for node, role in part.roles.items():
        _check_weight(program, node, role, selected)
    return part


def _takes_rotations(writer: fx.Node) -> bool:
    return product_axes(writer) is not None or packet(writer) is aten.embedding or is_weight(writer)


Pairs = tuple[tuple[str | None, str | None], ...]


def _products(
    program: Program, streams: Streams, stream: Stream, part: Plan, behind: bool, before: Pairs = ()
) -> Iterator[tuple[fx.Node, Pairs]]:
    """Every product that reads a stream, directly or behind a norm, with the gains and shifts between."""
    for reader in stream.readers:
        if product_axes(reader) is not None:
            yield reader, before
            continue
        inner, name = streams.of(reader), operator_name(reader)
        if behind and is_norm(reader):
            raise Refusal(f"what a norm makes of it is read by {name}")
        assert inner is not None
        if inner.frozen or inner.writers != [reader]:
            raise Refusal(f"what {name} makes of it is added to something else" if not inner.frozen else inner.frozen)
        affine = affine_at(program, reader)
        assert affine is not None
        part.norms[reader], pair = _taken(program, affine)
        after = before if pair == (None, None) else (*before, pair)
        if any(shift for _, shift in after):
            carriers = [each for each in inner.values if each is not reader and not carries_shift(each)]
            if carriers:
                raise Refusal(f"the shift of {name} does not pass {operator_name(carriers[0])}")
        yield from _products(program, streams, inner, part, True, after)


def _taken(program: Program, affine: Affine) -> tuple[Affine, tuple[str | None, str | None]]:
    """What stays of a gain and shift, and the names of what the readers take over: a gain that is one number for all
    features commutes with rotations and stays, so that a tied weight may stay tied.
    """
    names: list[str | None] = []
    for what, node in (("gain", affine.gain), ("shift", affine.shift)):
        numbers = None
        if node is not None:
            reason = weight_reason(program, node, what)
            numbers = affine.vector(program, node)
            if reason is not None or numbers is None or node.meta["val"].dtype != affine.x.meta["val"].dtype:
                raise Refusal(reason or f"a {what} has another dtype than what it meets")
        common = numbers is None or bool((numbers == (numbers[0] if what == "gain" else 0)).all())
        names.append(None if common else name_of(node))
    common_gain = affine.gain is not None and names[0] is None
    stays = affine.gain if common_gain and float(program.weights[name_of(affine.gain)].flatten()[0]) != 1 else None
    return Affine(affine.value, affine.x, stays, None, affine.axis), (names[0], names[1])


def _check_weight(program: Program, node: fx.Node, role: Role, selected: Mapping[str, bool]) -> None:
    weight = weight_of(node)
    if (reason := weight_reason(program, weight)) is not None:
        raise Refusal(f"{reason} ({node.name})")
    if not selected.get(name_of(weight), True):
        raise Refusal(f"the selector leaves {name_of(weight)!r} out")
    bias = None if is_weight(node) or packet(node) is aten.embedding else bias_of(node)
    changed = bias is not None and (role.rows is not None or role.shifts)
    if changed and (reason := weight_reason(program, bias, "bias")) is not None:
        raise Refusal(f"{reason} ({node.name})")


def _conflicts(program: Program, plan: Plan, untie: bool) -> Iterator[tuple[fx.Node, str]]:
    """Readers whose weight or bias cannot become what they need, because another one needs something else."""
    values = {value for stream in plan.rotated for value in stream.values}
    for node, role in plan.roles.items():
        weight = weight_of(node)
        users = list(uses(program, name_of(weight)))
        if is_weight(node):
            others = [user for user in users if user not in values or user in plan.roles]
        else:
            others = [user for user in users if user not in plan.roles]
        if others:
            yield node, f"the weight {name_of(weight)!r} is also read by {operator_name(others[0])}"
        elif not untie and not is_weight(node) and any(plan.roles[user].matrix != role.matrix for user in users):
            size = program.weights[name_of(weight)].nbytes
            yield node, f"the weight {name_of(weight)!r} is tied; untie=True would store it twice ({size} bytes more)"
        elif packet(node) is not aten.embedding and not is_weight(node) and is_weight(bias_of(node)):
            known = list(uses(program, name_of(bias_of(node))))
            if any(plan.roles.get(user) != role or weight_of(user).target != weight.target for user in known):
                yield node, f"the bias {name_of(bias_of(node))!r} is also read elsewhere"


def affine_vectors(store: Store, turn: Turn) -> tuple[Tensor | None, Tensor | None]:
    """The gain and the shift that a weight takes over, `[features]` float64 each; None where there is none."""
    gain: Tensor | None = None
    shift: Tensor | None = None
    for gain_name, shift_name in turn.affine:
        if gain_name is not None:
            factor = store[gain_name].reshape(-1)
            gain = factor if gain is None else gain * factor
            shift = None if shift is None else shift * factor
        if shift_name is not None:
            addend = store[shift_name].reshape(-1)
            shift = addend if shift is None else shift + addend
    return gain, shift
