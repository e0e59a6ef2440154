"""Two encodings in one model: which sites are worth more bytes, when a budget limits all of them together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site
from sparc.diag import Diagnostics
from sparc.encoding.base import Encoding
from sparc.encoding.compose import compose
from sparc.execute import Values, execute
from sparc.program import Program, Weight


@dataclass(frozen=True)
class Rounded:
    """A site that was rounded to the coarser encoding.

    Args:
        site: the site.
        original: its weight before.
        importance: the cost of a squared error in each column or element; None when nothing is known.
    """

    site: Site
    original: Weight
    importance: Tensor | None


def worth_more(
    program: Program,
    rounded: Sequence[Rounded],
    finer: Encoding,
    budget: float,
    examples: Mapping[str, list[Tensor]],
    diagnostics: Diagnostics,
) -> list[Rounded]:
    """The sites to round to `finer` instead: those that remove most output noise for each byte, within the budget.

    In entries with a cache, the products of one value go together: of one encoding they become one product. Where the
    budget leaves nothing to share out, or sensitivities cannot be measured, there are none, with a remark.

    Args:
        program: with the sites rounded to the coarser encoding.
        rounded: those sites.
        finer: an encoding that costs more bytes.
        budget: bytes of all these sites together, as a part of their dense bytes.
        examples: for each entry, flat inputs that sensitivities are measured on.
        diagnostics: where remarks go.
    """
    left = budget * sum(each.original.tensor.nbytes for each in rounded)
    costs = {}
    for each in rounded:
        coarse, fine = _sizes(program, each, finer)
        left -= coarse
        if fine is not None and fine > coarse:
            costs[each.site.weight] = fine - coarse
    gains: dict[str, float] | str
    if not costs:
        gains = "no site takes it, or it takes no more bytes than what they are rounded to"
    elif min(costs.values()) > left:
        gains = f"a budget of {budget:g} leaves no bytes"
    else:
        gains = _gains(program, rounded, examples)
    if isinstance(gains, str):
        diagnostics.remark(codes.NOT_MATCHED, f"no site is rounded to {finer}", why=gains)
        return []
    chosen = []
    candidates = [
        [each for each in group if each.site.weight in costs and gains.get(each.site.weight, 0) > 0]
        for group in _together(program, rounded)
    ]
    for group in sorted(
        filter(None, candidates), key=lambda group: -_worth(group, gains) / max(1, _worth(group, costs))
    ):
        if _worth(group, costs) <= left:
            left -= _worth(group, costs)
            chosen.extend(group)
    return chosen


def _worth(group: Sequence[Rounded], of: Mapping[str, float]) -> float:
    return sum(of[each.site.weight] for each in group)


def _together(program: Program, rounded: Sequence[Rounded]) -> Iterable[list[Rounded]]:
    """The sites that are chosen together: one by one, or by the value that they multiply."""
    groups: dict[object, list[Rounded]] = {}
    for each in rounded:
        use = each.site.uses[0]
        alone = use.operator != "linear" or program.entries[use.entry].cache is None
        groups.setdefault(each.site.weight if alone else use.input, []).append(each)
    return groups.values()


def _sizes(program: Program, rounded: Rounded, finer: Encoding) -> tuple[int, int | None]:
    """Bytes of a site as it is, and under the finer encoding; None where that does not take it."""
    grid = program.grid(rounded.site.weight)
    assert grid is not None
    matrix = rounded.site.view.matrix_shape(rounded.original.tensor.shape)
    composed = compose(rounded.original.grid.spec if rounded.original.grid else None, finer)
    fine = int(composed.bytes_on(grid, matrix)) if composed.accepts(matrix) is None else None
    return int(grid.spec.bytes_on(grid, matrix)), fine


def _gains(
    program: Program, rounded: Sequence[Rounded], examples: Mapping[str, list[Tensor]]
) -> dict[str, float] | str:
    """The output noise of each site whose noise is a number; or why none can be measured."""
    uses = {use.node: use.entry for each in rounded for use in each.site.uses}
    try:
        slopes = sensitivities(program, uses, examples)
    except RuntimeError as error:  # torch's, for an operator without a derivative
        return f"gradients cannot be taken: {str(error).splitlines()[0][:200]}"
    if not any(slopes.values()):
        return "no floating output depends on a site, so nothing says which one matters"
    noises = {each.site.weight: output_noise(program, each, slopes) for each in rounded}
    return {name: noise for name, noise in noises.items() if math.isfinite(noise)}


def output_noise(program: Program, rounded: Rounded, slopes: Mapping[fx.Node, float]) -> float:
    """The squared change of the program's outputs that rounding one site makes, to first order.

    Errors in a weight's elements are taken to be independent: an element's error adds its square times the input's mean
    square to one output channel, and each channel of a use is as sensitive as the average one.
    """
    site, original = rounded.site, rounded.original.tensor
    matrix = site.view.to_matrix((program.weights[site.weight] - original).float()).square()
    rows = matrix.numel() // matrix.shape[-1]
    cost = torch.ones(()) if rounded.importance is None else rounded.importance
    read, looked_up = float((matrix * cost).sum()), float(matrix.sum()) / matrix.shape[-1]
    return sum(slopes[use.node] * (looked_up if use.operator == "embedding" else read) / rows for use in site.uses)


def sensitivities(
    program: Program, uses: Mapping[fx.Node, str], examples: Mapping[str, list[Tensor]]
) -> dict[fx.Node, float]:
    """For each node, the squared gradient of a random projection of all floating outputs, summed over the node's value.

    With a standard normal projection that is, on average, the squared norm of the outputs' Jacobian (Hutchinson 1989).

    Args:
        program: is run once per entry, forwards and backwards.
        uses: the nodes and their entries.
        examples: for each entry, flat inputs.
    """
    found = dict.fromkeys(uses, 0.0)
    for name, tensors in examples.items():
        values: dict[fx.Node, Tensor] = {}

        def track(node: fx.Node, value: object, _: Values, values: dict[fx.Node, Tensor] = values) -> None:
            if node in uses and isinstance(value, Tensor):
                values[node] = value if value.requires_grad else value.requires_grad_()

        outputs = execute(program.entries[name].graph, program.weights, tensors, watch=track, grad=True)
        loss = _projection([value for value in outputs if isinstance(value, Tensor) and value.requires_grad])
        if loss is None or not values:
            continue
        gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
        for node, gradient in zip(values, gradients, strict=True):
            if gradient is not None:
                found[node] = float(gradient.double().square().sum())
    return found


def _projection(outputs: Sequence[Tensor]) -> Tensor | None:
    generator = torch.Generator().manual_seed(0)
    terms = [(each * torch.randn(each.shape, generator=generator).to(each.dtype)).sum() for each in outputs]
    return torch.stack([term.float() for term in terms]).sum() if terms else None
