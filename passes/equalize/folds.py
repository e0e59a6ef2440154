"""Channels that can be rescaled where they are written and where they are read, without an operator of their own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx

from sparc.analysis.features import carried_axis, packet, reads_shape_only
from sparc.analysis.values import shape_of
from sparc.passes.equalize.classes import ChannelClass, Classes, first_row, written
from sparc.passes.fold.norm import bias_of, uses, weight_reason
from sparc.passes.rotate.heads import Heads, find_heads
from sparc.passes.rotate.weights import Refusal, Store, name_of
from sparc.pattern import normalized_arguments
from sparc.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelFold:
    """Which rows of weights write each channel, and which columns read it.

    Args:
        size: how many channels.
        rows: weights and biases, and the first of the `size` rows that write.
        columns: the products, and the channel that each column of their weight reads, `[groups, columns]` int64 (one
            group but for convolutions in groups).
    """

    size: int
    rows: tuple[tuple[str, int], ...]
    columns: tuple[tuple[fx.Node, Tensor], ...]

    @property
    def readers(self) -> tuple[fx.Node, ...]:
        """The products."""
        return tuple(node for node, _ in self.columns)

    @property
    def weights(self) -> tuple[str, ...]:
        """All weights and biases that rescaling changes."""
        return (*(name for name, _ in self.rows), *(name_of(node.args[1]) for node in self.readers))


def class_fold(program: Program, found: ChannelClass) -> ChannelFold:
    """The fold of a class that is not frozen."""
    rows = [(name_of(weight), first_row(writer)) for writer in found.writers for weight in written(writer)]
    columns = []
    for reader in found.readers:
        width = program.weights[name_of(reader.args[1])].shape[1]
        columns.append((reader, torch.arange(found.size).reshape(-1, width)))
    return ChannelFold(found.size, tuple(rows), tuple(columns))


def rescalable(program: Program, selected: Iterable[fx.Node]) -> tuple[list[ChannelClass], dict[fx.Node, str]]:
    """The classes that some of the selected products read and that can be rescaled; why the others' input cannot be."""
    chosen, classes = set(selected), []
    refused: dict[fx.Node, str] = {}
    for entry in program.entries.values():
        found = Classes(program, entry.graph)
        refused.update((node, why) for node, why in found.closed.items() if node in chosen)
        for each in found:
            readers = [reader for reader in each.readers if reader in chosen]
            if readers and not each.frozen:
                classes.append(each)
            refused.update((reader, each.frozen) for reader in readers if each.frozen)
    return classes, refused


def rescale(store: Store, fold: ChannelFold, factor: Tensor) -> None:
    """Multiply what writes each channel by its factor, and divide the columns that read it.

    Args:
        store: the program's weights, which are edited.
        fold: where.
        factor: `[channels]` float64, positive.
    """
    for name, start in fold.rows:
        new = store[name].clone()
        rows = new[start : start + fold.size]
        rows *= factor.reshape(-1, *[1] * (new.ndim - 1))
        store.put(name, new)
    for node, channels in fold.columns:
        name = name_of(node.args[1])
        old, groups = store[name], channels.shape[0]
        each = factor[channels].unsqueeze(1).expand(-1, old.shape[0] // groups, -1).reshape(old.shape[:2])
        store.put(name, old / each.reshape(*old.shape[:2], *[1] * (old.ndim - 2)))


# values of attention --------------------------------------------------------------------------------------------------
def value_folds(program: Program) -> Iterator[ChannelFold]:
    """The values of every attention that one layer writes and one reads.

    An attention mixes places, not channels: `attention(q, k, v * s) = attention(q, k, v) * s`, with a factor for each
    feature of each head of values. Heads of queries that share one share its factors.
    """
    for _, node in program.nodes():
        if packet(node) is aten.scaled_dot_product_attention:
            try:
                yield value_fold(program, node)
            except Refusal:
                continue


def value_fold(program: Program, attention: fx.Node) -> ChannelFold:
    """The fold of one attention.

    Raises:
        Refusal: other weights than those of one writer and one reader are concerned, or they cannot be changed.
    """
    heads = find_heads(program, attention)
    bias = bias_of(heads.writer)
    weights = [heads.writer.args[1], *([] if bias is None else [bias]), heads.reader.args[1]]
    for weight, user in zip(weights, [heads.writer] * (len(weights) - 1) + [heads.reader], strict=True):
        if (reason := weight_reason(program, weight)) is not None:
            raise Refusal(reason)
        if list(uses(program, name_of(weight))) != [user]:
            raise Refusal("a weight is read elsewhere too")
    _check_heads(program, attention, heads)
    features = torch.arange(heads.rows).reshape(-1, heads.size)
    width = program.weights[name_of(heads.reader.args[1])].shape[1]
    channels = features.repeat_interleave(width // heads.rows, 0).reshape(1, -1)
    rows = tuple((name_of(weight), heads.start) for weight in weights[:-1])
    return ChannelFold(heads.rows, rows, ((heads.reader, channels),))


def _check_heads(program: Program, attention: fx.Node, heads: Heads) -> None:
    """See that the heads of the values are the attention's own, and the result's, each in order.

    Raises:
        Refusal: they are not, as far as can be seen.
    """
    value: fx.Node = normalized_arguments(attention)["value"]
    path = [value]
    while path[-1] is not heads.writer and shape_of(path[-1])[-1] == heads.size:
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    # path[-2] splits the features into heads, which are its last axis but one
    if heads.rows > heads.size and _moved(program, path[-2::-1], -2) != -3:
        raise Refusal("its heads are not those of its values")
    path = [attention]
    while shape_of(path[-1])[-1] == heads.size and heads.reader not in path[-1].users:
        path.append(next(user for user in path[-1].users if not reads_shape_only(user)))
    if shape_of(path[-1])[-1] > heads.size and _moved(program, path[:-1], -3) != -2:
        raise Refusal("its heads are not those of its result")


def _moved(program: Program, path: list[fx.Node], axis: int | None) -> int | None:
    """Where an axis of the first of some operators is in the last, each of which reads the one before."""
    for x, node in pairwise(path):
        axis = None if axis is None else carried_axis(program, node, x, axis)
    return axis
