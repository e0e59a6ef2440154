"""What the cost model says of a whole entry, where there is no GPU to measure it on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparc.codegen.triton.lower import Lowered
from sparc.codegen.triton.operator import SiteOperator
from sparc.codegen.triton.prior import at, dense_seconds
from sparc.cost import Device
from sparc.ledger import Ratio
from sparc.program import Entry


def ratio(entry: Entry, lowered: Lowered, device: Device, tensors: Sequence[Tensor]) -> Ratio:
    """The sites' time over that of torch's dense products, with the same nodes around them; nothing else is counted.

    Args:
        entry: for the sizes of its inputs.
        lowered: what was made of it.
        device: where it would run.
        tensors: one for each input: their sizes say how many tokens there are.
    """
    sizes = _sizes(entry, tensors)
    ours = theirs = 0.0
    for operator in lowered.operators.values():
        tokens = _tokens(operator, sizes)
        regime = next(each for each in operator.regimes if each.limit is None or tokens <= each.limit)
        ours += at(regime.seconds, tokens)
        theirs += at(dense_seconds(operator.site.problem, device, cached=True), tokens)
    value = ours / theirs if theirs else 1.0
    return Ratio(f"uncompressed, estimated for {device.name}", value, value, value, 0)


def _sizes(entry: Entry, tensors: Sequence[Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for node, tensor in zip(entry.placeholders, tensors, strict=True):
        kind = node.meta["val"]
        if isinstance(kind, torch.Tensor):
            found.update((str(symbol), int(size)) for symbol, size in zip(kind.shape, tensor.shape, strict=True))
    return found


def _tokens(operator: SiteOperator, sizes: dict[str, int]) -> int:
    kind, access = operator.site.x.meta["val"], operator.site.problem.access
    known = [size if isinstance(size, int) else _value(size, sizes) for size in kind.shape]
    return int(access.tokens(known))


def _value(size: torch.SymInt, sizes: dict[str, int]) -> int:
    expression = size.node.expr
    return max(int(expression.subs({symbol: sizes.get(str(symbol), 1) for symbol in expression.free_symbols})), 1)
