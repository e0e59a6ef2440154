"""Scaling by activations: channels that are large where a weight reads them are rounded more finely."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site, Use
from sparc.contract import Bounded
from sparc.diag import PassError
from sparc.encoding.base import Encoding
from sparc.encoding.int_grid import IntGrid
from sparc.pass_base import Pass, PassContext, Stage
from sparc.passes.equalize.folds import ChannelFold, class_fold, rescalable, rescale, value_folds
from sparc.passes.equalize.smooth import InputGroup, input_groups, multiply
from sparc.passes.rotate.weights import Store
from sparc.passes.round.fit import Fit, check_fit, fit_grid
from sparc.program import Program

_LEAST = 1e-4  # of the greatest channel: what smaller ones count as


@dataclass(frozen=True)
class Awq(Pass):
    """linear(x, w) => linear(x / s, w * s) with s = a^r, where a channel's a is its mean magnitude in x.

    Of `points` exponents r from 0 on, each value gets the one for which rounding the weights that read it would change
    their products least, in the mean square over calibration data; r = 0, nothing, is among them. (AWQ, Lin et al.
    2023, section 3.2; the released code compares what a whole attention or a whole gated layer returns, here it is the
    sum over the products that read the value.) The factors are divided out of what writes the value: the gain of a
    norm, the rows of the linear layer before a ReLU, of the ungated branch of a gated layer, or of the values of an
    attention.

    Args:
        encoding: what the weights will be rounded to.
        fit: how grids are found, as in `round`.
        points: how many exponents are tried: `0, 1 / points, 2 / points, ...`
        insert: where nothing that writes a value can take its factors, multiply it by them, if that lowers the squared
            error of the products by this share; never by default.

    Raises:
        PassError: SPARC209 for fewer than 2 points, a share outside 0 to 1, or a fit that the encoding does not take.
    """

    name: ClassVar[str] = "awq"
    stage: ClassVar[Stage] = Stage.EQUALIZE
    needs: ClassVar[frozenset[str]] = frozenset({"absmean", "rows"})
    scope: ClassVar[str] = "program"

    encoding: Encoding = field(default=IntGrid(4, 32, symmetric=False))
    fit: Fit = "range"
    points: int = 20
    insert: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit("awq", self.fit, self.encoding)
        if self.points < 2:
            raise PassError(codes.BAD_OPTION, f"awq cannot try {self.points!r} exponents", hint="points=20")
        if self.insert is not None and not 0 <= self.insert < 1:
            raise PassError(codes.BAD_OPTION, f"insert={self.insert!r}", hint="a share of the error: 0.2")

    @property
    def contract(self) -> Bounded:
        """The function stays the same."""
        return Bounded(1e-4)

    def watches(self, program: Program, context: PassContext) -> Iterator[tuple[fx.Node, str]]:
        """The mean magnitudes and some rows of every value that may be rescaled."""
        for place in self._candidates(program, context):
            for _, use, _ in _reads(place, _uses(program, context)):
                yield use.input, "absmean"
                yield use.input, "rows"

    def run(self, program: Program, context: PassContext) -> None:
        """Look for every value's factors on the weights as they are, then put them in place."""
        found: list[tuple[ChannelFold | InputGroup, Tensor]] = []
        known = _uses(program, context)
        for place in self._candidates(program, context):
            if isinstance(place, ChannelFold) and any(program.grid(name) is not None for name in place.weights):
                context.skip(place.readers[0], "what writes or reads its input is rounded already")
                continue
            readers = [_reader(program, *each, context) for each in _reads(place, known)]
            factor = self._factor(readers, place, context)
            if factor is not None:
                found.append((place, factor))
        store = Store(program, context)
        for place, factor in found:
            if not context.edit():
                return
            if isinstance(place, InputGroup):
                multiply(store, place, factor.reciprocal())
            else:
                rescale(store, place, factor.reciprocal())

    def _candidates(self, program: Program, context: PassContext) -> list[ChannelFold | InputGroup]:
        """What can be rescaled without an operator, and what only with one, if the pass may insert it."""
        nodes = [node for node, (_, use) in _uses(program, context).items() if use.operator == "linear"]
        classes, refused = rescalable(program, nodes)
        folds = [class_fold(program, found) for found in classes]
        folds += [fold for fold in value_folds(program) if set(fold.readers).intersection(nodes)]
        folded = {node for fold in folds for node in fold.readers}
        groups = [] if self.insert is None else input_groups(program, context)
        groups = [group for group in groups if not folded.intersection(group.nodes)]
        reached = folded | {node for group in groups for node in group.nodes}
        for node, why in refused.items():
            if node not in reached:
                context.skip(node, f"its input cannot be rescaled: {why}")
        return [*folds, *groups]

    def _factor(
        self, readers: Sequence["Reader | str"], place: ChannelFold | InputGroup, context: PassContext
    ) -> Tensor | None:
        """What columns are to be multiplied with; None, with the reason as a remark, for nothing."""
        inserted = isinstance(place, InputGroup)
        where = place.nodes[0] if isinstance(place, InputGroup) else place.readers[0]
        known = [reader for reader in readers if isinstance(reader, Reader)]
        known = [reader for reader in known if self.encoding.accepts(reader.matrix.shape) is None]
        if not known:
            why = next((each for each in readers if isinstance(each, str)), f"{self.encoding} does not take its weight")
            context.skip(where, why)
            return None
        magnitude = magnitudes(known)
        trials = [scales(magnitude, power / self.points) for power in range(self.points)]
        errors = [sum(rounding_error(reader, each, self.encoding, self.fit) for reader in known) for each in trials]
        best = min(range(self.points), key=errors.__getitem__)
        most = (1 - (self.insert or 0)) * errors[0] if inserted else errors[0]
        if not (best and errors[best] <= most):
            context.skip(where, f"no factors lower the error of rounding to {self.encoding} enough")
            return None
        return trials[best]


@dataclass(frozen=True)
class Reader:
    """A weight that reads a value.

    Args:
        matrix: `[out, in]`, as it is.
        rows: some of the value's rows, `[rows, in]` float32.
        magnitude: the mean magnitude of each column's input, `[in]` float64.
        channels: the channel that each column reads, `[in]` int64.
    """

    matrix: Tensor
    rows: Tensor
    magnitude: Tensor
    channels: Tensor


def magnitudes(readers: Sequence[Reader]) -> Tensor:
    """`[channels]` float64: the mean magnitude of each channel, over all columns that read it."""
    total, count = torch.zeros(2, 1 + max(int(reader.channels.max()) for reader in readers), dtype=torch.float64)
    for reader in readers:
        total.index_add_(0, reader.channels, reader.magnitude)
        count.index_add_(0, reader.channels, torch.ones_like(reader.magnitude))
    return total / count


def scales(magnitude: Tensor, power: float) -> Tensor:
    """`magnitude^power`, divided by the root of its greatest times its least; 1 for power 0."""
    greatest = magnitude.max()
    found = (magnitude.clamp(min=_LEAST * greatest) if greatest > 0 else torch.ones_like(magnitude)) ** power
    return found / (found.max() * found.min()).sqrt()


def rounding_error(reader: Reader, scale: Tensor, encoding: Encoding, fit: Fit) -> float:
    """`tr(D G Dᵀ)`, where `D = round(W S) S⁻¹ - W` and G is the Gram matrix of the rows: the mean squared change of the
    reader's products.
    """
    each = scale[reader.channels]
    scaled = (reader.matrix.double() * each).to(reader.matrix.dtype)
    rounded = encoding.round(scaled, fit_grid(None, scaled, encoding, fit, None))
    change = (rounded.double() / each - reader.matrix.double()).float()
    return float((reader.rows @ change.T).double().square().sum() / len(reader.rows))


def _uses(program: Program, context: PassContext) -> dict[fx.Node, tuple[Site, Use]]:
    return {use.node: (site, use) for site in context.sites(program) for use in site.uses}


def _reads(
    place: ChannelFold | InputGroup, known: dict[fx.Node, tuple[Site, Use]]
) -> Iterator[tuple[Site, Use, Tensor]]:
    """The selected products of a place, and the channels that their columns read."""
    if isinstance(place, InputGroup):
        columns = [(node, torch.arange(int(place.x.meta["val"].shape[-1])).unsqueeze(0)) for node in place.nodes]
    else:
        columns = list(place.columns)
    for node, channels in columns:
        if node in known and known[node][1].operator in ("linear", "matmul"):
            yield *known[node], channels[0]


def _reader(program: Program, site: Site, use: Use, channels: Tensor, context: PassContext) -> Reader | str:
    """A weight that is not rounded yet, and what it reads; or why its error is not known."""
    assert context.statistics is not None
    magnitude, rows = (context.statistics(use.input, kind) for kind in ("absmean", "rows"))
    if magnitude is None or rows is None:
        return "no calibration data reached it"
    return Reader(site.view.to_matrix(program.weights[site.weight]), rows, magnitude, channels)
