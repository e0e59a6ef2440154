"""What a rounding error in each column of a site costs."""

import torch
from torch import Tensor, fx

from sparc.analysis.sites import Site
from sparc.pass_base import PassContext
from sparc.program import Program


def column_importance(program: Program, site: Site, context: PassContext) -> Tensor | None:
    """`[reduce]` float32: the mean square of each input column, averaged over the site's uses; None when nothing is known.

    An error in column j of the weight changes the output by that error times the input's column j, so squared errors are
    weighted by the input's mean square.
    """
    found = [measured(use.input, context) for use in site.uses if isinstance(use.input, fx.Node)]
    known = [moments for moments in found if moments is not None]
    columns = site.view.matrix_shape(program.weights[site.weight].shape)[-1]
    if not known or any(moments.numel() != columns for moments in known):
        return None
    return torch.stack(known).mean(0).float()


def measured(node: fx.Node, context: PassContext) -> Tensor | None:
    """The mean square of each channel of a node's value, from calibration."""
    moments = context.statistics(node, "moments") if context.statistics is not None else None
    return moments[1] if moments is not None else None
