"""Sites: the weights of a program that can be compressed, and how they are used."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparc.diag import Location
from sparc.encoding.operators import is_decode
from sparc.encoding.view import WeightView
from sparc.grouped import is_grouped_linear
from sparc.program import Program, is_weight, location

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass(frozen=True)
class Use:
    """One operator that reads the weight.

    Args:
        entry: the entry's name.
        node: the operator.
        argument: the weight's position among its arguments.
        operator: `linear`, `conv`, `conv_transposed`, `embedding`, `matmul` or `grouped`.
        view: how this operator reads it as matrices.
    """

    entry: str
    node: fx.Node
    argument: int
    operator: str
    view: WeightView

    @property
    def input(self) -> Any:
        """The activation the weight meets; None for an embedding."""
        if self.operator == "embedding":
            return None
        return self.node.args[1 if self.node.target is aten.addmm.default else 0]


@dataclass(frozen=True)
class Site:
    """A weight and all its uses, which agree on one view.

    Args:
        weight: its name; for an encoded weight, the name it had before.
        source: the node that provides it: a `get_attr`, or a `sparc::decode`, of the first entry that uses it.
        uses: every operator that reads it.
        origins: the user's names it comes from.
    """

    weight: str
    source: fx.Node
    uses: tuple[Use, ...]
    origins: tuple[str, ...] = field(default=())

    @property
    def operator(self) -> str:
        """The operator type of the first use."""
        return self.uses[0].operator

    @property
    def view(self) -> WeightView:
        """The common view."""
        return self.uses[0].view

    @property
    def encoded(self) -> bool:
        """Whether the weight is already encoded."""
        return is_decode(self.source)

    @property
    def location(self) -> Location:
        """Where in the user's model the first use is."""
        return location(self.uses[0].node)


@dataclass(frozen=True)
class NotASite:
    """A weight matrix that cannot be compressed, and why."""

    weight: str
    why: str
    where: Location = field(default_factory=Location)


def use_of(node: fx.Node, source: fx.Node, entry: str) -> Use | None:
    """How `node` reads the weight `source`; None when it is no use a view describes."""
    positions = [index for index, argument in enumerate(node.args) if argument is source]
    if len(positions) != 1 or source in node.kwargs.values():
        return None
    position = positions[0]
    found = _view_at(node, position)
    return Use(entry, node, position, *found) if found else None


def _view_at(node: fx.Node, position: int) -> tuple[str, WeightView] | None:
    target = node.target
    if target is aten.linear.default and position == 1:
        return "linear", WeightView("matrix")
    if target in _CONVOLUTIONS and position == 1:
        return "conv", WeightView("conv")
    if target is aten.convolution.default and position == 1:
        transposed, groups = node.args[6], node.args[8]
        return (
            ("conv_transposed", WeightView("conv_transposed", int(str(groups))))
            if transposed
            else ("conv", WeightView("conv"))
        )
    if target in _TRANSPOSED and position == 1:
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        return "conv_transposed", WeightView("conv_transposed", int(str(groups)))
    if target is aten.embedding.default and position == 0:
        return "embedding", WeightView("matrix")
    if target in (aten.mm.default, aten.matmul.default, aten.bmm.default) and position == 1:
        return "matmul", WeightView("transposed")
    if is_grouped_linear(node) and position == 1:
        return "grouped", WeightView("matrix")
    if target is aten.addmm.default and position == 2:
        return "matmul", WeightView("transposed")
    return None


def find_sites(program: Program) -> tuple[list[Site], list[NotASite]]:
    """Every compressible weight matrix in order of first use, and every other one with the reason why not."""
    sources: dict[str, list[tuple[str, fx.Node]]] = {}
    for name, entry in program.entries.items():
        for node in entry.graph.nodes:
            key = _weight_key(program, node)
            if key is not None:
                sources.setdefault(key, []).append((name, node))
    sites, others = [], []
    for key, nodes in sources.items():
        found = _site(program, key, nodes)
        if isinstance(found, Site):
            sites.append(found)
        elif found is not None:
            others.append(found)
    return sites, others


def _weight_key(program: Program, node: fx.Node) -> str | None:
    if is_weight(node):
        return str(node.target)
    if is_decode(node) and is_weight(node.args[0][0]):  # type: ignore[index]
        origins = program.weights.record(str(node.args[0][0].target)).origins  # type: ignore[index, union-attr]
        return origins[0] if origins else node.name
    return None


def _site(program: Program, key: str, nodes: list[tuple[str, fx.Node]]) -> Site | NotASite | None:
    tensor = nodes[0][1].meta["val"]
    if tensor.ndim < 2 or tensor.numel() < 2 or any(is_decode(user) for _, node in nodes for user in node.users):
        return None
    where = location(next(iter(nodes[0][1].users), nodes[0][1]))
    if not tensor.is_floating_point():
        return (
            NotASite(key, f"its dtype is {str(tensor.dtype).removeprefix('torch.')}", where)
            if key.endswith("weight")
            else None
        )
    uses = []
    for entry, node in nodes:
        for user in node.users:
            use = use_of(user, node, entry)
            if use is None:
                name = getattr(user.target, "_opname", None) or getattr(user.target, "__name__", user.op)
                return NotASite(key, f"it is also read by {name}, which no matrix view describes", location(user))
            uses.append(use)
    if not uses:
        return None
    if len({use.view for use in uses}) > 1:
        views = ", ".join(sorted({str(use.view) for use in uses}))
        return NotASite(key, f"its uses need different views ({views})", where)
    record = program.weights.record(str(nodes[0][1].target)) if is_weight(nodes[0][1]) else None
    origins = record.origins if record is not None else (key,)
    return Site(key, nodes[0][1], tuple(uses), origins or (key,))
