"""Tensors in a safetensors file: written in deterministic order without a second copy, and read through a memory map.

The format allows no holes, so tensors are ordered by the largest power of two (at most 64) that divides their size,
then by name. Each then starts at a multiple of that power, which is never less than its element size.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparc.serialize.schema import malformed, unwritable
from sparc.target import Span

ALIGNMENT = 64
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16", torch.uint32:
    "U32", torch.uint64: "U64", torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class TensorFile:
    """A safetensors file to be: its header, where every tensor will lie, and its bytes piece by piece."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Args: the tensors by name.

        Raises:
            ArtifactError: SPARC508 for a dtype that the format lacks.
        """
        self._tensors = {
            name: tensors[name].detach()
            for name in sorted(tensors, key=lambda name: (-_alignment(tensors[name]), name))
        }
        described: dict[str, Any] = {}
        start = 0
        for name, tensor in self._tensors.items():
            if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
                raise unwritable(f"tensor {name!r} cannot be stored", f"{tensor.dtype}, {tensor.layout}")
            end = start + tensor.nbytes
            described[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(described, ensure_ascii=True, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        base = len(self.header)
        self.spans = {
            name: Span(base + each["data_offsets"][0], each["data_offsets"][1] - each["data_offsets"][0])
            for name, each in described.items()
        }

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(span.length for span in self.spans.values())

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file's bytes; a contiguous tensor is not copied."""
        yield self.header
        for tensor in self._tensors.values():
            if tensor.numel():
                yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _alignment(tensor: Tensor) -> int:
    return math.gcd(tensor.nbytes, ALIGNMENT)


class TensorReader:
    """A safetensors file mapped into memory: a tensor's bytes are read from disk when they are first used."""

    def __init__(self, path: Path) -> None:
        """Args: the file, already checked to be an ordinary one.

        Raises:
            ArtifactError: SPARC503 when header, lengths and offsets do not fit the file.
        """
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu")
            self._file.__enter__()
            self.names = frozenset(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise malformed(f"{path.name} is no safetensors file", str(error)[:200]) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def get(self, name: str) -> Tensor:
        """A tensor by name.

        Raises:
            ArtifactError: SPARC503 when there is none.
        """
        if name not in self.names:
            raise malformed(f"there is no stored tensor {name[:80]!r}")
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise malformed(f"tensor {name[:80]!r} cannot be read", str(error)[:200]) from None
        return tensor
