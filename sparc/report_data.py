"""What reports show, worked out of the ledger: groups, orders and figures as text, the same for the terminal and the
page.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sparc.diag import Diagnostic, Severity
from sparc.ledger import PassRow, Ratio, SiteRow, Summary

DENSE = "dense"


# figures as text ------------------------------------------------------------------------------------------------------
def bytes_text(count: float) -> str:
    """`22.9 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    return (
        f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}" if abs(count) < 99.95 else f"{count:.0f} {unit}"
    )


def share_text(part: float, whole: float) -> str:
    """`25.4%`; a dash when there is no whole."""
    return f"{100 * part / whole:.1f}%" if whole else "–"


def decibel_text(value: float | None) -> str:
    """`41.2 dB`; `exact` when nothing was lost, a dash when it was not measured."""
    if value is None:
        return "–"
    return "exact" if value == math.inf else f"{value:.1f} dB"


def figure_text(name: str, value: float) -> str:
    """A measured figure in the form its name asks for."""
    if name.endswith("snr_db"):
        return decibel_text(value)
    if name == "cosine":
        return f"{value:.5f}"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.3g}"


def name_text(name: str) -> str:
    """A figure's name for people: what it is worth is said by its unit."""
    return name.removesuffix("snr_db").strip() or "signal to noise"


def measured_text(measured: Mapping[str, float]) -> str:
    """What a pass's check found: `sites measured 12, worst 31.2 dB`."""
    told = {name: value for name, value in measured.items() if name != "restored" or value}
    return "; ".join(f"{name_text(name)} {figure_text(name, value)}" for name, value in told.items())


def pass_text(row: PassRow) -> str:
    """A pass and where it ran, when that is not everywhere: `clean_up() where layers.*`."""
    where = row.where.removeprefix("*").strip()
    if not where:
        return row.name
    return f"{row.name} {where}" if where.startswith("(") else f"{row.name} where {row.where}"


def ratio_text(ratio: Ratio) -> str:
    """`0.61 × [0.58, 0.64]`."""
    return f"{ratio.median:.2f} × [{ratio.low:.2f}, {ratio.high:.2f}]"


def seconds_text(seconds: float) -> str:
    """`1.2 s`, `35 ms`; a dash when it was not measured."""
    if seconds <= 0:
        return "–"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def source_text(source: str) -> str:
    """A source line without the folders: `modeling_llama.py:248 in forward`."""
    return source.rpartition("/")[2]


# groups ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EncodingGroup:
    """The sites stored in one encoding (with inputs in one encoding): counts, bytes and signal-to-noise in decibels."""

    encoding: str
    activation: str
    sites: int
    dense_bytes: int
    file_bytes: int
    resident_bytes: int
    worst: float | None
    middle: float | None
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Reason:
    """Why some candidates were left alone: how often, and where for example."""

    why: str
    count: int
    examples: tuple[str, ...]


def is_compressed(site: SiteRow) -> bool:
    """Whether a site is stored in another form than the model's own."""
    return site.encoding != DENSE


def by_encoding(sites: Iterable[SiteRow]) -> list[EncodingGroup]:
    """Groups of sites, the one with most original bytes first and uncompressed ones last."""
    groups: dict[tuple[str, str], list[SiteRow]] = {}
    for site in sites:
        groups.setdefault((site.encoding, site.activation), []).append(site)
    rows = [_group(encoding, activation, members) for (encoding, activation), members in groups.items()]
    return sorted(rows, key=lambda row: (row.encoding == DENSE, -row.dense_bytes, row.encoding, row.activation))


def _group(encoding: str, activation: str, sites: Sequence[SiteRow]) -> EncodingGroup:
    known = [site.snr_db for site in sites if site.snr_db is not None]
    return EncodingGroup(
        encoding,
        activation,
        len(sites),
        sum(site.dense_bytes for site in sites),
        sum(site.file_bytes for site in sites),
        sum(site.resident_bytes for site in sites),
        min(known, default=None),
        median(known) if known else None,
        tuple(sorted({site.kernel for site in sites if site.kernel})),
    )


def worst_first(sites: Iterable[SiteRow]) -> list[SiteRow]:
    """Sites by signal-to-noise, the lowest first; those without a figure last, in their own order."""
    return sorted(sites, key=lambda site: math.inf if site.snr_db is None else site.snr_db)


def reasons(pairs: Iterable[tuple[str, str]]) -> list[Reason]:
    """(where, why) pairs by reason, the most frequent first."""
    places: dict[str, list[str]] = {}
    for where, why in pairs:
        places.setdefault(why or "no reason given", []).append(where)
    rows = [Reason(why, len(found), tuple(found[:3])) for why, found in places.items()]
    return sorted(rows, key=lambda row: -row.count)


def skip_reasons(row: PassRow) -> list[Reason]:
    """Why a pass left candidates alone."""
    return reasons((skip.where, skip.why) for skip in row.skips)


def dense_reasons(sites: Iterable[SiteRow]) -> list[Reason]:
    """Why sites stayed as they were."""
    return reasons((site.weight, site.note) for site in sites if not is_compressed(site))


def notes(sites: Iterable[SiteRow]) -> list[Reason]:
    """What is to be said of compressed sites: dense fallbacks, restored precision."""
    return reasons((site.weight, site.note) for site in sites if is_compressed(site) and site.note)


def by_block(sites: Iterable[SiteRow]) -> dict[str, list[SiteRow]]:
    """Sites by the repeated block they lie in: the module path up to its first number, else the whole path."""
    blocks: dict[str, list[SiteRow]] = {}
    for site in sites:
        parts = (site.module or site.weight).split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
        blocks.setdefault(".".join(parts[: number + 1]), []).append(site)
    return blocks


def worst_error(summary: Summary, name: str = "relative error") -> float | None:
    """The largest error over the outputs."""
    return max((figures[name] for figures in summary.errors.values() if name in figures), default=None)


def by_severity(diagnostics: Iterable[Diagnostic], severity: Severity) -> list[Diagnostic]:
    """The diagnostics of one severity."""
    return [each for each in diagnostics if each.severity is severity]


def by_code(diagnostics: Iterable[Diagnostic]) -> list[tuple[str, str, int, Diagnostic]]:
    """Code, title, count and first diagnostic of each code, the most frequent first."""
    found = list(diagnostics)
    counts = Counter(each.code.id for each in found)
    first = {each.code.id: each for each in reversed(found)}
    return [
        (code, first[code].code.title or first[code].what, count, first[code]) for code, count in counts.most_common()
    ]
