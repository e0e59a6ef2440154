"""What the tests of the ONNX target share: capture, emit, run, compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from sparc.capture import capture
from sparc.codegen.onnx.check import check_model
from sparc.codegen.onnx.emission import OnnxEmission
from sparc.codegen.onnx.target import OnnxTarget
from sparc.program import Program
from sparc.target import EmitContext

FLAVOURS = ("portable", "cpu", "cuda")


def emit(program: Program, flavour: str = "cpu", **options: Any) -> OnnxEmission:
    return OnnxTarget(flavour).emit(program, EmitContext(options=options))  # type: ignore[arg-type]


def operators(emission: OnnxEmission, entry: str = "forward") -> list[str]:
    return [node.op_type for node in emission.models[entry].graph.node]


def assert_agrees(program: Program, emission: OnnxEmission, inputs: list[Tensor], tolerance: float = 2e-6) -> None:
    """Every output equals the program's: exactly if integer, else relative to the output's largest element."""
    got, want = emission.runner(threads=1)(inputs), program.run_flat(inputs)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs)
            continue
        finite = torch.isfinite(theirs)
        assert torch.equal(ours[~finite], theirs[~finite]) or torch.isnan(theirs[~finite]).all()
        scale = max(float(theirs[finite].abs().max()) if finite.any() else 0.0, 1e-30)
        assert (
            float((ours[finite].double() - theirs[finite].double()).abs().max() if finite.any() else 0)
            <= tolerance * scale
        )


def check(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    dynamic: Any = None,
    flavour: str = "cpu",
    tolerance: float = 2e-6,
    **options: Any,
) -> OnnxEmission:
    """Capture, emit, validate and run a module; compare with the program."""
    program = capture(model, inputs, dynamic=dynamic)
    emission = emit(program, flavour, **options)
    check_model(emission.models["forward"])
    flat = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    assert_agrees(program, emission, [each for each in flat if isinstance(each, Tensor)], tolerance)
    return emission


def optimized(emission: OnnxEmission, folder: Path, entry: str | None = None) -> list[str]:
    """The operators that ONNX Runtime's own optimizer leaves of the exported file, under default options."""
    import onnxruntime

    path = folder / "model.onnx"
    emission.export_onnx(path, entry=entry)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]
