"""Encoding: what lies on a grid is stored in few bytes and decoded where it is used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc.analysis.sites import Site
from sparc.contract import Exact
from sparc.encoding.grid import Grid
from sparc.encoding.operators import encode_weight, spec_name
from sparc.encoding.view import WeightView
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Entry, Program, weight_nodes


@dataclass(frozen=True)
class Encode(Pass):
    """f(x, w) => f(x, decode(parts)), for every weight w that lies on a grid; bitwise exact."""

    name: ClassVar[str] = "encode"
    stage: ClassVar[Stage] = Stage.ENCODE

    @property
    def contract(self) -> Exact:
        """Nothing changes."""
        return Exact()

    def run(self, program: Program, context: PassContext) -> None:
        """Encode every selected site that lies on a grid."""
        for site in context.sites(program):
            grid = program.grid(site.weight)
            if grid is None:
                continue
            parts = encode_weight(program.weights[site.weight], grid)
            if not torch.equal(decode_parts(parts, grid, program.weights[site.weight]), program.weights[site.weight]):
                context.skip(site.weight, f"its value does not lie on its grid {grid.spec}", site.location)
            elif context.edit():
                encode_site(program, site, grid, parts)


def decode_parts(parts: dict[str, Tensor], grid: Grid, like: Tensor) -> Tensor:
    """The weight that the parts stand for, in the shape and dtype of `like`."""
    view = WeightView.parse(grid.view)
    return view.from_matrix(grid.spec.decode(parts, view.matrix_shape(like.shape), like.dtype), like.shape)


def encode_site(program: Program, site: Site, grid: Grid, parts: dict[str, Tensor]) -> None:
    """Replace a weight by its parts, and every entry's node for it by a decode of them."""
    record = program.weights.record(site.weight)
    if not record.origins:
        program.weights.put(site.weight, replace(record, origins=(site.weight,)))
    names = [
        str(program.add_weight(f"{site.weight}_{name}", parts[name], like=_weight_node(program, site)).target)
        for name in grid.spec.part_names
    ]
    literals = (spec_name(grid.spec), grid.view, list(record.tensor.shape), record.tensor.dtype)
    for entry in program.entries.values():
        for node in weight_nodes(entry.graph, site.weight):
            _decode_in(program, entry, node, names, literals)


def _weight_node(program: Program, site: Site) -> fx.Node:
    return weight_nodes(program.entries[site.uses[0].entry].graph, site.weight)[0]


def _decode_in(program: Program, entry: Entry, node: fx.Node, names: Sequence[str], literals: tuple[Any, ...]) -> None:
    parts = [program.weight_node(entry, name) for name in names]
    users = set(node.users)
    first = next(user for user in entry.graph.nodes if user in users)
    decoded = entry.call(torch.ops.sparc.decode.default, parts, *literals, before=first)
    node.replace_all_uses_with(decoded)
    entry.graph.erase_node(node)
