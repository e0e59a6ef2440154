"""Room for biases: integer kernels add the bias as a 32-bit code whose step is (input scale) x (weight scale)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparc.analysis.sites import Use
from sparc.encoding.int_grid import IntGrid
from sparc.encoding.operators import is_decode, round_weight
from sparc.encoding.view import WeightView
from sparc.passes.activation.regions import is_zero_pad
from sparc.program import Program, is_weight

_MOST_CODES = 2.0**30
_FITTED_CODES = 2.0**24


def fit_bias_step(program: Program, use: Use) -> None:
    """Raise the scale of weight rows that are (almost) zero, so that the bias of the row can be written in 32 bits.

    A channel that training switched off has weights near 0 and a bias that is its whole output: at a scale fitted to
    such weights the bias needs more than 32 bits and is cut off. Rows whose bias would need more than 30 bits, and
    rows of zeros, whose scale means nothing, get the scale at which the bias needs 24. That moves the row's weights by
    at most half a step, which is 2^-25 of the bias for each unit of input scale.

    Args:
        program: is edited.
        use: a convolution or linear that reads a static activation.
    """
    bias, scale = _bias(program, use), _input_scale(program, use)
    weight: Any = use.node.args[use.argument]
    grid = program.grid(weight) if is_weight(weight) else None
    if bias is None or scale is None or grid is None:
        return
    if not isinstance(grid.spec, IntGrid) or grid.spec.group != "channel":
        return
    name = str(weight.target)
    steps = grid.tensors["scale"]
    needed = (bias.abs().reshape(steps.shape) / scale).double()
    matrix = WeightView.parse(grid.view).to_matrix(program.weights[name])
    dead = (matrix == 0).all(-1, keepdim=True)
    short = (needed > steps.double() * _MOST_CODES) | (dead & (needed > 0))
    if bool(short.any()):
        raised = torch.where(short, (needed / _FITTED_CODES).to(steps.dtype), steps)
        wider = replace(grid, tensors={**grid.tensors, "scale": raised})
        program.set_weight(name, round_weight(program.weights[name], wider), wider)


def _bias(program: Program, use: Use) -> Tensor | None:
    if use.operator not in ("conv", "linear") or len(use.node.args) < 3:
        return None
    bias = use.node.args[2]
    return program.weights[str(bias.target)].float() if is_weight(bias) else None  # type: ignore[union-attr]


def _input_scale(program: Program, use: Use) -> float | None:
    value = use.input
    while not is_decode(value) and is_zero_pad(value):
        value = value.args[0]
    if not is_decode(value) or len(value.args[0]) < 2:
        return None
    scale = value.args[0][1]
    return float(program.weights[str(scale.target)]) if is_weight(scale) else None
