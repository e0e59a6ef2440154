"""EfficientNet-Lite0 by ONNX Runtime's own tools: float32 and static QDQ int8."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers.export import export
from benchmarks.peers.quiet import quiet
from examples.models import efficientnet


class _Crops(CalibrationDataReader):  # type: ignore[misc]
    """Feeds the calibration crops of `examples.models.efficientnet`, batch by batch."""

    def __init__(self) -> None:
        self._batches: Iterator[dict[str, NDArray[np.float32]]] = (
            {name: tensor.numpy() for name, tensor in item.items()} for item in efficientnet.efficientnet()["data"]
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch, or None after the last."""
        return next(self._batches, None)


def float32(folder: Path) -> Path:
    """Write float32, batch normalisation folded by the exporter."""
    arguments = efficientnet.efficientnet()
    dynamic = {"pixel_values": {0: "batch"}, "logits": {0: "batch"}}
    path = folder / "efficientnet_float32.onnx"
    return export(arguments["model"], arguments["example_inputs"], "logits", dynamic, path)


def static_int8(folder: Path, *, unsigned: bool = True, method: CalibrationMethod = CalibrationMethod.MinMax) -> Path:
    """Write ONNX Runtime's static QDQ: per-channel int8 weights, uint8 (or int8) activations, the same 104 crops."""
    prepared = folder / "efficientnet_prepared.onnx"
    path = folder / f"efficientnet_qdq_{'u8' if unsigned else 's8'}s8_{method.name.lower()}.onnx"
    with quiet():
        quant_pre_process(str(float32(folder)), str(prepared))
        quantize_static(
            prepared,
            path,
            _Crops(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
        )
    return path
