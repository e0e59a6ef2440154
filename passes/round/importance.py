"""What a rounding error in each column of a site costs."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from sparc.analysis.sites import Site, Use
from sparc.pass_base import PassContext
from sparc.program import Program

DAMPING = 0.01


def column_importance(program: Program, site: Site, context: PassContext) -> Tensor | None:
    """The mean square of the input that each element of a site's matrix meets, averaged over the site's uses.

    An error in an element changes the output by that error times the element's input, so squared errors cost the
    input's mean square (Wanda, Sun et al. 2023, prunes by it; AWQ, Lin et al. 2023, scales by it).

    Returns:
        Float32 `[reduce]`, or `[batch..., out, reduce]` for convolutions, whose groups read different inputs, and for
        stacked matrices that read different rows; one that got no row counts as all together. None when calibration
        measured no input of the site.
    """
    return _moment(program, site, context, 2)


def column_means(program: Program, site: Site, context: PassContext) -> Tensor | None:
    """The mean of the input that each element of a site's matrix meets, in the shapes of `column_importance`."""
    return _moment(program, site, context, 1)


def damped(importance: Tensor) -> Tensor | None:
    """Importance plus a hundredth of its mean; None where there is none.

    Calibration sees few inputs: a column that met only zeros there may still meet others.
    """
    mean = float(importance.mean())
    return importance + DAMPING * mean if 0 < mean < math.inf else None


def input_moments(program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
    """The statistics that `column_importance` wants of the selected sites, as (node, kind)."""
    for site in context.sites(program):
        for use in site.uses:
            if isinstance(use.input, fx.Node):
                yield _watched(use, program.weights[site.weight])


def _moment(program: Program, site: Site, context: PassContext, power: int) -> Tensor | None:
    """The mean of the input to a power, 1 or 2, averaged over the site's uses."""
    weight = program.weights[site.weight]
    found = [_of_use(use, weight, context, power) for use in site.uses]
    known = [mean for mean in found if mean is not None]
    return torch.stack(known).mean(0) if known else None


def _watched(use: Use, weight: Tensor) -> tuple[fx.Node, str]:
    assert isinstance(use.input, fx.Node)
    if use.operator == "grouped":
        return use.node, "run_moments"
    return use.input, f"moments:{1 - weight.ndim}" if use.operator.startswith("conv") else "moments"


def _of_use(use: Use, weight: Tensor, context: PassContext, power: int) -> Tensor | None:
    if context.statistics is None or not isinstance(use.input, fx.Node):
        return None
    moments = context.statistics(*_watched(use, weight))
    if moments is None:
        return None
    mean = moments.select(-2, power - 1).float()
    if use.operator == "conv":
        groups = mean.numel() // weight.shape[1]
        mean = mean.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
    elif use.operator == "conv_transposed":
        mean = mean.unsqueeze(1)
    elif use.operator == "grouped":
        return mean.unsqueeze(1).expand(weight.shape)
    else:
        return mean
    spatial = [1] * (weight.ndim - 2)
    return use.view.to_matrix(mean.reshape(*mean.shape, *spatial).expand(weight.shape))
