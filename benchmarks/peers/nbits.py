"""Blockwise weights by ONNX Runtime's own MatMulNBits quantizer."""

from pathlib import Path

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from benchmarks.peers.quiet import quiet


def quantize_matmuls(source: Path, path: Path, bits: int, block: int) -> Path:
    """Write `source` with MatMulNBits of 4 or 8 bits for every constant MatMul: asymmetric, activations as int8.

    Round-to-nearest in blocks of `block` along the input; accuracy level 4 (the fastest: activations are quantized).
    """
    with quiet():
        quantizer = MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=block, is_symmetric=False, accuracy_level=4
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))
    return path
