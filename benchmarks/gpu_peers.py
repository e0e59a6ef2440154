"""What else multiplies with compressed weights on a GPU: torch's own operators, and packages that may be installed."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Any]
_GROUP = 128


@dataclass(frozen=True)
class Peer:
    """Somebody else's product.

    Args:
        name: what to call it.
        cases: the names of our encodings that it is compared with.
        prepare: makes the product `x -> x @ w.T` of a weight `[rows, columns]` on the GPU; raises ImportError where its
            package is missing.
        dtype: of the weight and the activation.
        least_tokens: that it takes.
    """

    name: str
    cases: tuple[str, ...]
    prepare: Callable[[Tensor], Product]
    dtype: torch.dtype = torch.float16
    least_tokens: int = 1


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias=False, device=weight.device, dtype=weight.dtype)
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return made


def _affine(weight: Tensor, low: float) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits per group: codes uint8 `[rows, columns]` from 0 to 15, scales and offsets `[rows, groups]`, where a
    value is `(code - low) * scale + offset`.
    """
    groups = weight.float().unflatten(-1, (-1, _GROUP))
    least, greatest = groups.amin(-1), groups.amax(-1)
    scale = ((greatest - least) / 15).clamp(min=1e-6)
    codes = ((groups - least[..., None]) / scale[..., None]).round().clamp(0, 15)
    return codes.flatten(-2).to(torch.uint8), scale, least + low * scale


# torch ----------------------------------------------------------------------------------------------------------------
def torch_int4(weight: Tensor) -> Product:
    """Torch's `_weight_int4pack_mm` (tinygemm), for bfloat16."""
    codes, scale, offset = _affine(weight, 8.0)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    parameters = torch.stack([scale, offset], -1).transpose(0, 1).contiguous().to(weight.dtype)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, _GROUP, parameters)


def torch_float8(weight: Tensor) -> Product:
    """Torch's `_scaled_mm` of two 8-bit matrices; the activation's rounding is in the time."""
    own = weight.to(torch.float8_e4m3fn).T
    one = torch.ones((), device=weight.device)

    def run(x: Tensor) -> Tensor:
        narrow = x.to(torch.float8_e4m3fn)
        return torch._scaled_mm(narrow, own, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return run


def torch_sparse(weight: Tensor) -> Product:
    """Torch's `_cslt_sparse_mm` (cuSPARSELt) of a 2:4 weight."""
    kept = weight.abs().unflatten(-1, (-1, 4)).argsort(-1)[..., 2:]
    mask = torch.zeros_like(weight, dtype=torch.bool).unflatten(-1, (-1, 4)).scatter_(-1, kept, True).flatten(-2)
    compressed = torch._cslt_compress(weight * mask)
    return lambda x: torch._cslt_sparse_mm(compressed, x.T, transpose_result=True)


# packages -------------------------------------------------------------------------------------------------------------
def torchao_int4(weight: Tensor) -> Product:
    """torchao's weight-only 4 bits."""
    quantization: Any = importlib.import_module("torchao.quantization")
    linear = _linear(weight)
    try:
        config = quantization.Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d")
    except TypeError:  # older ones have one format
        config = quantization.Int4WeightOnlyConfig(group_size=_GROUP)
    quantization.quantize_(linear, config)
    return linear


def torchao_int8(weight: Tensor) -> Product:
    """torchao's weight-only 8 bits."""
    quantization: Any = importlib.import_module("torchao.quantization")
    linear = _linear(weight)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


def gemlite_int4(weight: Tensor) -> Product:
    """GemLite's weight-only 4 bits; a value is `(code - zero) * scale`."""
    gemlite: Any = importlib.import_module("gemlite")
    rows, columns = weight.shape
    codes, scale, offset = _affine(weight, 0.0)
    half = gemlite.DType.FP16
    made = gemlite.GemLiteLinear(
        4, group_size=_GROUP, in_features=columns, out_features=rows, input_dtype=half, output_dtype=half
    )
    zeros = (-offset / scale).to(weight.dtype).reshape(-1, 1)
    made.pack(codes, scale.to(weight.dtype).reshape(-1, 1), zeros, None)
    return lambda x: made(x)


def gemlite_int8(weight: Tensor) -> Product:
    """GemLite's weight-only 8 bits."""
    helper: Any = importlib.import_module("gemlite.helper")
    made = helper.A16W8(device=str(weight.device), dtype=weight.dtype).from_linear(_linear(weight))
    return lambda x: made(x)


def bitsandbytes_nf4(weight: Tensor) -> Product:
    """bitsandbytes' NF4."""
    modules: Any = importlib.import_module("bitsandbytes.nn")
    rows, columns = weight.shape
    made = modules.Linear4bit(columns, rows, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    made.weight = modules.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    return made.to(weight.device)  # type: ignore[no-any-return]


_BFLOAT16 = torch.bfloat16
PEERS: tuple[Peer, ...] = (
    Peer("torch int4", ("int4 g128",), torch_int4, _BFLOAT16),
    Peer("torch fp8×fp8", ("fp8",), torch_float8, _BFLOAT16, least_tokens=16),
    Peer("torch 2:4", ("2:4 fp16", "2:4 int8", "2:4 int4"), torch_sparse, least_tokens=16),
    Peer("torchao int4", ("int4 g128",), torchao_int4, _BFLOAT16),
    Peer("torchao int8", ("int8",), torchao_int8, _BFLOAT16),
    Peer("gemlite int4", ("int4 g128",), gemlite_int4),
    Peer("gemlite int8", ("int8",), gemlite_int8),
    Peer("bitsandbytes NF4", ("NF4",), bitsandbytes_nf4),
)
