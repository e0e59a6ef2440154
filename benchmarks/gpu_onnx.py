"""An `onnx:cuda` artifact in onnxruntime-gpu, which may leave nothing to the CPU."""

import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

import sparc

_PROVIDER = "CUDAExecutionProvider"


def check() -> dict[str, Any]:
    """Compile a small model for `onnx:cuda` and run its file.

    Returns:
        `status`: `not installed` where ONNX Runtime has no CUDA provider, else `runs`; `recipes`: the error relative to
        the program in eager torch, by recipe.
    """
    if _PROVIDER not in onnxruntime.get_available_providers():
        return {"status": "not installed"}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256)).eval()
    x = torch.randn(4, 256)
    return {"status": "runs", "recipes": {recipe: _error(model, x, recipe) for recipe in ("w8", "w4", "w8a8")}}


def _error(model: nn.Module, x: torch.Tensor, recipe: str) -> float:
    artifact = sparc.compile(model, (x,), recipe=recipe, target="onnx:cuda", verify="types", measure=False)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.export_onnx(Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=[_PROVIDER])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    expected = artifact.program.run_flat([x])[0]
    return float((found - expected).norm() / expected.norm())
