"""Which lowering an encoding has."""

from collections.abc import Mapping

from sparc.codegen.triton.tiles import LoweringType, WeightLowering
from sparc.codegen.triton.weights.binary_code import BinaryCodeWeight
from sparc.codegen.triton.weights.blocks import BlockSparseWeight
from sparc.codegen.triton.weights.codebook import CodebookWeight
from sparc.codegen.triton.weights.dense import DenseWeight
from sparc.codegen.triton.weights.float8 import Float8Weight
from sparc.codegen.triton.weights.integer import IntegerWeight
from sparc.codegen.triton.weights.microscaling import MXFP4Weight, NVFP4Weight
from sparc.codegen.triton.weights.n_of_m import StructuredWeight
from sparc.encoding.base import Encoding, Parts
from sparc.encoding.mask import MaskEncoding

LOWERINGS: Mapping[str, LoweringType] = {
    "Dense": DenseWeight,
    "IntGrid": IntegerWeight,
    "Float8": Float8Weight,
    "MXFP4": MXFP4Weight,
    "NVFP4": NVFP4Weight,
    "Codebook": CodebookWeight,
    "BinaryCode": BinaryCodeWeight,
}
MASKS: Mapping[str, type[BlockSparseWeight | StructuredWeight]] = {"Blocks": BlockSparseWeight, "NM": StructuredWeight}


def find_lowering(
    encoding: Encoding,
    shape: tuple[int, int],
    parts: Parts,
    extensions: Mapping[str, LoweringType] | None = None,
) -> WeightLowering | str:
    """The lowering of an encoded matrix.

    Args:
        encoding: how it is encoded.
        shape: rows and columns.
        parts: the encoded tensors.
        extensions: lowerings of encodings by class name; they come first.

    Returns:
        The lowering, or why there is none.
    """
    known = {**LOWERINGS, **(extensions or {})}
    name = type(encoding).__name__
    if name in known:
        return known[name](encoding, shape, parts)
    if name not in MASKS or not isinstance(encoding, MaskEncoding):
        return f"no kernel decodes {encoding}"
    inner = known.get(type(encoding.of).__name__)
    return MASKS[name](encoding, shape, parts, inner) if inner else f"no kernel decodes {encoding.of}"
