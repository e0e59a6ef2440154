"""Which tensors the emitted models store, in which layout, and which initializers stand for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from sparc import layout as layouts
from sparc.codegen.onnx.types import onnx_type
from sparc.program import WeightStore
from sparc.target import Masked, StoredTensor

ALIAS, PART = "#", "@"


@dataclass(frozen=True)
class Origin:
    """What a derived tensor was made from.

    Args:
        site: the original weight, for the report.
        weight: the program weight that a mask keeps of it, if there is one.
        masked: the mask.
    """

    site: str = ""
    weight: str | None = None
    masked: Masked | None = None


@dataclass
class Store:
    """Stored tensors, shared by every entry of a program.

    An initializer is named as the stored tensor it reads, or that name, `#` and how it reads the same bytes differently
    (`lm_head.weight_codes#[49152,18,16]`), and where it reads one matrix of a stack, `@` and which one
    (`experts#[64,32]@3`).

    Args:
        weights: the program's weights.
        reserved: names that a stored tensor must not take (inputs and outputs of the entries).
    """

    weights: WeightStore
    reserved: frozenset[str] = frozenset()
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    _by_source: dict[tuple[str, str, tuple[int, ...]], str] = field(default_factory=dict)

    def weight(self, name: str, layout: str = layouts.IDENTITY, shape: Sequence[int] = ()) -> StoredTensor:
        """A program weight stored in a layout; `shape` is the stored shape where the layout needs it."""
        key = (name, layout, tuple(shape))
        if key not in self._by_source:
            tensor = layouts.store(layout, self.weights[name].detach(), shape or None)
            self._by_source[key] = self._add(name, tensor.contiguous(), name, layout)
        return self.tensors[self._by_source[key]]

    def derived(
        self,
        name: str,
        tensor: Tensor,
        layout: str = layouts.IDENTITY,
        shape: Sequence[int] = (),
        of: Origin | None = None,
    ) -> StoredTensor:
        """A tensor that is no program weight: computed while emitting, the same for every entry."""
        key = (name, f"derived {layout}", tuple(shape) or tuple(tensor.shape))
        if key not in self._by_source:
            stored = layouts.store(layout, tensor, shape or None).contiguous()
            self._by_source[key] = self._add(name, stored, None, layout, of or Origin())
        return self.tensors[self._by_source[key]]

    def _add(self, name: str, tensor: Tensor, weight: str | None, layout: str, of: Origin | None = None) -> str:
        if name in self.reserved:
            name = f"weights.{name}"
        unique, count = name, 0
        while unique in self.tensors:
            count += 1
            unique = f"{name}.{layout.replace('+', '.')}" if count == 1 else f"{name}.{count}"
        if of is not None:
            self.tensors[unique] = StoredTensor(unique, tensor, of.weight, layout, of.masked, of.site)
        else:
            self.tensors[unique] = StoredTensor(unique, tensor, weight, layout)
        return unique


def initializer(
    stored: StoredTensor,
    dtype: ir.DataType | None = None,
    shape: Sequence[int] | None = None,
    part: int | None = None,
) -> ir.Value:
    """A graph value that reads a stored tensor, as another type or shape of the same bytes if asked.

    Args:
        stored: the tensor.
        dtype: the ONNX type, when it is not the tensor's own (INT4 over packed bytes, for example).
        shape: the ONNX shape, when it is not the tensor's own.
        part: read only this element of the first axis.
    """
    held = stored.tensor if part is None else stored.tensor[part]
    own_type, own_shape = onnx_type(held.dtype), tuple(held.shape)
    dtype, shape = dtype or own_type, tuple(own_shape if shape is None else shape)
    name = stored.name
    if dtype != own_type or shape != own_shape or part is not None:
        kind = "" if dtype == own_type else dtype.name.lower()
        name += f"{ALIAS}{kind}[{','.join(map(str, shape))}]" + ("" if part is None else f"{PART}{part}")
    external = ir.ExternalTensor("weights.safetensors", 0, held.nbytes, dtype, name=name, shape=ir.Shape(shape))
    return ir.Value(name=name, const_value=external, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def stored_name(initializer_name: str) -> str:
    """The stored tensor that an initializer reads."""
    return initializer_name.partition(ALIAS)[0]


def part_of(initializer_name: str) -> int | None:
    """Which element of the stored tensor's first axis an initializer reads; None for all of it."""
    part = initializer_name.partition(ALIAS)[2].partition(PART)[2]
    return int(part) if part else None


def read_by(initializer_name: str, stored: Mapping[str, StoredTensor]) -> Tensor:
    """What an initializer reads."""
    held, part = stored[stored_name(initializer_name)].tensor, part_of(initializer_name)
    return held if part is None else held[part]


def used(tensors: Iterable[StoredTensor], names: set[str]) -> list[StoredTensor]:
    """The stored tensors that some initializer reads."""
    return [stored for stored in tensors if stored.name in names]


def is_packed(dtype: ir.DataType) -> bool:
    """Whether elements of a type share bytes."""
    return dtype in (ir.DataType.INT4, ir.DataType.UINT4)


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes, row-major, little-endian."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
