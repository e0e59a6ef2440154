"""What a pass is, and what it may use while it runs. The driver that runs passes is in `sparc.driver`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, ClassVar

from torch import Tensor, fx

from sparc import codes
from sparc.analysis.sites import Site, find_sites
from sparc.contract import Contract
from sparc.diag import Diagnostics, Location
from sparc.encoding.base import Encoding, options_text
from sparc.ledger import SkipRow
from sparc.options import check_options
from sparc.program import Program, location
from sparc.selector import Selectable


class Stage(IntEnum):
    """The order in which kinds of passes are legal: a later kind would undo or invalidate what an earlier one
    decided.
    """

    CANONICALIZE = 0
    FOLD = 1
    COALESCE = 2
    CUT = 3
    ROTATE = 4
    EQUALIZE = 5
    LOW_RANK = 6
    MASK = 7
    ROUND = 8
    ACTIVATION = 9
    CORRECT = 10
    ENCODE = 11
    CAST = 12


@dataclass(frozen=True)
class Pass(ABC):
    """A frozen dataclass whose fields are its options.

    Class attributes: `name` (as recipes spell it), `stage`, `needs` (kinds of statistics, see `sparc.calibration`;
    empty when the pass
    needs no data), and `scope`: `match` when every edit is local and can be checked by itself, `program` when only
    the whole can.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[str] = "match"

    def __post_init__(self) -> None:
        """Check the types of the options; a subclass that checks more calls this first.

        Raises:
            PassError: SPARC209 for an option of the wrong type.
        """
        check_options(self, repr(self.name))

    @property
    @abstractmethod
    def contract(self) -> Contract:
        """What the pass promises."""

    @abstractmethod
    def run(self, program: Program, context: "PassContext") -> None:
        """Edit the program in place. The driver hands over a clone and checks the result."""

    def watches(self, program: Program, context: "PassContext") -> Iterator[tuple[fx.Node, str]]:
        """Which statistics the pass wants of which nodes, as (node, kind): by default every kind in `needs`, of
        every selected site's input.
        """
        for site in context.sites(program):
            for use in site.uses:
                if isinstance(use.input, fx.Node):
                    for kind in sorted(self.needs):
                        yield use.input, kind

    def __str__(self) -> str:
        encodings = [field.name for field in fields(self) if isinstance(getattr(self, field.name), Encoding)]
        return f"{self.name}({options_text(self, encodings)})"


@dataclass
class Rewrite:
    """One applied match: the region before and after, over the same inputs.

    Args:
        where: the user's place.
        before: a graph whose placeholders are named like the boundary's nodes.
        after: the same for the replacement.
        boundary: names of the boundary nodes, one per placeholder of both.
        wide: float64 values of weights made for the replacement, before they are rounded to their dtype.
        weights: the weights both regions use.
        entry: the entry's name.
        rule: the name of the rewrite that made it, when a pass has several.
    """

    where: Location
    before: fx.Graph
    after: fx.Graph
    boundary: tuple[str, ...]
    wide: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    entry: str
    rule: str = ""


class PassContext:
    """What a pass may use: the selected sites, statistics, and a place to say what it skipped.

    Args:
        diagnostics: where remarks go.
        claims: whether a weight is claimed by this step's selector: a site, or what a pass offers besides.
        statistics: `statistics(node, kind)` gives what was measured on a node's value; None when there is no data.
        limit: stop after so many edits (the driver bisects with it).
        block: only sites whose last use is in this block may be edited; None for all.
        reference: the program before the first pass that masks, rounds or approximates otherwise behind `LOW_RANK`, so
            that its weights stand for the same function as those of now; None while there was none.
        example: for each entry, flat inputs that a pass may run the program on.
        calibration: for each entry, all batches of calibration data, for what statistics of values do not tell.

    Attributes:
        wide: float64 values of weights, by name, as a pass whose scope is the program computed them before they were
            rounded to their dtype: the whole program is then checked with them, to 1e-9.
        memory: what a pass keeps from block to block.
    """

    def __init__(
        self,
        diagnostics: Diagnostics | None = None,
        *,
        claims: Callable[[Selectable], bool] | None = None,
        statistics: Callable[[fx.Node, str], Any] | None = None,
        limit: int | None = None,
        block: int | None = None,
        reference: Program | None = None,
        example: Mapping[str, list[Tensor]] | None = None,
        calibration: Mapping[str, list[list[Tensor]]] | None = None,
    ) -> None:
        self.diagnostics = diagnostics if diagnostics is not None else Diagnostics()
        self.statistics = statistics
        self.limit = limit
        self.block = block
        self.reference = reference
        self.example = dict(example or {})
        self.calibration = dict(calibration or {})
        self.edits = 0
        self.skips: dict[SkipRow, None] = {}
        self.rewrites: list[Rewrite] = []
        self.wide: dict[str, Tensor] = {}
        self.memory: dict[str, Any] = {}
        self._claims = claims

    def sites(self, program: Program) -> Iterator[Site]:
        """The selected sites that are not encoded yet; every other weight matrix that was selected is skipped with
        its reason.
        """
        found, others = find_sites(program)
        for site in found:
            block = max(use.node.meta.get("block", 0) for use in site.uses)  # by then all of its inputs are known
            in_block = self.block is None or block == self.block
            if not site.encoded and in_block and self.selects(site):
                yield site
        if self.block is None:
            for other in others:
                self.skip(other.weight, other.why, other.where)

    def selects(self, weight: Selectable) -> bool:
        """Whether the step's selector claims a site, or another weight."""
        return self._claims is None or self._claims(weight)

    def edit(self) -> bool:
        """Ask before each edit: False once the limit is reached, and then the pass leaves the candidate alone,
        silently.
        """
        if self.limit is not None and self.edits >= self.limit:
            return False
        self.edits += 1
        return True

    def skip(self, what: "str | fx.Node", why: str, where: Location | None = None) -> None:
        """Say why a candidate was left alone. `what` is a node, or a weight's name."""
        if isinstance(what, fx.Node):
            where = where or location(what)
            what = where.module or what.name
        self.skips.setdefault(SkipRow(what, why))
        self.diagnostics.remark(codes.NOT_MATCHED, f"{what} was left alone", where=where, why=why)


@dataclass
class Samples:
    """Inputs that checks run on: for each entry, a list of flat input tensors.

    Args:
        held_out: inputs that calibration never sees.
        calibration: inputs for statistics.
        synthetic: whether they were made up from the example inputs.
        example: the example inputs, usually the smallest; rewritten regions are checked on them.
    """

    held_out: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    calibration: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    synthetic: bool = True
    example: dict[str, list[Tensor]] = field(default_factory=dict)


def by_name(nodes: Iterable[fx.Node]) -> dict[str, fx.Node]:
    """Nodes by name."""
    return {node.name: node for node in nodes}
