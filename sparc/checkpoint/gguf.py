"""The container of GGUF files, versions 2 and 3, little-endian: metadata and tensors by name.

The layout is that of the GGUF specification (ggml, docs/gguf.md). Nothing that the file says is believed before it has
been compared with the file's size: counts, lengths and offsets are checked where they are read, and a tensor's bytes
are mapped, not read.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparc import codes
from sparc.checkpoint.base import malformed, unknown
from sparc.checkpoint.gguf_blocks import BLOCKS, Block
from sparc.diag import CaptureError

Value = Any  # int, float, bool, str, a list of str, or a numpy array of numbers

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 16  # of metadata, and of tensors
_MAX_STRING = 1 << 24
_MAX_STRINGS = 1 << 23  # in all arrays together
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 16


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Args:
        name: its name.
        shape: its shape, outermost first.
        block: its format.
        start: its first byte in the file.
        size: its bytes.
    """

    name: str
    shape: tuple[int, ...]
    block: Block
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Container:
    """A GGUF file: metadata by key and tensors by name; `rows` reads one of them."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    data: mmap.mmap

    def rows(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, uint8 `[rows, bytes per row]`; a view of the file that cannot be written."""
        info = self.tensors[name]
        flat: NDArray[np.uint8] = np.frombuffer(self.data, np.uint8, info.size, info.start)
        rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        return flat.reshape(rows, -1)


def read_container(path: Path) -> Container:
    """Read the header of a GGUF file and map its tensors.

    Raises:
        CaptureError: SPARC116 when the file is cut short, SPARC117 when it contradicts itself, SPARC118 for versions
            and tensor types that are not known.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < len(_MAGIC) + 4 + 16:
            raise cut(path.name)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(data, path.name)
    if reader.take(4) != _MAGIC:
        raise unknown(f"{path.name} is no GGUF file")
    version = reader.number("<I")
    if version not in _VERSIONS:
        raise unknown(f"{path.name} is GGUF version {version}", "versions 2 and 3, little-endian, are read")
    tensor_count, entry_count = reader.number("<Q"), reader.number("<Q")
    if max(tensor_count, entry_count) > _MAX_ENTRIES:
        raise malformed(f"{path.name} announces {tensor_count} tensors and {entry_count} entries of metadata")
    metadata: dict[str, Value] = {}
    for _ in range(entry_count):
        key = reader.string()
        if key in metadata:
            raise malformed(f"{path.name} has the metadata {key!r} twice")
        metadata[key] = reader.value(reader.number("<I"))
    infos = [reader.tensor() for _ in range(tensor_count)]
    return Container(metadata, _placed(infos, reader, metadata), data)


def cut(name: str) -> CaptureError:
    """SPARC116, to raise."""
    return CaptureError(codes.CHECKPOINT_CUT, f"{name} ends too early")


class _Reader:
    """A position in the mapped file; every step is checked against its end."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.position, self.strings = data, name, 0, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start = self.skip(count)
        return self.data[start : self.position]

    def skip(self, count: int) -> int:
        """Move on; returns where the position was."""
        if count > len(self.data) - self.position:
            raise cut(self.name)
        self.position += count
        return self.position - count

    def number(self, layout: str) -> Any:
        """A number in `struct`'s notation."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        """A length and UTF-8."""
        length = self.number("<Q")
        if length > _MAX_STRING:
            raise malformed(f"{self.name} announces a string of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise malformed(f"{self.name} has a string that is no UTF-8") from None

    def value(self, kind: int) -> Value:
        """Metadata of a type."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise malformed(f"{self.name} has metadata of the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def array(self) -> "list[str] | NDArray[Any]":
        """Strings, or numbers as a view of the file; arrays of arrays are not allowed."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            self.strings += count
            if self.strings > _MAX_STRINGS:
                raise malformed(f"{self.name} announces {self.strings} strings")
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise malformed(f"{self.name} has an array of type {kind}", "arrays hold numbers or strings")
        dtype = np.dtype(_SCALARS[kind])
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start)

    def tensor(self) -> tuple[str, tuple[int, ...], Block, int]:
        """A tensor's name, shape, format and offset in the data."""
        name, count = self.string(), self.number("<I")
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise malformed(f"tensor {name!r} has {count} dimensions")
        shape = tuple(self.number("<Q") for _ in range(count))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in BLOCKS:
            raise unknown(f"tensor {name!r} is of ggml type {kind}")
        return name, shape, BLOCKS[kind], offset


def _placed(
    infos: list[tuple[str, tuple[int, ...], Block, int]], reader: _Reader, metadata: Mapping[str, Value]
) -> dict[str, TensorInfo]:
    """The tensors by name; they lie in the file, aligned, and apart from each other."""
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
        raise malformed(f"{reader.name} is aligned to {alignment!r}")
    base = -(-reader.position // alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    end = 0
    for name, shape, block, offset in sorted(infos, key=lambda info: info[3]):
        if name in placed:
            raise malformed(f"{reader.name} has the tensor {name!r} twice")
        if 0 in shape or shape[-1] % block.columns:
            raise malformed(f"tensor {name!r} has the shape {list(shape)}", f"its blocks hold {block.columns} columns")
        size = block.size
        for length in (*shape[:-1], shape[-1] // block.columns):
            size *= length  # of Python's own integers, which do not overflow
        if offset % alignment or offset < end:
            raise malformed(f"tensor {name!r} lies at {offset}", f"{alignment} divides no such place, or it is taken")
        end = offset + size
        if base + end > len(reader.data):
            raise cut(reader.name)
        placed[name] = TensorInfo(name, shape, block, base + offset, size)
    return {name: placed[name] for name, *_ in infos}
