"""A cache in buffers of fixed length that grow in place, for entries that run in torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparc.cache import Cache, empty_slots
from sparc.program import Entry

RunStatic = Callable[[Sequence[Any]], list[Any]]
_CAT = torch.ops.aten.cat.default


def in_place(graph: fx.Graph, cache: Cache, inputs: Sequence[str], outputs: Sequence[str]) -> fx.Graph | None:
    """The graph on buffers: `present = cat([past, new])` becomes `buffer[length : length + seq] = new`.

    It takes a buffer in the place of every slot and, as last input, the number of places used; it returns the other
    outputs only. So written, torch.compile keeps the buffers where they are.

    Args:
        graph: an entry's graph, or what a target made of it; not edited.
        cache: the entry's.
        inputs: the names of its placeholders, in order.
        outputs: the names of its results, in order.

    Returns:
        None when a slot grows in another way.
    """
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    given = dict(zip(inputs, graph.find_nodes(op="placeholder"), strict=True))
    results = dict(zip(outputs, _output(graph).args[0], strict=True))  # type: ignore[arg-type]
    growing: dict[fx.Node, tuple[fx.Node, int]] = {}
    for slot in cache.slots:
        grown = results[slot.output]
        if not isinstance(grown, fx.Node) or not _appends(grown, given[slot.input], slot.axis):
            return None
        growing[grown] = given[slot.input], slot.axis
    axes = {past: axis for past, axis in growing.values()}
    buffers = {node: made.placeholder(node.name) for node in given.values()}
    length = made.placeholder("length")
    for node in graph.nodes:
        if node.op == "placeholder":
            buffer = buffers[node]
            copies[node] = made.call_function(torch.narrow, (buffer, axes[node], 0, length)) if node in axes else buffer
        elif node in growing:
            past, axis = growing[node]
            copies[node] = made.call_function(append, (buffers[past], copies[node.args[0][1]], length, axis))
        elif node.op == "output":
            slots = {slot.output for slot in cache.slots}
            made.output([copies[results[name]] for name in outputs if name not in slots])  # type: ignore[index]
        else:
            copies[node] = made.node_copy(node, lambda used: copies[used])
    return made


def append(buffer: Tensor, new: Tensor, length: int, axis: int) -> Tensor:
    """Write `new` behind the first `length` places of `buffer`; returns what is in use."""
    count = new.shape[axis]
    buffer.narrow(axis, length, count).copy_(new)
    return buffer.narrow(axis, 0, length + count)


def _appends(grown: fx.Node, past: fx.Node, axis: int) -> bool:
    if grown.target is not _CAT or len(grown.args[0]) != 2 or grown.args[0][0] is not past:  # type: ignore[arg-type,index]
        return False
    given = grown.args[1] if len(grown.args) > 1 else grown.kwargs.get("dim", 0)
    return int(given) % past.meta["val"].ndim == axis  # type: ignore[arg-type,no-any-return]


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


class StaticCache:
    """A `CachedRun` over buffers (`sparc.generation.session`)."""

    def __init__(self, entry: Entry, run: RunStatic, batch: int, length: int, device: str = "cpu") -> None:
        """Args: an entry with a cache, what runs its graph made by `in_place`, how many sequences and places."""
        assert entry.cache is not None
        self._run, self._device = run, device
        slots = set(entry.cache.inputs)
        self._inputs = entry.signature.input_names
        self._outputs = [name for name in entry.signature.output_names if name not in _slot_outputs(entry.cache)]
        buffers = [each.to(device) for each in empty_slots(entry, batch, length)]
        self._buffers = dict(zip(entry.cache.inputs, buffers, strict=True))
        self._source = dict.fromkeys(entry.cache.source, (torch.empty(0), torch.empty(0)))
        self._tokens = next(name for name in self._inputs if name not in slots)
        self.length = 0

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0

    def cut(self, places: int) -> None:
        """Keep the first `places` places only."""
        self.length = places

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on every input that is no slot; returns every output that is none."""
        given = {name: self._placed(name, tensor) for name, tensor in tensors.items()} | self._buffers
        results = self._run([*(given[name] for name in self._inputs), self.length])
        self.length += tensors[self._tokens].shape[1]
        return dict(zip(self._outputs, results, strict=True))

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor on the device; what an encoder made is the same in every call, and copied once."""
        if name not in self._source:
            return tensor.to(self._device)
        if self._source[name][0] is not tensor:
            self._source[name] = tensor, tensor.to(self._device)
        return self._source[name][1]


def _slot_outputs(cache: Cache) -> set[str]:
    return {slot.output for slot in cache.slots}
