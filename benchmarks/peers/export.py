"""Exports through torch.onnx's TorchScript exporter, whose graphs ONNX Runtime's transformer optimizer recognises."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_OPSET = 17


def export(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    output: str,
    dynamic: Mapping[str, Mapping[int, str]],
    path: Path,
    opset: int = _OPSET,
) -> Path:
    """Write `model` as ONNX and return `path`.

    Args:
        model: called with the tensors of `inputs` in their order; returns one tensor.
        inputs: example inputs by name.
        output: the name to give to the output.
        dynamic: names of dynamic dimensions, by input or output name and dimension.
        path: the file to write.
        opset: the version of the standard operator set.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter announces its own retirement
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes={name: dict(axes) for name, axes in dynamic.items()},
            opset_version=opset,
            dynamo=False,
        )
    return path
