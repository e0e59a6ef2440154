"""From an entry's graph to the graph that runs.

Sites become operators, encoded embeddings gather rows, and what is left of decoding is done once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.codegen.encoded import match_encoded
from sparc.codegen.triton.carry import carry_codes
from sparc.codegen.triton.choice import Choose
from sparc.codegen.triton.operator import SiteOperator, token_range
from sparc.codegen.triton.operators import define, gather_rows, gathers
from sparc.codegen.triton.sites import buffers, find_products
from sparc.codegen.triton.tiles import LoweringType
from sparc.cost import Device
from sparc.diag import Diagnostics
from sparc.encoding.dense import Dense
from sparc.encoding.operators import is_decode
from sparc.program import Entry, Program, is_weight, location
from sparc.target import KernelUse

aten = torch.ops.aten
_SCRATCH = ("scratch.workspace", "scratch.counters")
_TOKENS = 1 << 16  # that scratch memory is made for where there is no bound; ranges of split sums end below


@dataclass
class Lowered:
    """An entry that runs.

    Args:
        graph: its graph; `get_attr` nodes name `tensors`.
        tensors: weights, buffers and scratch memory, by name.
        operators: of every site, by the name of the node it stands for.
        uses: what carries every compressed weight, by its original name.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor] = field(default_factory=dict)
    operators: dict[str, SiteOperator] = field(default_factory=dict)
    uses: dict[str, KernelUse] = field(default_factory=dict)


def lower(
    program: Program,
    entry: Entry,
    device: Device,
    extensions: Mapping[str, LoweringType],
    diagnostics: Diagnostics,
    choose: Choose,
) -> Lowered:
    """Lower an entry for a device; `choose` says what serves a site."""
    lowering = _Lowering(program, entry.clone(), device, diagnostics)
    lowering.sites(extensions, choose)
    lowering.decodes()
    lowering.finish()
    return lowering.made


class _Lowering:
    def __init__(self, program: Program, entry: Entry, device: Device, diagnostics: Diagnostics) -> None:
        self.program, self.entry, self.device, self.diagnostics = program, entry, device, diagnostics
        self.made = Lowered(entry.graph)
        self.sizes = [(0, 0)]
        self.why: dict[fx.Node, str] = {}
        self.now: dict[fx.Node, fx.Node] = {}  # what stands for a node that was replaced

    # sites ------------------------------------------------------------------------------------------------------------
    def sites(self, extensions: Mapping[str, LoweringType], choose: Choose) -> None:
        """Replace every product that a kernel serves."""
        carry_codes(self.entry)
        found, missed = find_products(self.program, self.entry, extensions, self.device.flops)
        self.why = {each.node: each.why for each in missed}
        made: list[tuple[SiteOperator, int | None]] = []
        for site in found:
            low, high = token_range(site)
            chosen = choose(site, low, high)
            dense = isinstance(site.weights[0].encoding, Dense)
            if dense and all(regime.configuration is None for regime in chosen):
                continue
            made.append((SiteOperator(site, chosen), high))
        for operator, high in made:  # only now: a site is described by nodes that replacing another one changes
            self._replace(operator, high)

    def _replace(self, operator: SiteOperator, high: int | None) -> None:
        site, graph = operator.site, self.entry.graph
        name = "+".join(site.names)
        self.sizes.append(operator.scratch_sizes(min(high or _TOKENS, _TOKENS)))
        laid = buffers(site)
        with graph.inserting_before(site.place):
            held = [self._tensor(f"{name}.{index}", tensor) for index, tensor in enumerate(laid)]
            given: list[Any] = [self._operand(name, index, each) for index, each in enumerate(site.operands)]
            scratch = [self._attribute(each) for each in _SCRATCH]
            call = graph.call_function(define(operator), (self.now.get(site.x, site.x), held, given, scratch))
            call.meta = dict(site.result.meta)
            if site.parallel:
                self._slice(site.anchors, call)
            else:
                self._stands_for(site.result, call)
        self.made.operators[site.place.name] = operator
        self._account(operator, laid)

    def _slice(self, anchors: Sequence[fx.Node], call: fx.Node) -> None:
        start = 0
        for anchor in anchors:
            size = anchor.meta["val"].shape[-1]
            piece = self.entry.graph.call_function(aten.slice.Tensor, (call, -1, start, start + size))
            piece.meta = dict(anchor.meta)
            self._stands_for(anchor, piece)
            start += size

    def _stands_for(self, node: fx.Node, other: fx.Node) -> None:
        node.replace_all_uses_with(other)
        self.now[node] = other

    def _operand(self, name: str, index: int, given: fx.Node | tuple[fx.Node, ...]) -> fx.Node:
        if isinstance(given, fx.Node):
            return self.now.get(given, given)
        stacked = torch.cat([self.program.weights[str(each.target)] for each in given])
        return self._tensor(f"{name}.{given[0].name}.{index}", stacked)

    def _account(self, operator: SiteOperator, laid: Sequence[Tensor]) -> None:
        """What the report says of each of the site's weights."""
        site = operator.site
        if site.note:
            what = f"the activation of {'+'.join(site.names)} is decoded before the product"
            self.diagnostics.remark(codes.FLOAT_PRODUCT, what, where=location(site.anchors[0]), why=site.note)
        heights = [str(each.configuration.block_tokens) for each in operator.regimes if each.configuration is not None]
        text = f"product ({', '.join(heights)} tokens)" if heights else "decode, then torch"
        for weight in site.weights:
            for name in weight.names:
                share = sum(tensor.nbytes for tensor in laid) // len(site.names)
                if not isinstance(weight.encoding, Dense):
                    self.made.uses[name] = KernelUse(text, share, site.note)

    # what is left of decoding ---------------------------------------------------------------------------------------
    def decodes(self) -> None:
        """Decode what no kernel reads: rows as they are gathered, everything else once."""
        self.entry.graph.eliminate_dead_code()
        for node in list(self.entry.graph.nodes):
            encoded = match_encoded(self.program, node) if is_decode(node) else None
            if encoded is None:
                continue
            parts = list(encoded.tensors(self.program).values())
            rows = encoded.shape[0]
            spec, size = str(encoded.spec), sum(part.nbytes for part in parts)
            simple = str(encoded.view) == "matrix" and len(encoded.shape) == 2 and gathers(spec, parts, rows)
            for user in list(node.users):
                if simple and user.target is aten.embedding.default and user.args[0] is node:
                    self._gather(node, user, spec, encoded)
                    self.made.uses.setdefault(encoded.site, KernelUse("gather_rows", size))
            if node.users:
                self._keep_dense(node, encoded.site)

    def _gather(self, node: fx.Node, user: fx.Node, spec: str, encoded: Any) -> None:
        with self.entry.graph.inserting_before(user):
            arguments = (list(node.args[0]), user.args[1], spec, encoded.shape[1], encoded.dtype)  # type: ignore[arg-type]
            call = self.entry.graph.call_function(gather_rows._opoverload, arguments)
        call.meta = dict(user.meta)
        user.replace_all_uses_with(call)
        self.entry.graph.erase_node(user)

    def _keep_dense(self, node: fx.Node, name: str) -> None:
        parts = [self.program.weights[str(part.target)] for part in node.args[0]]  # type: ignore[union-attr]
        dense: Tensor = node.target(parts, *node.args[1:])  # type: ignore[operator]
        with self.entry.graph.inserting_before(node):
            held = self._tensor(f"{name}.dense", dense)
        node.replace_all_uses_with(held)
        reader = next(iter(held.users))
        why = self.why.get(reader, f"{reader.target} has no template")
        self.diagnostics.remark(
            codes.LEFT_TO_TORCH, f"{name} is decoded once and kept dense", where=location(reader), why=why
        )
        self.made.uses[name] = KernelUse("dense, torch", dense.nbytes, why)

    # tensors ----------------------------------------------------------------------------------------------------------
    def _tensor(self, name: str, tensor: Tensor) -> fx.Node:
        self.made.tensors[name] = tensor
        return self._attribute(name)

    def _attribute(self, name: str) -> fx.Node:
        return self.entry.graph.create_node("get_attr", name)

    def finish(self) -> None:
        """Allocate scratch memory; keep the weights that are still read."""
        graph = self.entry.graph
        graph.eliminate_dead_code()
        workspace, counters = (max(each[axis] for each in self.sizes) for axis in (0, 1))
        self.made.tensors[_SCRATCH[0]] = torch.zeros(max(workspace, 1))
        self.made.tensors[_SCRATCH[1]] = torch.zeros(max(counters, 1), dtype=torch.int32)
        for node in graph.nodes:
            if is_weight(node) and str(node.target) not in self.made.tensors:
                self.made.tensors[str(node.target)] = self.program.weights[str(node.target)]
