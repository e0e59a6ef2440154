"""The report as one HTML page: plots are SVG that is worked out here and drawn by the template, nothing is loaded from
elsewhere.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from sparc import report_data as data
from sparc.diag import Diagnostic, Severity
from sparc.ledger import Ledger, Ratio, SiteRow, Summary

_COLOURS = 7
_MOST_BLOCKS = 64
_WIDTH = 1040
_LONGEST = 28
_LABELS = 210
_FIGURES = 150


@dataclass(frozen=True)
class Tile:
    """A headline: what, the figure, and what to compare it with. `tone` is `good`, `bad` or empty."""

    title: str
    figure: str
    detail: str
    tone: str = ""


def page(ledger: Ledger, diagnostics: Sequence[Diagnostic], title: str) -> str:
    """The page's text."""
    source = resources.files("sparc").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        bytes=data.bytes_text,
        decibel=data.decibel_text,
        seconds=data.seconds_text,
        ratio=data.ratio_text,
        sortable=_sortable,
    )
    groups = data.by_encoding(ledger.sites)
    colours = _colours(group.encoding for group in groups)
    return environment.from_string(source).render(
        title=title,
        summary=ledger.summary,
        passes=ledger.passes,
        sites=ledger.sites,
        tiles=_tiles(ledger),
        groups=groups,
        colours=colours,
        latency=_latency_chart(ledger.summary.latencies),
        blocks=_block_chart(ledger.sites, colours),
        noise=_noise_chart(ledger.sites, colours),
        left_alone=_left_alone(ledger),
        warnings=data.by_severity(diagnostics, Severity.WARNING),
        remarks=data.by_code(data.by_severity(diagnostics, Severity.REMARK)),
        share=data.share_text,
        figure=data.figure_text,
        name_text=data.name_text,
        measured=data.measured_text,
        pass_text=data.pass_text,
        source_text=data.source_text,
        skips=data.skip_reasons,
    )


def _sortable(value: Any) -> str:
    """A number that the page's script can sort by; unmeasured last."""
    if value is None:
        return "1e999"
    return repr(float(value)).replace("inf", "1e998")


def _colours(encodings: Iterable[str]) -> dict[str, str]:
    """A style class for each encoding, in order; uncompressed is grey."""
    named = dict.fromkeys(each for each in encodings if each != data.DENSE)
    return {**{name: f"c{index % _COLOURS}" for index, name in enumerate(named)}, data.DENSE: "grey"}


# headlines ------------------------------------------------------------------------------------------------------------
def _tiles(ledger: Ledger) -> list[Tile]:
    summary = ledger.summary
    compressed = sum(map(data.is_compressed, ledger.sites))
    tiles = []
    if summary.dense_bytes:
        share = data.share_text(summary.file_bytes, summary.dense_bytes)
        detail = f"{data.bytes_text(summary.file_bytes)} of {data.bytes_text(summary.dense_bytes)}"
        tiles.append(Tile("size on disk", share, detail))
        resident = data.share_text(summary.resident_bytes, summary.dense_bytes)
        tiles.append(Tile("weights in memory", resident, data.bytes_text(summary.resident_bytes)))
    tiles += _error_tile(summary)
    for ratio in summary.latencies[:2]:
        tone = "good" if ratio.high < 1 else "bad" if ratio.low > 1 else ""
        tiles.append(Tile("latency", f"{ratio.median:.2f} ×", f"of {ratio.against}", tone))
    if summary.metric is not None:
        tiles.append(Tile("your metric", f"{summary.metric:.4g}", "returned by metric="))
    tiles.append(Tile("weights compressed", str(compressed), f"of {len(ledger.sites)}"))
    return tiles


def _error_tile(summary: Summary) -> list[Tile]:
    worst = data.worst_error(summary)
    if worst is None:
        return []
    cosines = [figures["cosine"] for figures in summary.errors.values() if "cosine" in figures]
    source = "held-out inputs" if summary.data == "held out" else f"{summary.data} inputs"
    detail = f"cosine {min(cosines):.5f}, {source}" if cosines else source
    return [Tile("largest output error", f"{100 * worst:.3g}%", detail)]


# plots ----------------------------------------------------------------------------------------------------------------
def _latency_chart(ratios: Sequence[Ratio]) -> dict[str, Any] | None:
    """Medians with their intervals, on an axis from 0 to a little above the slowest."""
    if not ratios:
        return None
    end = max(1.2, *(ratio.high * 1.1 for ratio in ratios))
    step = next(each for each in (0.2, 0.5, 1, 2, 5, 10, 50, 100, 1e6) if end / each <= 8)

    def place(value: float) -> float:
        return _LABELS + (_WIDTH - _LABELS - _FIGURES) * value / end

    rows = [
        {
            "name": ratio.against,
            "y": 20 + 34 * index,
            "low": place(ratio.low),
            "high": place(ratio.high),
            "at": place(ratio.median),
            "text": data.ratio_text(ratio),
            "tone": "good" if ratio.high < 1 else "bad" if ratio.low > 1 else "even",
        }
        for index, ratio in enumerate(ratios)
    ]
    ticks = [(place(index * step), f"{index * step:g} ×") for index in range(int(end / step) + 1)]
    return {"rows": rows, "ticks": ticks, "one": place(1.0), "width": _WIDTH, "height": 34 * len(ratios) + 34}


def _block_chart(sites: Sequence[SiteRow], colours: Mapping[str, str]) -> dict[str, Any] | None:
    """One bar per block: its original bytes as an outline, its stored bytes inside, by encoding."""
    if not any(site.dense_bytes for site in sites):
        return None
    runs = _runs(data.by_block(sites))
    shown, rest = runs[:_MOST_BLOCKS], runs[_MOST_BLOCKS:]
    if rest:
        shown.append((f"{len(rest)} more", [site for _, members in rest for site in members]))
    largest = max(sum(max(site.dense_bytes, site.file_bytes) for site in members) for _, members in shown)
    scale = (_WIDTH - _LABELS - _FIGURES) / max(largest, 1)
    rows = [_block_row(name, members, index, scale, colours) for index, (name, members) in enumerate(shown)]
    return {"rows": rows, "width": _WIDTH, "height": 22 * len(rows) + 8, "labels": _LABELS}


def _runs(blocks: Mapping[str, Sequence[SiteRow]]) -> list[tuple[str, Sequence[SiteRow]]]:
    """Blocks with their names; neighbours whose bytes are the same in every encoding are one: `layers.3 – 7 (each)`."""
    runs: list[tuple[list[str], Sequence[SiteRow]]] = []
    for name, sites in blocks.items():
        if runs and _stem(runs[-1][0][0]) == _stem(name) and _alike(runs[-1][1], sites):
            runs[-1][0].append(name)
        else:
            runs.append(([name], sites))
    return [
        (names[0] if len(names) == 1 else f"{names[0]} – {names[-1].rpartition('.')[2]}, each", sites)
        for names, sites in runs
    ]


def _stem(name: str) -> str | None:
    return name.rpartition(".")[0] if name.rpartition(".")[2].isdigit() else None


def _alike(one: Sequence[SiteRow], other: Sequence[SiteRow]) -> bool:
    def bytes_of(sites: Sequence[SiteRow]) -> list[tuple[str, int, int]]:
        return [(group.encoding, group.dense_bytes, group.file_bytes) for group in data.by_encoding(sites)]

    return bytes_of(one) == bytes_of(other)


def _block_row(
    name: str, sites: Sequence[SiteRow], index: int, scale: float, colours: Mapping[str, str]
) -> dict[str, Any]:
    dense, file = sum(site.dense_bytes for site in sites), sum(site.file_bytes for site in sites)
    parts, start = [], float(_LABELS)
    for group in data.by_encoding(sites):
        width = group.file_bytes * scale
        sizes = f"{data.bytes_text(group.file_bytes)} of {data.bytes_text(group.dense_bytes)}"
        title = f"{group.sites} × {group.encoding}: {sizes}"
        parts.append({"x": start, "width": width, "class": colours[group.encoding], "title": title})
        start += width
    text = f"{data.bytes_text(file)} of {data.bytes_text(dense)}"
    end = _LABELS + max(dense, file) * scale
    short = name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]
    return {"name": short, "y": 4 + 22 * index, "outline": dense * scale, "parts": parts, "end": end, "text": text}


def _noise_chart(sites: Sequence[SiteRow], colours: Mapping[str, str]) -> dict[str, Any] | None:
    """Signal-to-noise of every measured site, in the order of the model."""
    measured = [site for site in sites if site.snr_db is not None]
    finite = [site.snr_db for site in measured if site.snr_db is not None and math.isfinite(site.snr_db)]
    if not finite:
        return None
    low, high = 10 * math.floor(min(finite) / 10), 10 * math.ceil(max(finite) / 10)
    high = max(high, low + 10)
    exact = len(finite) < len(measured)
    left, right, top, bottom = 52, 12, 18, 26
    height = 250

    def place(value: float) -> float:
        if math.isinf(value):
            return float(top)
        start = top + (28 if exact else 0)
        return start + (height - start - bottom) * (high - value) / (high - low)

    step = (_WIDTH - left - right) / len(measured)
    dots = [
        {
            "x": left + step * (index + 0.5),
            "y": place(site.snr_db or 0.0),
            "class": colours[site.encoding],
            "title": f"{site.weight}: {data.decibel_text(site.snr_db)}, {site.encoding}",
        }
        for index, site in enumerate(measured)
    ]
    worst = min(range(len(measured)), key=lambda index: measured[index].snr_db or 0.0)
    anchor = "end" if worst > len(measured) / 2 else "start"
    label = {**dots[worst], "text": measured[worst].weight, "anchor": anchor}
    spacing = 10 if high - low <= 80 else 20
    ticks = [(place(value), f"{value}") for value in range(low, high + 1, spacing)]
    ticks += [(place(math.inf), "exact")] if exact else []
    return {
        "dots": dots, "ticks": ticks, "worst": label, "width": _WIDTH, "height": height, "left": left, "end": _WIDTH -
        right, "radius": 3.4 if len(dots) > 80 else 4.5,
    }  # fmt: skip


def _left_alone(ledger: Ledger) -> list[tuple[str, data.Reason]]:
    rows = [("stayed dense", reason) for reason in data.dense_reasons(ledger.sites)]
    rows += [("compressed", reason) for reason in data.notes(ledger.sites)]
    return rows + [(row.name.partition("(")[0], reason) for row in ledger.passes for reason in data.skip_reasons(row)]
