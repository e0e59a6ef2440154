"""Element types: torch's, ONNX's and numpy's names for the same thing."""

import onnx_ir as ir
import torch

from sparc import codes
from sparc.diag import LoweringError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_TYPES = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
    torch.uint16: ir.DataType.UINT16,
    torch.uint32: ir.DataType.UINT32,
    torch.uint64: ir.DataType.UINT64,
    torch.complex64: ir.DataType.FLOAT,  # pairs on a last axis, as torch.onnx's translations have them
    torch.complex128: ir.DataType.DOUBLE,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
}
_TORCH = {onnx: torch_dtype for torch_dtype, onnx in _TYPES.items() if not torch_dtype.is_complex}


def onnx_type(dtype: torch.dtype) -> ir.DataType:
    """ONNX's name of a torch dtype.

    Raises:
        LoweringError: SPARC401 for a dtype that ONNX lacks.
    """
    try:
        return _TYPES[dtype]
    except KeyError:
        raise LoweringError(codes.NO_TRANSLATION, f"ONNX has no type for {dtype}") from None


def torch_type(dtype: ir.DataType) -> torch.dtype:
    """The inverse of `onnx_type`."""
    return _TORCH[dtype]
