"""Program: what sparc compiles. One store of weights, and one or more entry graphs over it.

A graph is a plain `torch.fx.Graph`: `placeholder` nodes are the tensor inputs, `get_attr` nodes name weights in the
store,
`call_function` nodes are ATen (or `sparc::`) operators, and every node carries its type in `meta["val"]` as a
FakeTensor. A
program never mutates a tensor: to change a weight is to put another tensor in the store, so clones share every tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sparc.cache import Cache, complete
from sparc.diag import Location
from sparc.execute import Watch, execute
from sparc.signature import Signature

if TYPE_CHECKING:
    from sparc.encoding.grid import Grid


@dataclass(frozen=True, eq=False)
class Weight:
    """A named constant of the program.

    Args:
        tensor: its value; never written in place.
        grid: the rounding grid the value lies on, if any.
        origins: the user's own names that this weight comes from (several after a merge).
        trainable: whether the user's model holds it as a parameter.
    """

    tensor: Tensor
    grid: "Grid | None" = None
    origins: tuple[str, ...] = ()
    trainable: bool = False


class WeightStore(Mapping[str, Tensor]):
    """Weights by name. As a mapping it gives tensors; `record(name)` gives the whole `Weight`.

    `aliases` maps each of the user's other names for a tied weight to the one name under which it is stored.
    """

    def __init__(self, records: Mapping[str, Weight] | None = None, aliases: Mapping[str, str] | None = None) -> None:
        self._records: dict[str, Weight] = dict(records or {})
        self.aliases: dict[str, str] = dict(aliases or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._records[name].tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, name: str) -> Weight:
        """The weight's tensor, grid and origins."""
        return self._records[name]

    def put(self, name: str, weight: Weight) -> None:
        """Store `weight` under `name`, replacing what was there."""
        self._records[name] = weight

    def remove(self, name: str) -> None:
        """Forget a weight."""
        del self._records[name]

    def clone(self) -> "WeightStore":
        """A store of its own over the same tensors."""
        return WeightStore(self._records, self.aliases)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.values())


@dataclass
class Entry:
    """One entry point: a graph, how it is called, and the symbolic world its types live in.

    Args:
        graph: placeholders are the tensor inputs in the order of `signature.input_names`.
        signature: names and structure of inputs and outputs.
        fake_mode: makes the FakeTensors in `meta["val"]`; its shape environment knows every symbol's range.
        symbols: the user's names of dynamic dimensions, by symbol (`{"s3": "batch"}`).
        cache: which outputs are the next call's inputs, for an entry that generates.
    """

    graph: fx.Graph
    signature: Signature
    fake_mode: FakeTensorMode
    symbols: dict[str, str] = field(default_factory=dict)
    cache: Cache | None = None

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, one per placeholder; what a cached entry needs may be left out (`sparc.cache`).

        Raises:
            ArtifactError: SPARC506 when a name, a structure, a type or a frozen value does not fit.
        """
        if self.cache is not None:
            args, kwargs = (), complete(self, args, kwargs)
        return self.signature.bind(args, kwargs)

    def clone(self) -> "Entry":
        """A copy whose nodes may be edited; node names and metadata are kept, tensors and symbols shared."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copies[node] = graph.node_copy(node, lambda used: copies[used])
            copies[node].meta = dict(node.meta)
        return replace(self, graph=graph)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node; `output.args[0]` is the flat list of results."""
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    def fake(self, tensor: Tensor) -> FakeTensor:
        """The type of a concrete tensor, in this entry's world, with static shape."""
        if tensor.device.type == "meta":
            tensor = torch.empty_like(tensor, device="cpu")
        return self.fake_mode.from_tensor(tensor.detach(), static_shapes=True)

    def infer(self, node: fx.Node) -> Any:
        """Compute and store the type of a `call_function` node from its arguments' types.

        Operators that are made of others are taken apart in Python, as `torch.export` does: C++ would fix sizes that
        vary (`interpolate`, `pad`).
        """
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        return node.meta["val"]

    def call(
        self, target: Any, *args: Any, before: fx.Node | None = None, like: fx.Node | None = None, **kwargs: Any
    ) -> fx.Node:
        """Insert a call of `target` and infer its type.

        Args:
            target: an operator overload, such as `torch.ops.aten.linear.default`.
            args: nodes and constants.
            before: the node to insert before; by default the node being inserted at (`graph.inserting_before`), or
                the end.
            like: the node whose module path and source line the new node inherits.
            kwargs: keyword arguments of the operator.
        """
        with self.graph.inserting_before(before) if before is not None else nullcontext():
            node = self.graph.call_function(target, args, kwargs)
        origin = like if like is not None else before
        if origin is not None:
            node.meta.update(
                {key: origin.meta[key] for key in ("module", "source", "type", "block") if key in origin.meta}
            )
        self.infer(node)
        return node


def location(node: fx.Node) -> Location:
    """Where in the user's model a node comes from."""
    return Location(str(node.meta.get("module", "")), str(node.meta.get("source", "")))


class Program:
    """A model as graphs over named weights; see the module's docstring."""

    def __init__(self, weights: WeightStore, entries: Mapping[str, Entry]) -> None:
        """Args: the weights, and the entries by name (the usual single entry is called `forward`)."""
        self.weights = weights
        self.entries: dict[str, Entry] = dict(entries)

    # entries --------------------------------------------------------------------------------------------------------
    @property
    def main(self) -> Entry:
        """The first entry."""
        return next(iter(self.entries.values()))

    def entry(self, name: str | None = None) -> Entry:
        """An entry by name; the first one by default."""
        return self.main if name is None else self.entries[name]

    @property
    def graph(self) -> fx.Graph:
        """The graph of the first entry."""
        return self.main.graph

    def entry_of(self, node: fx.Node) -> Entry:
        """The entry whose graph holds `node`."""
        return next(entry for entry in self.entries.values() if entry.graph is node.graph)

    def nodes(self) -> Iterator[tuple[Entry, fx.Node]]:
        """Every node of every entry; safe against edits while iterating."""
        for entry in self.entries.values():
            for node in list(entry.graph.nodes):
                yield entry, node

    # weights --------------------------------------------------------------------------------------------------------
    def weight(self, node: "fx.Node | str") -> Tensor | None:
        """The tensor a `get_attr` node (or a name) refers to; None when the node is computed."""
        if isinstance(node, str):
            return self.weights[node]
        return self.weights[str(node.target)] if is_weight(node) else None

    def grid(self, node: "fx.Node | str") -> "Grid | None":
        """The grid of a weight, if it has one."""
        name = node if isinstance(node, str) else str(node.target)
        return self.weights.record(name).grid if name in self.weights else None

    def set_weight(self, node: "fx.Node | str", tensor: Tensor, grid: "Grid | None" = None) -> None:
        """Replace a weight's value, for every use of it. Without `grid`, a grid it had is dropped.

        Args:
            node: a `get_attr` node or a weight's name.
            tensor: the new value; another shape or dtype re-types the `get_attr` nodes, their users must be
                re-inferred.
            grid: the grid the new value lies on.
        """
        name = node if isinstance(node, str) else str(node.target)
        old = self.weights.record(name)
        self.weights.put(name, replace(old, tensor=tensor, grid=grid))
        if old.tensor.shape != tensor.shape or old.tensor.dtype != tensor.dtype:
            for entry in self.entries.values():
                for use in weight_nodes(entry.graph, name):
                    use.meta["val"] = entry.fake(tensor)

    def add_weight(
        self, name: str, tensor: Tensor, like: fx.Node, grid: "Grid | None" = None, *, own: bool = False
    ) -> fx.Node:
        """Add a weight and return a node for it in the graph of `like`.

        Args:
            name: the wished name; a number is appended when it is taken. It may not lie under another weight's name.
            tensor: the value.
            like: a node of the graph to add it to; if it is a weight itself, the new one inherits its origins.
            grid: the grid the value lies on.
            own: it does not take another weight's place: it has a name of its own, and `like` is what it comes from.
        """
        record = self.weights.record(str(like.target)) if is_weight(like) else None
        unique, count = name, 0
        while unique in self.weights or any(known.startswith(unique + ".") for known in self.weights):
            count += 1
            unique = f"{name}_{count}"
        origins = record.origins if record is not None else ()
        if own:
            origins = (unique, *(origins or (str(like.target),)))
        self.weights.put(unique, Weight(tensor, grid, origins, record.trainable if record is not None else False))
        return self.weight_node(self.entry_of(like), unique)

    def weight_node(self, entry: Entry, name: str) -> fx.Node:
        """The entry's `get_attr` node of a weight, made if there is none yet."""
        for node in weight_nodes(entry.graph, name):
            return node
        anchor = next(node for node in entry.graph.nodes if node.op not in ("placeholder", "get_attr"))
        with entry.graph.inserting_before(anchor):
            node = entry.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        node.meta["val"] = entry.fake(self.weights[name])
        return node

    def rename_weight(self, old: str, new: str) -> None:
        """Give a weight another, free name."""
        self.weights.put(new, self.weights.record(old))
        self.weights.remove(old)
        for entry in self.entries.values():
            for node in weight_nodes(entry.graph, old):
                node.target = new

    def sweep(self) -> None:
        """Remove nodes without effect, and weights that no entry uses."""
        used: set[str] = set()
        for entry in self.entries.values():
            for node in reversed(list(entry.graph.nodes)):
                if node.op in ("call_function", "get_attr") and not node.users:
                    entry.graph.erase_node(node)
            used.update(str(node.target) for node in entry.graph.nodes if node.op == "get_attr")
        for name in [name for name in self.weights if name not in used]:
            self.weights.remove(name)

    # whole-program operations ---------------------------------------------------------------------------------------
    def clone(self) -> "Program":
        """A program that may be edited independently; tensors are shared."""
        return Program(self.weights.clone(), {name: entry.clone() for name, entry in self.entries.items()})

    def run(
        self, *args: Any, entry: str | None = None, wide: bool = False, watch: Watch | None = None, **kwargs: Any
    ) -> Any:
        """Run an entry in eager torch, called exactly like the model; stored state is never mutated.

        Args:
            args: positional inputs.
            entry: the entry's name; the first by default.
            wide: compute in float64.
            watch: called with every node, its value, and the values alive (see `execute`).
            kwargs: inputs by name.

        Raises:
            ArtifactError: SPARC506 when the inputs do not fit.
        """
        chosen = self.entry(entry)
        tensors = chosen.bind(args, kwargs)
        return chosen.signature.unflatten(self.run_flat(tensors, entry=entry, wide=wide, watch=watch))

    def run_flat(
        self, tensors: list[Tensor], *, entry: str | None = None, wide: bool = False, watch: Watch | None = None
    ) -> list[Any]:
        """Run an entry on one tensor per placeholder; returns the flat outputs."""
        return execute(self.entry(entry).graph, self.weights, tensors, wide=wide, watch=watch)

    def text(self) -> str:
        """The program as stable text; two equal programs print the same."""
        from sparc.text import program_text

        return program_text(self)

    def __str__(self) -> str:
        return self.text()

    def module(self, train: bool = False) -> "ProgramModule":
        """The program as an `nn.Module` whose parameters carry the user's own names (dots become nested modules).

        Args:
            train: make floating weights trainable parameters; otherwise they are buffers.
        """
        return ProgramModule(self, train)


class ProgramModule(nn.Module):
    """A program run as a module over its own parameters; made by `Program.module`."""

    def __init__(self, program: Program, train: bool) -> None:
        """Args: the program, and whether floating weights become trainable."""
        super().__init__()
        self._program = program
        for name, tensor in program.weights.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            if train and tensor.is_floating_point():
                owner.register_parameter(leaf, nn.Parameter(tensor.detach().clone()))
            else:
                owner.register_buffer(leaf, tensor.detach().clone())

    def to_program(self) -> Program:
        """The program with the module's present parameters and buffers, trained or not; values are copied, and grids
        are dropped.
        """
        program = self._program.clone()
        present = {**dict(self.named_buffers()), **dict(self.named_parameters())}
        for name in program.weights:
            program.set_weight(name, present[name].detach().clone())
        return program

    def forward(self, *args: Any, entry: str | None = None, **kwargs: Any) -> Any:
        """Call the program's entry like the model itself."""
        chosen = self._program.entry(entry)
        weights = {**dict(self.named_buffers()), **dict(self.named_parameters())}
        tensors = chosen.bind(args, kwargs)
        return chosen.signature.unflatten(execute(chosen.graph, weights, tensors, grad=torch.is_grad_enabled()))


def is_weight(node: Any) -> bool:
    """Whether a value is a node that names a weight."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def weight_nodes(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The `get_attr` nodes of `graph` that name a weight."""
    return graph.find_nodes(op="get_attr", target=name)
