"""Weight-only products on packed codes: MatMulNBits."""

from typing import Any

import onnx_ir as ir
import torch

from sparc.codegen.encoded import Activation
from sparc.codegen.onnx.emit import MS, Emitter
from sparc.codegen.onnx.sites.codes import IntMatrix
from sparc.codegen.onnx.sites.product import Product
from sparc.target import KernelUse

_BLOCKS = (256, 128, 64, 32, 16)
_FULL, _INT8 = 1, 4


def nbits_product(e: Emitter, site: Product) -> ir.Value | None:
    """`x @ decode(w).T + bias` by MatMulNBits: 4-bit codes, and 8-bit ones where x is quantized by row and block.

    The operator's blocks are the grid's groups, or a power of two that divides them. Accuracy level 4 rounds x to int8
    by row and block; it is used when, and only when, the program does that itself. Of an x in two halves, both are rows
    of one product: the coarse one as the program decodes it, so that rounding it again changes nothing.
    """
    w = site.matrix
    block = block_size(w) if w is not None and e.target.contrib and site.is_matrix else None
    if w is None or block is None or w.grid.bits not in (4, 8):
        return None
    quantized = multiplies_blocks(e, site)
    if w.grid.bits == 8 and not quantized and e.target.flavour != "cuda":
        return None
    out, reduce = w.shape
    stacked = quantized and site.x.kind == "split_block"
    x = _stacked(e, site.x) if stacked else e.value(site.x.source if quantized else site.x.node)
    bias_apart = stacked or _has_minimum(w)
    scale = blockwise_scale(w, block) if quantized else _scale(w, block)
    parts = (blockwise_codes(w, block), scale, blockwise_zero(w, block), None, None if bias_apart else site.bias)
    product = e.op(
        "MatMulNBits", x, *parts, domain=MS,
        K=reduce, N=out, bits=w.grid.bits, block_size=block, accuracy_level=_INT8 if quantized else _FULL,
    )  # fmt: skip
    terms = list(e.op("Split", product, axis=-2, num_outputs=2, outputs=2)) if stacked else [product]
    if _has_minimum(w):
        terms.append(_minimum_part(e, w, site.x.source if quantized else site.x.node, reduce))
    if bias_apart and site.bias is not None:
        terms.append(e.value(site.bias))
    product = e.op("Sum", *terms) if len(terms) > 1 else product
    groups = -(-reduce // block)
    each = site.weight.dtype.itemsize + (0 if w.grid.symmetric else 0.5 if w.grid.bits == 4 else 1)
    site.carried(e, KernelUse("MatMulNBits", int(out * groups * (block * w.grid.bits / 8 + each))))
    return product


def multiplies_blocks(e: Emitter, site: Product) -> bool:
    """Whether the codes of x, a scale for each of the operator's blocks, are multiplied with the weight's."""
    w = site.matrix
    if not e.target.contrib or w is None or not site.is_matrix or w.grid.bits not in (4, 8):
        return False
    halves = site.x.halves if site.x.kind == "split_block" else None
    spec = halves[0].spec if halves is not None else site.x.spec if site.x.kind == "block" else None
    if spec is None or spec.group != block_size(w):
        return False
    return not _has_minimum(w) if halves is None else _has_rows(site.x)  # a minimum meets x before it is rounded


def block_size(w: IntMatrix) -> int | None:
    """The largest of the operator's blocks that divides a group, or the row where it has one scale (else 32)."""
    reduce = w.shape[1]
    if not w.per_channel:
        return next((block for block in _BLOCKS if w.grid.group % block == 0), None)  # type: ignore[operator]
    return next((block for block in (128, 64, 32, 16) if reduce % block == 0), 32)


def _has_minimum(w: IntMatrix) -> bool:
    return not w.grid.symmetric and w.grid.zero == "minimum"


def _has_rows(x: Activation) -> bool:
    return site_fake(x.node).ndim > 1


def _stacked(e: Emitter, x: Activation) -> ir.Value:
    """The coarse and the fine part of a split x, as rows of one matrix."""
    assert x.halves is not None
    coarse, fine = x.halves
    return e.op("Concat", coarse.node, fine.source, axis=-2)


def blockwise_codes(w: IntMatrix, block: int, *, rows: bool = False) -> ir.Value:
    """`[out, blocks, bytes of a block]`, or `[out, bytes]` where rows are wanted: uint8, the last block filled up.

    Signed codes are offset to unsigned ones.
    """
    out, reduce = w.shape
    blocks, blob = -(-reduce // block), block * w.grid.bits // 8
    flip = "flip_sign" if w.grid.bits == 8 and w.grid.symmetric else ""
    dims = (out, blocks * blob) if rows else (out, blocks, blob)
    if w.part("codes").shape[-1] == blocks * blob:
        return w.read("codes", flip or "identity", dims=dims)
    return w.read("codes", f"{flip}+pad".lstrip("+"), w.stored((out, blocks * blob)), dims=dims)


def blockwise_scale(w: IntMatrix, block: int) -> ir.Value:
    """`[out, blocks]`, in the dtype of x, stored as it is read."""
    blocks = -(-w.shape[1] // block)
    if not w.per_channel or w.part("scale").shape == (w.shape[0], blocks):
        return _scale(w, block)
    wide = w.part("scale").expand(w.shape[0], blocks).to(w.weight.dtype).contiguous()
    return w.e.derived(w.named("scale_blocks"), wide)


def _scale(w: IntMatrix, block: int) -> ir.Value:
    """`[out, blocks]`, in the dtype of x."""
    return w.as_float(_spread(w, w.read("scale"), w.part("scale").shape[-1], block))


def _spread(w: IntMatrix, value: ir.Value, groups: int, block: int) -> ir.Value:
    """Numbers per group as numbers per block; folded when the file is loaded."""
    out, reduce = w.shape
    blocks = -(-reduce // block)
    if w.per_channel:
        return w.e.op("Expand", value, [out, blocks]) if blocks > 1 or w.grid.group == "tensor" else value
    repeats = w.grid.group // block  # type: ignore[operator]
    if repeats == 1:
        return value
    wide = w.e.op("Expand", w.e.op("Unsqueeze", value, [2]), [out, groups, repeats])
    flat = w.e.op("Reshape", wide, [out, groups * repeats])
    return flat if groups * repeats == blocks else w.e.op("Slice", flat, [0], [blocks], [1])


def blockwise_zero(w: IntMatrix, block: int) -> ir.Value | None:
    """Zero points, packed like the codes; None where the operator's default, the middle code, is meant."""
    out, reduce = w.shape
    blocks = -(-reduce // block)
    if w.grid.symmetric:
        return None
    if _has_minimum(w):
        width = blocks if w.grid.bits == 8 else -(-blocks // 2)
        return w.e.op("Expand", w.e.const(0, ir.DataType.UINT8), [out, width])
    if w.part("zero").shape == (out, blocks):
        return w.read("zero", "pack4") if w.grid.bits == 4 else w.read("zero")
    repeats = blocks if w.per_channel else w.grid.group // block  # type: ignore[operator]
    zeros = w.part("zero").expand(out, -1).repeat_interleave(repeats, dim=1)[:, :blocks].contiguous()
    return w.e.derived(w.named("zero_blocks"), zeros, "pack4" if w.grid.bits == 4 else "identity")


def _minimum_part(e: Emitter, w: IntMatrix, x: Any, reduce: int) -> ir.Value:
    """`sum over each group of x, times the group's minimum`: what a floating minimum adds to every code."""
    groups = w.part("minimum").shape[-1]
    value = e.value(x)
    if w.per_channel:
        sums = e.op("ReduceSum", value, [-1], keepdims=1)
    else:
        short = groups * w.grid.group - reduce  # type: ignore[operator]
        if short:
            value = e.op("Pad", value, [0, short], None, [-1])
        leading = [0] * (site_fake(x).ndim - 1)  # axes that stay: a run of stacked rows has fewer than its type says
        split = e.op("Reshape", value, e.ints([*leading, groups, w.grid.group]))
        sums = e.op("ReduceSum", split, [-1], keepdims=0)
    minimum = w.as_float(w.read("minimum"))
    if w.grid.group == "tensor":
        minimum = e.op("Expand", minimum, [w.shape[0], 1])
    return e.op("MatMul", sums, e.op("Transpose", minimum, perm=[1, 0]))


def site_fake(x: Any) -> torch.Tensor:
    """The type of an activation."""
    fake = x.meta["val"]
    assert isinstance(fake, torch.Tensor)
    return fake
