"""Causal attention where a sequence starts with a constant prompt."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparc.analysis.elements import index_symbols, mask_condition
from sparc.analysis.features import operator_name, packet
from sparc.analysis.logic import at_least_zero
from sparc.analysis.values import is_deterministic, same_size, scalar_value, shape_of, tensor_type
from sparc.passes.canonicalize.scores import LOW
from sparc.passes.fold.rows import is_pointwise
from sparc.passes.fold.sequence import END, Sequence, Split
from sparc.pattern import normalized_arguments
from sparc.program import Program

aten = torch.ops.aten

BIDIRECTIONAL = "attention is not causal: what stands at the prompt depends on what follows it"


@dataclass
class PromptedSequence(Sequence):
    """A sequence whose attention is divided as well.

    Attributes:
        refused: attentions at the prompt that were not, with the reason.
    """

    refused: dict[fx.Node, str] = field(default_factory=dict)
    _lower: fx.Node | None = None

    @property
    def attentions(self) -> list[fx.Node]:
        """The attentions at the prompt that were divided."""
        attention = aten.scaled_dot_product_attention
        return [node for node, split in self.parts.items() if packet(node) is attention and split.learned]

    def operator(self, node: fx.Node) -> Split | None:
        """Attention; the rest is done place by place."""
        return self._attention(node) if packet(node) is aten.scaled_dot_product_attention else super().operator(node)

    def _attention(self, node: fx.Node) -> Split | None:
        """The prompt attends to itself, the rest to both; only where no place of the prompt looks behind the prompt."""
        arguments = normalized_arguments(node)
        given = [arguments[name] for name in ("query", "key", "value")]
        if given[0] not in self.parts:  # the prompt asks nothing: its keys and values are joined with the rest
            return None
        learned = any(each in self.parts and self.parts[each].learned for each in given)
        why, fronts = self._visible(node, arguments)
        if why:
            if learned:
                self.refused[node] = why
            return None
        q, k, v = (self.parts[each] for each in given)
        options = {name: arguments[name] for name in ("scale", "enable_gqa") if arguments[name]}
        own = self._front_mask(node, fronts)
        front_options = options if own is not None else {"is_causal": True, **options}
        front = self.call(node, node.target, q.front, k.front, v.front, *([own] if fronts else []), **front_options)
        key, value = self.whole(given[1], node, "prompt_key"), self.whole(given[2], node, "prompt_value")
        rest = self.call(node, node.target, q.rest, key, value, self._rest_mask(node, arguments, q), **options)
        return Split(q.axis, front, rest, learned)

    def _visible(self, node: fx.Node, arguments: dict[str, Any]) -> tuple[str, list[fx.Node]]:
        """Why attention cannot be divided (else empty), and what the prompt sees of itself by other conditions."""
        given = [self.parts.get(arguments[name]) for name in ("query", "key", "value")]
        if any(each is None or each.axis != len(shape_of(node)) - 2 for each in given):
            return "its keys and values do not begin with the prompt, or depend on the inputs there", []
        if not is_deterministic(node):
            return "attention drops elements at random", []
        if arguments["is_causal"]:
            return "", []
        if arguments["attn_mask"] is None:
            return BIDIRECTIONAL, []
        causal, fronts = False, []
        for each in _conditions(self.program, arguments["attn_mask"]):
            rank = len(shape_of(each))
            if rank >= 2 and mask_condition(self.program, each, LOW) == _causal(rank):
                causal = True
            elif (corner := self._corner(each)) is not None:
                fronts.append(corner)
            else:
                return f"what {operator_name(each)} hides from the prompt is not known", []
        return ("" if causal else BIDIRECTIONAL), fronts

    def _corner(self, mask: fx.Node) -> fx.Node | None:
        """`[..., count or 1, count or 1]`: a mask for queries and keys at the prompt; None when it is not constant."""
        split, kind = self.parts.get(mask), tensor_type(mask)
        if split is not None:
            other = len(shape_of(mask)) - 1 if split.axis == len(shape_of(mask)) - 2 else len(shape_of(mask)) - 2
            return split.front if other < 0 or same_size(shape_of(mask)[other], 1) else None
        if kind is None or not is_pointwise(mask):
            return None
        corners = {}
        for each in mask.all_input_nodes:
            single = all(same_size(size, 1) for size in shape_of(each)[-2:])
            corner = self.constants.of(each) if single else self._corner(each)
            if corner is None:
                return None
            corners[each] = corner
        args, kwargs = fx.node.map_arg((mask.args, mask.kwargs), lambda used: corners[used])
        return self.call(mask, mask.target, *args, **kwargs)

    def _front_mask(self, node: fx.Node, fronts: list[fx.Node]) -> fx.Node | None:
        """`[..., count, count]` bool: what the prompt sees of itself; None for all that is not behind."""
        if not fronts:
            return None
        ones = self.call(node, aten.ones.default, [self.count, self.count], dtype=torch.bool)
        mask = self.call(node, aten.tril.default, ones)
        for each in fronts:
            mask = self.call(node, aten.logical_and.default, mask, each)
        return mask

    def _rest_mask(self, node: fx.Node, arguments: dict[str, Any], q: Split) -> fx.Node:
        """`[..., rest, total]`: the rows of the mask behind the prompt."""
        mask = arguments["attn_mask"]
        if mask is not None:
            return self.call(node, aten.slice.Tensor, mask, len(shape_of(mask)) - 2, self.count, END)
        if self._lower is None:
            size = self.size(node, q.rest, q.axis)
            total = self.count + size if isinstance(size, int) else self.call(node, operator.add, size, self.count)
            keys = self.call(node, aten.unsqueeze.default, self.call(node, aten.arange.default, total), 0)
            places = self.call(node, aten.arange.start, self.count, total)
            queries = self.call(node, aten.unsqueeze.default, places, 1)
            self._lower = self.call(node, aten.le.Tensor, keys, queries)
        return self._lower


def _causal(rank: int) -> Any:
    symbols = index_symbols(rank)
    return at_least_zero(symbols[-2] - symbols[-1])


def _conditions(program: Program, mask: fx.Node) -> Iterator[fx.Node]:
    """The conditions that must all hold for a mask to let a key be seen."""
    if packet(mask) in (aten.__and__, aten.bitwise_and, aten.logical_and):
        for each in mask.args[:2]:
            yield from _conditions(program, each)  # type: ignore[arg-type]
        return
    if packet(mask) is aten.where:
        yes, no = (scalar_value(program, each) for each in mask.args[1:3])
        if yes == 0 and no is not None and no <= LOW:
            yield from _conditions(program, mask.args[0])  # type: ignore[arg-type]
            return
    yield mask
