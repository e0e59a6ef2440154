"""Running an emitted model in ONNX Runtime: tensors in, tensors out, weights never copied."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sparc import codes
from sparc.cache import TOKENS
from sparc.codegen.onnx.batch import row_by_row
from sparc.codegen.onnx.store import is_packed, raw_bytes, read_by
from sparc.codegen.onnx.types import onnx_type, torch_type
from sparc.diag import LoweringError
from sparc.target import StoredTensor

if TYPE_CHECKING:
    import onnxruntime

_QUIET = 3
NO_SPIN = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}
"""Session entries under which idle threads sleep, and take no time from another session's."""


def import_runtime() -> Any:
    """The onnxruntime module.

    Raises:
        LoweringError: SPARC405 when it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise LoweringError(codes.RUNTIME_MISSING, "onnxruntime cannot be imported", why=str(error)) from None
    return onnxruntime


def _hint(model: onnx.ModelProto, cuda: bool) -> str:
    """What to do about a model that is refused: on CPUs ONNX Runtime has hardly a kernel of bfloat16."""
    values = [*model.graph.input, *model.graph.output]
    narrow = any(value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for value in values)
    narrow = narrow or any(each.data_type == onnx.TensorProto.BFLOAT16 for each in model.graph.initializer)
    return "ONNX Runtime's CPU has few kernels of bfloat16: compile model.float()" if narrow and not cuda else ""


def has_cuda() -> bool:
    """Whether ONNX Runtime has its CUDA provider here."""
    return "CUDAExecutionProvider" in import_runtime().get_available_providers()


class OnnxRunner:
    """A session over one emitted model; called with one tensor per input, it returns one per output."""

    def __init__(
        self,
        model: onnx.ModelProto,
        stored: Mapping[str, StoredTensor],
        *,
        threads: int | None = None,
        cuda: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Open the session.

        Args:
            model: the model, whose external initializers are stored tensors.
            stored: those, by name; the session reads their memory.
            threads: threads of one operator; ONNX Runtime's own choice by default.
            cuda: prefer the CUDA provider.
            options: session configuration entries.

        Raises:
            LoweringError: SPARC405 without ONNX Runtime, SPARC406 when it refuses the model.
        """
        runtime = import_runtime()
        settings = runtime.SessionOptions()
        settings.log_severity_level = _QUIET
        if threads is not None:
            settings.intra_op_num_threads = threads
            settings.inter_op_num_threads = 1
        for key, value in (options or {}).items():
            settings.add_session_config_entry(key, value)
        bare, self._kept = _attach(model, stored, settings, runtime)
        providers = (["CUDAExecutionProvider"] if cuda else []) + ["CPUExecutionProvider"]
        try:
            self.session = runtime.InferenceSession(bare.SerializeToString(), settings, providers=providers)
        except Exception as error:  # ONNX Runtime raises a class per status code, all of them plain Exceptions
            raise LoweringError(
                codes.RUNTIME_REJECTED, "ONNX Runtime refused the model", why=first_line(error), hint=_hint(model, cuda)
            ) from None
        self._rows = row_by_row(model)
        self._inputs = [value.name for value in model.graph.input]
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._booleans = {value.name for value in self.session.get_outputs() if value.type == "tensor(bool)"}
        self._device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run on one tensor per input.

        Raises:
            LoweringError: SPARC406 when the runtime fails.
        """
        given = dict(zip(self._inputs, inputs, strict=True))
        if self._rows is None or not self._rows.needed(given):
            return list(self._run(given).values())
        parts = [self._run(self._rows.row(given, row)) for row in range(given[TOKENS].shape[0])]
        return list(self._rows.join(parts).values())

    def _run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feeds = {name: to_runtime(tensor) for name, tensor in given.items()}
        try:
            if self._device == "cuda":
                results = self._run_bound(feeds)
            else:
                results = self.session.run_with_ort_values(self._outputs, feeds)
        except Exception as error:  # as above
            raise LoweringError(
                codes.RUNTIME_REJECTED, "ONNX Runtime failed while running the model", why=first_line(error)
            ) from None
        return {name: self.result(name, value) for name, value in zip(self._outputs, results, strict=True)}

    def result(self, name: str, value: Any) -> Tensor:
        """An output that ONNX Runtime computed, as a tensor over the same memory; booleans come as bytes."""
        tensor: Tensor = from_dlpack(value.__dlpack__())
        return tensor.view(torch.bool) if name in self._booleans else tensor

    def _run_bound(self, feeds: Mapping[str, "onnxruntime.OrtValue"]) -> list[Any]:
        """Inputs stay where they are; outputs stay on the device until they are read."""
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cuda")
        self.session.run_with_iobinding(binding)
        return list(binding.get_outputs())


def _attach(
    model: onnx.ModelProto, stored: Mapping[str, StoredTensor], settings: Any, runtime: Any
) -> tuple[onnx.ModelProto, list[Any]]:
    """The model with its external tensors handed to the session as memory; packed types are embedded."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    names, values = [], []
    for tensor in bare.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        held = read_by(tensor.name, stored)
        if is_packed_type(tensor.data_type) or held.numel() == 0:
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
            tensor.raw_data = raw_bytes(held)
        else:
            names.append(tensor.name)
            values.append(to_runtime(_read_as(held, tensor.data_type).reshape(tuple(tensor.dims))))
    if names:
        settings.add_external_initializers(names, values)
    return bare, values


def _read_as(held: Tensor, data_type: int) -> Tensor:
    """The same bytes as another type, of the same size, where an initializer reads them so."""
    import onnx_ir as ir

    wanted = ir.DataType(data_type)
    return held if onnx_type(held.dtype) == wanted else held.view(torch_type(wanted))


def is_packed_type(data_type: int) -> bool:
    """Whether elements of an ONNX type share bytes."""
    import onnx_ir as ir

    return is_packed(ir.DataType(data_type))


def to_runtime(tensor: Tensor) -> "onnxruntime.OrtValue":
    """A tensor as ONNX Runtime's value, over the same memory where that can be."""
    runtime = import_runtime()
    plain = tensor.detach().contiguous()
    if plain.dtype == torch.bool or plain.numel() == 0:
        return runtime.OrtValue.ortvalue_from_numpy(plain.cpu().numpy())
    return runtime.OrtValue.from_dlpack(plain)


def first_line(error: BaseException) -> str:
    """What an error of ONNX Runtime says, in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__
