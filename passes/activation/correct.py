"""Correcting what rounding shifted."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sparc.analysis.sites import Site, Use
from sparc.contract import Approximate
from sparc.pass_base import Pass, PassContext, Stage
from sparc.program import Program, is_weight

_ADD_BIAS = ("conv",)


@dataclass(frozen=True)
class CorrectBias(Pass):
    """f(x, w') + b => f(x, w') + b + E[f(x, w) - f(x, w')], per output channel, where w' is w after rounding or
    masking.

    The expectation is over calibration data, with x as the compressed program computes it; by linearity it needs only
    the mean of every input channel. (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", in its empirical form.) A convolution without a bias gets one; a linear without one is left alone,
    since adding would cost time.
    """

    name: ClassVar[str] = "correct_bias"
    stage: ClassVar[Stage] = Stage.CORRECT
    needs: ClassVar[frozenset[str]] = frozenset({"moments"})

    @property
    def contract(self) -> Approximate:
        """Measured only."""
        return Approximate("snr_db")

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The moments of the inputs of products whose weights have changed."""
        for site in context.sites(program):
            if _why_not(program, site, context) is None:
                yield site.uses[0].input, _kind(site.uses[0])

    def run(self, program: Program, context: PassContext) -> None:
        """Correct every selected site of this block."""
        for site in context.sites(program):
            why = _why_not(program, site, context)
            if why is None:
                why = _correct(program, site, context)
            if why:
                context.skip(site.weight, why, site.location)


def _correct(program: Program, site: Site, context: PassContext) -> str | None:
    """Correct one site; returns why not, if it was not."""
    use, before = site.uses[0], context.reference
    moments = context.statistics(use.input, _kind(use)) if context.statistics is not None else None
    if moments is None or before is None:
        return "no calibration data reached it"
    if context.edit():
        change = before.weights[site.weight].double() - program.weights[site.weight].double()
        _add_to_bias(program, use, mean_output(change, use, moments[0]))
    return None


def mean_output(weight: Tensor, use: Use, mean: Tensor) -> Tensor:
    """The mean output of a product over a stream of inputs, borders aside.

    Args:
        weight: in its own layout, without the bias.
        use: how the product reads it.
        mean: `[channels]`, of the input.

    Returns:
        `[out]` float64.
    """
    if use.operator == "matmul":
        return mean @ weight
    columns = weight.reshape(weight.shape[0], weight.shape[1], -1).sum(-1)
    groups = mean.numel() // columns.shape[1]
    per_group = columns.reshape(groups, -1, columns.shape[1])
    return (per_group * mean.reshape(groups, 1, -1)).sum(-1).flatten()


def _kind(use: Use) -> str:
    return "moments:1" if use.operator == "conv" else "moments"


def _why_not(program: Program, site: Site, context: PassContext) -> str | None:
    """Why a site is not corrected; empty when there is nothing to correct, None when it can be."""
    before = context.reference
    if before is None or site.weight not in before.weights:
        return ""
    old, new = before.weights[site.weight], program.weights[site.weight]
    if site.operator not in ("linear", "conv", "matmul") or old is new:
        return ""
    if old.shape != new.shape:
        return "its shape has changed"
    if len(site.uses) != 1:
        return "it is used more than once"
    if not isinstance(site.uses[0].input, fx.Node) or site.uses[0].input.op == "get_attr":
        return "its input is no activation"
    bias = _bias(site.uses[0])
    if bias is None:
        return None if site.operator in _ADD_BIAS else "it has no bias"
    if not is_weight(bias) or len(bias.users) != 1:
        return "its bias is computed, or read by others"
    return None


def _bias(use: Use) -> Any:
    if use.operator == "matmul":
        return use.node.args[0] if use.node.target is torch.ops.aten.addmm.default else None
    return use.node.args[2] if len(use.node.args) > 2 else use.node.kwargs.get("bias")


def _add_to_bias(program: Program, use: Use, shift: Tensor) -> None:
    bias = _bias(use)
    if bias is not None:
        old = program.weights[str(bias.target)]
        program.set_weight(bias, (old.double() + shift).to(old.dtype))
        return
    weight: Any = use.node.args[use.argument]
    name = str(weight.target).removesuffix(".weight") + ".bias"
    added = program.add_weight(name, shift.to(program.weights[str(weight.target)].dtype), like=weight)
    use.node.args = (*use.node.args[:2], added, *use.node.args[3:])
