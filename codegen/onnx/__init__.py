"""ONNX targets: `onnx` (= `onnx:cpu`), `onnx:portable`, `onnx:cuda`."""
