"""Contenders built with ONNX Runtime's own tools: what its users get today for the models of `examples.models`."""
