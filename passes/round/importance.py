"""What a rounding error in each column of a site costs."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from sparc.analysis.sites import Site, Use
from sparc.grouped import runs
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
    weight = program.weights[site.weight]
    found = [_of_use(use, weight, context) for use in site.uses]
    known = [importance for importance in found if importance is not None]
    return torch.stack(known).mean(0) if known else None


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
                yield use.input, _kind(use, program.weights[site.weight])
                if use.operator == "grouped":
                    yield from ((node, "batches") for node in (use.node.args[0], use.node.args[2]))  # type: ignore[misc]


def _kind(use: Use, weight: Tensor) -> str:
    return f"moments:{1 - weight.ndim}" if use.operator.startswith("conv") else "moments"


def _of_use(use: Use, weight: Tensor, context: PassContext) -> Tensor | None:
    if context.statistics is None or not isinstance(use.input, fx.Node):
        return None
    moments = context.statistics(use.input, _kind(use, weight))
    if moments is None:
        return None
    square = moments[1].float()
    if use.operator == "conv":
        groups = square.numel() // weight.shape[1]
        square = square.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
    elif use.operator == "conv_transposed":
        square = square.unsqueeze(1)
    elif use.operator == "grouped":
        return _of_runs(use, square, context).unsqueeze(1).expand(weight.shape)
    else:
        return square
    spatial = [1] * (weight.ndim - 2)
    return use.view.to_matrix(square.reshape(*square.shape, *spatial).expand(weight.shape))


def _of_runs(use: Use, square: Tensor, context: PassContext) -> Tensor:
    """The mean square of each run's own rows, `[runs, reduce]`; `square`, that of all rows, where it has none."""
    assert context.statistics is not None
    x, ends = (context.statistics(use.node.args[place], "batches") for place in (0, 2))  # type: ignore[arg-type]
    pairs = [[value[rows].float().square() for rows in runs(end)] for value, end in zip(x, ends, strict=True)]
    whole = [torch.cat(parts) for parts in zip(*pairs, strict=True)]
    return torch.stack([rows.mean(0) if len(rows) else square for rows in whole])
