"""Runs ONNX files on ONNX Runtime's CPU provider."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import Tensor


def open_session(path: Path, threads: int = 2, optimized: Path | None = None) -> ort.InferenceSession:
    """Return a CPU session on `threads` cores; `optimized` is where to write the graph that really runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def as_model(session: ort.InferenceSession) -> Callable[..., Tensor]:
    """Return a callable that takes tensors by name and returns the session's first output."""

    def call(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return call


def operators(path: Path) -> Counter[str]:
    """Count the operators that ONNX Runtime runs for a file, after its own graph optimisation."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, optimized=optimized)
        return Counter(node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node)
