"""Slicing a program along dependency groups: weights lose channels, sizes in arguments follow, types are inferred anew.

What results is an ordinary program. Where no statistic runs over the channels (`Group.statistic`), it computes what
the program computes whose removed channels have zero weights (`mask`).
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.axes import Axis, Channels, cut_extent, leaves, remaining
from sparc.analysis.coupling import Coupling, SizeArgument
from sparc.analysis.dependency import Group
from sparc.analysis.values import same_shape, size_expression, size_hint
from sparc.diag import PassError
from sparc.pattern import normalized_arguments
from sparc.program import Entry, Program, location

aten = torch.ops.aten

Kept = dict[Channels, Tensor]


def cut(program: Program, group: Group, keep: Sequence[int] | Tensor) -> None:
    """Keep some units of a group and remove the others, in place; see `cut_groups`.

    Args:
        program: the program that the group was found in.
        group: a group that is not frozen.
        keep: the units that stay, at least one, from 0 to `group.units - 1`.

    Raises:
        PassError: SPARC209 when the group is frozen, of another program, or `keep` names no unit or an unknown one.
    """
    cut_groups(program, {group: keep})


def cut_groups(program: Program, keep: Mapping[Group, Sequence[int] | Tensor]) -> None:
    """Keep some units of each of several groups, in place.

    Other groups that were found before stay valid, unless they share an axis of a weight with one that is cut. The
    scale of attention stays what it was before (one over the root of the old size of a head).

    Args:
        program: the program that the groups were found in.
        keep: for each group the units that stay, in any order.

    Raises:
        PassError: SPARC209 when a group is frozen, of another program, or `keep` names no unit or an unknown one;
            SPARC207 when an operator does not take what is left (a complex view of an odd number of channels): the
            program is then not usable.
    """
    if not keep:
        return
    state = next(iter(keep)).coupling
    resize(program, state, {group.channels: _units(program, state, group, units) for group, units in keep.items()})


def resize(program: Program, state: Coupling, kept: Kept) -> None:
    """Let channels consist of some of themselves, in place: weights are indexed, sizes in arguments follow.

    Args:
        program: the program of the analysis.
        state: the analysis.
        kept: for each leaf that changes, the int64 channels that it consists of; a leaf grows when one comes several
            times.

    Raises:
        PassError: SPARC207 when an operator does not take what it gets.
    """
    edited: set[fx.Node] = set()
    for name, axes in state.weights.items():
        _slice_weight(program, name, axes, kept)
    for node, arguments in _sizes_by_node(state, kept).items():
        _rewrite_sizes(node, arguments, kept)
        edited.add(node)
    for contraction in state.contractions:
        if contraction.node.target is aten.scaled_dot_product_attention.default and _touches(contraction.axis, kept):
            _keep_scale(contraction.node, cut_extent(contraction.axis, {}))
    edited |= _resize_cache(program, state, kept)
    _infer(program, state, kept, edited)
    for leaf, units in kept.items():
        leaf.size = len(units)


def mask(program: Program, group: Group, keep: Sequence[int] | Tensor) -> None:
    """Make the weights of the other units zero, in place, and remove nothing: what pruning by masks computes.

    Args:
        program: the program that the group was found in.
        group: any group.
        keep: the units that stay as they are.
    """
    gone = torch.ones(group.units, dtype=torch.bool).index_fill(0, torch.as_tensor(keep, dtype=torch.int64), False)
    for member in group.members:
        weight = program.weights[member.weight]
        if weight.is_floating_point():
            zero = weight.index_fill(member.axis, member.index[gone].flatten(), 0.0)
            program.set_weight(member.weight, zero)


def _units(program: Program, state: Coupling, group: Group, keep: Sequence[int] | Tensor) -> Tensor:
    units = torch.unique(torch.as_tensor(keep, dtype=torch.int64))
    if group.coupling is not state or state.program is not program:
        raise PassError(codes.BAD_OPTION, f"{group.name} is a group of another program, or of another analysis")
    if group.frozen:
        raise PassError(codes.BAD_OPTION, f"{group.name} cannot be cut", why=group.frozen)
    if len(units) < group.least:
        why = f"each token goes to {group.least - 1} of them" if group.least > 1 else "some must stay"
        what = f"{group.name} has units 0 to {group.units - 1}, and cannot be cut to {len(units)}"
        raise PassError(codes.BAD_OPTION, what, why=why)
    if int(units[0]) < 0 or int(units[-1]) >= group.units:
        raise PassError(codes.BAD_OPTION, f"{group.name} has units 0 to {group.units - 1}", why="some must stay")
    return units


def _touches(axis: Axis, kept: Kept) -> bool:
    return any(leaf in kept for leaf in leaves(axis))


def _changes(argument: SizeArgument, kept: Kept) -> bool:
    return _touches(argument.axis, kept) or (argument.within is not None and _touches(argument.within, kept))


def _slice_weight(program: Program, name: str, axes: Sequence[Axis], kept: Kept) -> None:
    old = weight = program.weights[name]
    for place, axis in enumerate(axes):
        if _touches(axis, kept):
            weight = weight.index_select(place, remaining(axis, kept))
    if weight is not old:
        program.set_weight(name, weight.contiguous())


def _sizes_by_node(state: Coupling, kept: Kept) -> dict[fx.Node, list[SizeArgument]]:
    """The size arguments of every node that has one which changes."""
    touched = {each.node for each in state.sizes if _changes(each, kept)}
    found: dict[fx.Node, list[SizeArgument]] = {}
    for each in state.sizes:
        if each.node in touched:
            found.setdefault(each.node, []).append(each)
    return found


def _rewrite_sizes(node: fx.Node, arguments: list[SizeArgument], kept: Kept) -> None:
    if arguments[0].name == "split_sizes":
        sizes = [cut_extent(each.axis, kept) for each in arguments]
        given = normalized_arguments(node)
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (given["self"], sizes, given["dim"]), {}
        return
    for each in arguments:
        if not _changes(each, kept):
            continue
        old = normalized_arguments(node)[each.name]
        if each.index is None:
            _set_argument(node, each.name, cut_extent(each.axis, kept) + each.offset)
            continue
        listed = list(old)
        entry = listed[each.index]
        if entry != -1:
            listed[each.index] = -1 if isinstance(entry, fx.Node) else cut_extent(each.axis, kept)
            _set_argument(node, each.name, listed)


def _resize_cache(program: Program, state: Coupling, kept: Kept) -> set[fx.Node]:
    """Give the slots of caches their new sizes, and note what is left of them; returns their inputs."""
    resized = set()
    for entry in program.entries.values():
        given = dict(zip(entry.signature.input_names, entry.placeholders, strict=True))
        slots = []
        for slot in entry.cache.slots if entry.cache is not None else ():
            node = given[slot.input]
            shape = list(node.meta["val"].shape)
            for place, axis in enumerate(state.of(node)):
                if _touches(axis, kept):
                    slot = slot.cut(place, remaining(axis, kept).tolist())
                    shape[place] = cut_extent(axis, kept)
                    resized.add(node)
            if node in resized:
                with entry.fake_mode:
                    node.meta["val"] = node.meta["val"].new_empty(shape)
            slots.append(slot)
        if entry.cache is not None:
            entry.cache = replace(entry.cache, slots=tuple(slots))
    return resized


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give an argument of an operator another value, by its schema's name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def _keep_scale(node: fx.Node, size: int) -> None:
    if normalized_arguments(node).get("scale") is None:
        _set_argument(node, "scale", size**-0.5)


def _infer(program: Program, state: Coupling, kept: Kept, edited: set[fx.Node]) -> None:
    """Infer the types behind everything that changed, and compare them with what the axes say.

    Raises:
        PassError: SPARC207 when an operator does not take what it gets now, a type is not what the axes say, or a size
            that varied is fixed.
    """
    changed = set(edited)
    for node, axes in state.axes.items():
        if node.op == "get_attr" and any(_touches(axis, kept) for axis in axes):
            changed.add(node)
    for entry in program.entries.values():
        varying = _varying(entry)
        for node in entry.graph.nodes:
            if node.op == "call_function" and (node in changed or changed.intersection(node.all_input_nodes)):
                old = node.meta["val"]
                _infer_node(entry, node)
                if not _same_layout(old, node.meta["val"]):
                    changed.add(node)
                _check(node, state, kept)
                _check_varying(entry, node, varying)
        entry.graph.lint()


def _varying(entry: Entry) -> dict[sympy.Expr, torch.SymInt]:
    """The symbols of an entry's inputs, each with a size that is the symbol for as long as nothing fixes it."""
    sizes = [size for node in entry.placeholders for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
    return {size_expression(size): size for size in sizes if size_expression(size).is_Symbol}


def _same_layout(old: Any, new: Any) -> bool:
    """Whether nothing that reads a value can tell its types apart."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return False
    return same_shape(old.shape, new.shape) and same_shape(old.stride(), new.stride())


def _infer_node(entry: Entry, node: fx.Node) -> None:
    try:
        entry.infer(node)
    except RuntimeError as error:
        what = f"{node.name} does not take what a cut leaves it"
        raise PassError(codes.PASS_FAILED, what, where=location(node), why=str(error)[:300]) from error


def _check(node: fx.Node, state: Coupling, kept: Kept) -> None:
    if node.target is operator.getitem or not isinstance(node.meta.get("val"), Tensor):
        return
    expected = [cut_extent(axis, kept) for axis in state.of(node)]
    for size, found in zip(expected, node.meta["val"].shape, strict=True):
        if isinstance(size, int) and size_hint(found) != size:
            shape = tuple(map(str, node.meta["val"].shape))
            raise PassError(codes.PASS_FAILED, f"{node.name} has shape {shape} after a cut", why=f"not {expected}")


def _check_varying(entry: Entry, node: fx.Node, varying: dict[sympy.Expr, torch.SymInt]) -> None:
    """A program and its clones share their symbols: one that inference fixes is lost in both, so types still agree."""
    for symbol, size in varying.items():
        if size_expression(size) != symbol:
            name = entry.symbols.get(str(symbol), str(symbol))
            what = f"the type of {node.name} after a cut fixes the size {name!r} to {size}"
            raise PassError(codes.PASS_FAILED, what, where=location(node), why="it varied before")
