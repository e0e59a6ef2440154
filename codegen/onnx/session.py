"""An entry that is called again and again, its cache kept where ONNX Runtime computes."""

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import Tensor

from sparc import codes
from sparc.cache import TOKENS, Cache
from sparc.codegen.onnx.batch import row_by_row
from sparc.codegen.onnx.runtime import OnnxRunner, first_line, to_runtime
from sparc.diag import ArtifactError, LoweringError

_ATTENTION, _PAST, _PRESENT = "GroupQueryAttention", (3, 4), (1, 2)


class CacheSession:
    """Calls without the cache; it grows by as many places as each call has tokens.

    Where `GroupQueryAttention` alone reads the cache, it lies in buffers of a fixed length and nothing is copied;
    else tensors are passed from call to call.
    """

    def __init__(self, runner: OnnxRunner, model: onnx.ModelProto, cache: Cache, batch: int, length: int) -> None:
        """Open it, empty.

        Args:
            runner: runs the model.
            model: the model.
            cache: its cache.
            batch: how many sequences.
            length: how many places the cache gets at most.
        """
        self._runner, self._cache, self._batch, self._limit = runner, cache, batch, length
        self._rows = row_by_row(model)
        self._in_place = keeps_cache_in_place(model, cache)
        self._names = [value.name for value in model.graph.input]
        self._outputs = [value.name for value in model.graph.output]
        self._shapes = {value.name: value.type.tensor_type for value in model.graph.input}
        self._slots = self._empty(length if self._in_place else 0)
        self._given = [name for name in self._names if name not in self._slots]
        grown = {slot.output for slot in cache.slots}
        self._results = [name for name in self._outputs if name not in grown]
        self._whole = self._bind(slice(None)) if self._in_place else None
        self._length = 0

    @property
    def length(self) -> int:
        """How many places are used."""
        return self._length

    def reset(self) -> None:
        """Forget everything."""
        self.cut(0)

    def cut(self, places: int) -> None:
        """Forget all but the first places.

        Raises:
            ArtifactError: SPARC506 when there are fewer.
        """
        if not 0 <= places <= self._length:
            raise ArtifactError(codes.CALL_MISMATCH, f"the cache holds {self._length} places, not {places}")
        self._length = places
        if not self._in_place:
            axes = {slot.input: slot.axis for slot in self._cache.slots}
            self._slots = {name: each.narrow(axes[name], 0, places) for name, each in self._slots.items()}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs but for the cache.

        Args:
            tensors: the inputs but for the cache; the mask `[batch, length + new]` covers what is cached as well.

        Raises:
            ArtifactError: SPARC506 when an input is missing, has another batch, or does not fit into the cache.
            LoweringError: SPARC406 when the runtime fails.
        """
        tokens = tensors.get(TOKENS)
        missing = [name for name in self._given if name not in tensors]
        if tokens is None or missing:
            raise ArtifactError(codes.CALL_MISMATCH, f"inputs {', '.join(missing)} are missing")
        if tokens.shape[0] != self._batch:
            raise ArtifactError(codes.CALL_MISMATCH, f"{TOKENS} has {tokens.shape[0]} rows, not {self._batch}")
        if self._length + tokens.shape[1] > self._limit:
            why = f"{self._length} are used, and {tokens.shape[1]} are to come"
            raise ArtifactError(codes.CALL_MISMATCH, f"the cache holds {self._limit} places", why=why)
        given = {name: tensors[name] for name in self._given}
        results = self._write(given) if self._in_place else self._pass_on(given)
        self._length += tokens.shape[1]
        return results

    def _pass_on(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A call whose cache goes in and out."""
        inputs = [given[name] if name in given else self._slots[name] for name in self._names]
        results = dict(zip(self._outputs, self._runner(inputs), strict=True))
        self._slots = {slot.input: results.pop(slot.output) for slot in self._cache.slots}
        return results

    def _write(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A call whose cache is written where it lies."""
        if self._rows is None or not self._rows.needed(given):
            return self._run(self._whole, given)
        bindings = [self._bind(slice(row, row + 1)) for row in range(self._batch)]
        parts = [self._run(binding, self._rows.row(given, row)) for row, binding in enumerate(bindings)]
        return self._rows.join(parts)

    def _bind(self, rows: slice) -> Any:
        """A binding of some sequences' cache, in and out; the other outputs come behind it."""
        binding = self._runner.session.io_binding()
        for slot in self._cache.slots:
            value = to_runtime(self._slots[slot.input][rows])
            binding.bind_ortvalue_input(slot.input, value)
            binding.bind_ortvalue_output(slot.output, value)
        return binding

    def _run(self, binding: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on the inputs beside the cache."""
        for name, tensor in given.items():
            binding.bind_ortvalue_input(name, to_runtime(tensor))
        for name in self._results:
            binding.bind_output(name)
        try:
            self._runner.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises a class per status code, all of them plain Exceptions
            what = "ONNX Runtime failed while running the model"
            raise LoweringError(codes.RUNTIME_REJECTED, what, why=first_line(error)) from None
        values = binding.get_outputs_as_ortvaluevector()  # get_outputs() makes an object of every slot of the cache
        first = len(self._cache.slots)
        return {name: self._runner.result(name, values[at]) for at, name in enumerate(self._results, first)}

    def _empty(self, length: int) -> dict[str, Tensor]:
        made = {}
        for slot in self._cache.slots:
            shape = [dim.dim_value for dim in self._shapes[slot.input].shape.dim]
            shape[0], shape[slot.axis] = self._batch, length
            dtype = onnx.helper.tensor_dtype_to_np_dtype(self._shapes[slot.input].elem_type)
            made[slot.input] = torch.zeros(shape, dtype=getattr(torch, dtype.name))
        return made


def keeps_cache_in_place(model: onnx.ModelProto, cache: Cache) -> bool:
    """Whether every tensor of the cache is read and grown by one `GroupQueryAttention`, and by nothing else."""
    slots = {slot.input: slot.output for slot in cache.slots}
    kept = set()
    for node in model.graph.node:
        grown: dict[str, Any] = {}
        if node.op_type == _ATTENTION:
            grown = {node.input[past]: node.output[at] for past, at in zip(_PAST, _PRESENT, strict=True)}
        if any(name in slots and grown.get(name) != slots[name] for name in node.input):
            return False
        kept |= grown.keys() & slots.keys()
    return kept == slots.keys()
