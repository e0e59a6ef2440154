"""The ledger: plain records of what every pass did and what became of every compressed site. `sparc.report` shows
them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SkipRow:
    """Why one candidate was left alone."""

    where: str
    why: str


@dataclass
class PassRow:
    """What one pass did.

    Args:
        name: the pass and its options, as a recipe prints them.
        where: its selector.
        contract: what it promises: `exact`, `bounded(rtol)`, `approximate(metric ≥ floor)`.
        matches: rewrites made or sites changed.
        changed: graph nodes and weights that differ afterwards.
        skips: candidates it left alone, and why.
        measured: what the check found, one figure a name (`{"max relative error": 3e-7}`); empty when there was
            nothing to check.
        bytes_before: bytes of all weights before.
        bytes_after: and after.
        seconds: wall time of pass and check; left out of everything that must be reproducible.
    """

    name: str
    where: str = "*"
    contract: str = ""
    matches: int = 0
    changed: int = 0
    skips: list[SkipRow] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0


@dataclass
class SiteRow:
    """What became of one compressible weight.

    Args:
        weight: its name.
        module: the module path of its first use.
        source: the user's source line of that use.
        operator: `linear`, `conv`, `embedding`, ...
        encoding: the spec it is stored in; `dense` when it was not compressed.
        activation: the spec its input is quantized to; empty when it is not.
        snr_db: signal-to-noise ratio of the site's output against the uncompressed weight's, in decibels; None when
            unchanged.
        dense_bytes: bytes of the original weight.
        file_bytes: bytes in the artifact's files.
        resident_bytes: bytes the runtime keeps in memory for it.
        kernel: the operator that carries it in the target.
        note: why it stayed dense, or what was restored.
    """

    weight: str
    module: str = ""
    source: str = ""
    operator: str = ""
    encoding: str = "dense"
    activation: str = ""
    snr_db: float | None = None
    dense_bytes: int = 0
    file_bytes: int = 0
    resident_bytes: int = 0
    kernel: str = ""
    note: str = ""


@dataclass
class Ratio:
    """A paired comparison: the median of interleaved ratios and its 95% interval. Below 1 the artifact is faster."""

    against: str
    median: float
    low: float
    high: float
    pairs: int


@dataclass
class Summary:
    """Whole-model figures.

    Args:
        target: the target's name.
        data: `held out` when measured on the user's data, else `synthetic`.
        dense_bytes: bytes of the captured model's weights.
        file_bytes: bytes of every tensor in the artifact's weights file, whoever reads it.
        resident_bytes: bytes of weights the runtime keeps in memory.
        errors: for each output, `{"relative error", "cosine", "snr_db"}` against the captured model.
        parity: for each output, the lowering's largest relative difference from the program.
        latencies: measured ratios; empty when nothing was measured.
        metric: what the user's metric returned, if one was given.
    """

    target: str = ""
    data: str = "synthetic"
    dense_bytes: int = 0
    file_bytes: int = 0
    resident_bytes: int = 0
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)
    latencies: list[Ratio] = field(default_factory=list)
    metric: float | None = None


@dataclass
class Ledger:
    """Everything a compilation wrote down, in order."""

    passes: list[PassRow] = field(default_factory=list)
    sites: list[SiteRow] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; seconds and latencies included."""
        return asdict(self)
