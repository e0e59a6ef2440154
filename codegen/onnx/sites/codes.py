"""The stored parts of an integer grid, as the operators want them."""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from sparc import codes as diagnostic_codes
from sparc.codegen.encoded import Encoded
from sparc.codegen.onnx.emit import Emitter
from sparc.codegen.onnx.store import Origin
from sparc.codegen.onnx.types import onnx_type
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.mask import MaskEncoding
from sparc.program import location, weight_nodes
from sparc.target import Masked


@dataclass(frozen=True)
class IntMatrix:
    """An integer matrix `[out, reduce]` behind a site, and where its parts are stored.

    Codes that a mask hides are stored for every element, because ONNX has no operator for zeros.

    Args:
        e: the emitter.
        weight: the encoded weight.
        grid: the integer grid.
        derived: the codes, packed, where they are no program weight.
        index: which matrix it is, where the weight is a stack of them.
    """

    e: Emitter
    weight: Encoded
    grid: IntGrid
    derived: Tensor | None = None
    index: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Out and reduce."""
        out, reduce = self.weight.matrix_shape[-2:]
        return out, reduce

    @property
    def per_channel(self) -> bool:
        """Whether a row has one scale."""
        return not isinstance(self.grid.group, int)

    def part(self, name: str) -> Tensor:
        """A stored part, of this matrix."""
        whole = self._whole(name)
        place = self._place(name)
        return whole if place is None else whole[place]

    def _whole(self, name: str) -> Tensor:
        if self.derived is not None and name == "codes":
            return self.derived
        return self.e.program.weights[self.weight.parts[name]]

    def _place(self, name: str) -> int | None:
        """Where in a stored part this matrix lies; a number for the whole stack is every matrix's."""
        return None if self.index is None else min(self.index, self._whole(name).shape[0] - 1)

    def named(self, name: str) -> str:
        """The name of a tensor that is made from this matrix."""
        return f"{self.weight.site}_{name}" + ("" if self.index is None else f".{self.index}")

    def read(
        self,
        name: str,
        layout: str = "identity",
        shape: tuple[int, ...] = (),
        *,
        dtype: ir.DataType | None = None,
        dims: tuple[int, ...] | None = None,
    ) -> ir.Value:
        """An initializer over a part in a layout."""
        if self.derived is not None and name == "codes":
            of = masked_origin(self.weight)
            made = f"{self.weight.site}_all_codes"
            place = self._place(name)
            return self.e.derived(made, self.derived, layout, shape, dtype=dtype, dims=dims, part=place, of=of)
        return self.e.weight(self.weight.parts[name], layout, shape, dtype=dtype, dims=dims, part=self._place(name))

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of a part that has this shape for one matrix."""
        return shape if self.index is None else (*self.weight.matrix_shape[:-2], *shape)

    # 8-bit codes ------------------------------------------------------------------------------------------------------
    def codes_transposed(self) -> ir.Value:
        """8-bit codes `[reduce, out]`, int8: transposed in the file, or in the graph when rows are read too."""
        if not self.rows_are_read():
            return self.read("codes", "transpose" if self.grid.symmetric else "transpose+flip_sign")
        rows = self.read("codes")
        if not self.grid.symmetric:
            wide = self.e.op("Cast", rows, to=ir.DataType.INT32)
            rows = self.e.op("Cast", self.e.op("Sub", wide, self.e.const(128, torch.int32)), to=ir.DataType.INT8)
        return self.e.op("Transpose", rows, perm=[1, 0])

    def zero_int8(self) -> ir.Value | None:
        """The zero point of `codes_transposed`: int8, one or `[out]`; None for zero."""
        if self.grid.symmetric:
            return None
        shape = () if self.part("zero").numel() == 1 else (self.part("zero").numel(),)
        return self.read("zero", "flip_sign", dims=shape)

    def scale(self, dtype: torch.dtype | None = None) -> ir.Value:
        """The scale of a row: one or `[out]`, by default in the weight's dtype."""
        count = self.part("scale").numel()
        shape = () if self.grid.group == "tensor" else (count,)
        return self.as_float(self.read("scale", dims=shape), dtype)

    def as_float(self, value: ir.Value, dtype: torch.dtype | None = None) -> ir.Value:
        """Scales in a dtype, by default the one that the weight decodes to."""
        dtype = dtype or self.weight.dtype
        return self.e.cast(value, dtype) if value.dtype != onnx_type(dtype) else value

    def rows_are_read(self) -> bool:
        """Whether an embedding reads rows of the same codes, which then stay as they are."""
        if self.derived is not None:
            return False
        for entry in self.e.program.entries.values():
            for node in weight_nodes(entry.graph, self.weight.parts["codes"]):
                for decode in node.users:
                    if any(str(user.target) == "aten.embedding.default" for user in decode.users):
                        return True
        return False

    @property
    def code_bytes(self) -> int:
        """Bytes of the packed codes."""
        return self.part("codes").nbytes

    @property
    def grid_bytes(self) -> int:
        """Bytes of scales and zero points."""
        return sum(self.part(name).nbytes for name in self.grid.grid_names)


def int_matrix(e: Emitter, weight: Encoded) -> IntMatrix | None:
    """The integer matrix behind a weight: its own grid, or the one inside a mask; None when there is none."""
    if weight.grid is not None:
        return IntMatrix(e, weight, weight.grid)
    inner = weight.spec.of if isinstance(weight.spec, MaskEncoding) else None
    if not isinstance(inner, IntGrid):
        return None
    tensors = weight.tensors(e.program)
    dense = weight.spec.decode(tensors, weight.matrix_shape, torch.float32)
    grid = {name: tensors[name] for name in inner.grid_names}
    codes = inner.codes(dense, grid)
    if not torch.equal(inner.values(codes, grid, torch.float32), dense):
        return None
    say_dense(e, weight, f"ONNX has no operator for the zeros of {weight.spec}: they are stored and multiplied")
    return IntMatrix(e, weight, inner, inner.pack(codes))


def masked_origin(weight: Encoded) -> Origin:
    """What a tensor with the codes of all elements stores: the kept codes too, so that they need not be written."""
    if not isinstance(weight.spec, MaskEncoding):
        return Origin(weight.site)
    parts = {name: weight.parts[name] for name in weight.spec.mask_names}
    return Origin(weight.site, weight.parts["codes"], Masked(str(weight.spec), weight.matrix_shape, parts))


def say_dense(e: Emitter, weight: Encoded, why: str) -> None:
    """A remark, and a note in the site's row of the report."""
    e.notes[weight.site] = why
    if weight.grid is None:
        what = f"{weight.site} runs dense"
        e.diagnostics.remark(diagnostic_codes.DENSE_FALLBACK, what, where=location(weight.node), why=why)
