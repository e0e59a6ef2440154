"""The report on a terminal: whole-model lines, one row per pass, the worst sites, and what was left alone."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparc import report_data as data
from sparc.diag import Diagnostic, Severity
from sparc.ledger import Ledger, PassRow, SiteRow, Summary

_WORST = 10
_REASONS = 6


def render(ledger: Ledger, diagnostics: Sequence[Diagnostic], *, everything: bool = False) -> RenderableType:
    """The whole report.

    Args:
        ledger: the records.
        diagnostics: warnings and remarks.
        everything: every site and every remark instead of the worst and the counts.
    """
    parts: list[RenderableType] = [summary_lines(ledger.summary, ledger.sites)]
    if ledger.passes:
        parts.append(pass_table(ledger.passes))
    if ledger.sites:
        parts += [encoding_table(ledger.sites), site_table(ledger.sites, everything=everything)]
    parts += _left_alone(ledger, everything)
    parts += _diagnostics(diagnostics, everything)
    return Group(*(each for part in parts for each in (part, Text())))


def to_text(renderable: RenderableType, width: int = 120) -> str:
    """Plain text of a rich object, without colours or trailing blanks."""
    console = Console(width=width, no_color=True, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


# whole model ----------------------------------------------------------------------------------------------------------
def summary_lines(summary: Summary, sites: Sequence[SiteRow]) -> RenderableType:
    """Target, size, errors, latencies and the metric."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    compressed = sum(map(data.is_compressed, sites))
    grid.add_row("target", f"{summary.target or '–'}, {compressed} of {len(sites)} weights compressed")
    if summary.dense_bytes:
        file, resident, dense = summary.file_bytes, summary.resident_bytes, summary.dense_bytes
        grid.add_row("size", _size_line(file, resident, dense))
    source = "your held-out inputs" if summary.data == "held out" else f"{summary.data} inputs"
    for index, (name, figures) in enumerate(summary.errors.items()):
        shown = ", ".join(f"{data.name_text(each)} {data.figure_text(each, value)}" for each, value in figures.items())
        parity = f", lowering {summary.parity[name]:.1e}" if name in summary.parity else ""
        grid.add_row(
            "error" if index == 0 else "", Text(f"{name}: {shown}{parity}" + (f"  ({source})" if index == 0 else ""))
        )
    for index, ratio in enumerate(summary.latencies):
        measured = f"{ratio.pairs} pairs, 95% interval" if ratio.pairs else "by the cost model: unmeasured"
        line = Text(f"{data.ratio_text(ratio)} {ratio.against}  ({measured})")
        line.stylize("green" if ratio.high < 1 else "red" if ratio.low > 1 else "yellow", 0, 6)
        grid.add_row("latency" if index == 0 else "", line)
    if summary.metric is not None:
        grid.add_row("metric", f"{summary.metric:.6g}")
    return grid


def _size_line(file: int, resident: int, dense: int) -> str:
    of = f"of {data.bytes_text(dense)}"
    in_files = f"{data.bytes_text(file)} in files ({data.share_text(file, dense)} {of})"
    return f"{in_files}, {data.bytes_text(resident)} resident ({data.share_text(resident, dense)})"


# passes ---------------------------------------------------------------------------------------------------------------
def pass_table(rows: Iterable[PassRow]) -> Table:
    """One row per pass."""
    table = titled("Passes", "pass", "contract", ">matches", ">skipped", "measured", ">bytes", ">time")
    for row in rows:
        change = row.bytes_after - row.bytes_before
        table.add_row(
            Text(data.pass_text(row)),
            Text(row.contract),
            str(row.matches or "–"),
            str(len(row.skips) or "–"),
            Text(data.measured_text(row.measured)),
            f"{'+' if change > 0 else '−'}{data.bytes_text(abs(change))}" if change else "–",
            data.seconds_text(row.seconds),
            style="" if row.changed else "dim",
        )
    return table


# sites ----------------------------------------------------------------------------------------------------------------
def encoding_table(sites: Iterable[SiteRow]) -> Table:
    """One row per encoding."""
    table = titled("Encodings", "weights", "inputs", ">sites", ">was", ">file", ">resident", ">worst", "kernel")
    for row in data.by_encoding(sites):
        table.add_row(
            Text(row.encoding),
            Text(row.activation.replace("+", " + ")),
            str(row.sites),
            data.bytes_text(row.dense_bytes),
            data.bytes_text(row.file_bytes),
            data.bytes_text(row.resident_bytes),
            data.decibel_text(row.worst),
            Text(", ".join(row.kernels)),
            style="dim" if row.encoding == data.DENSE else "",
        )
    for index, width in ((0, 24), (1, 24), (-1, 20)):
        column = table.columns[index]
        longest = max((len(str(cell)) for cell in column.cells), default=0)
        column.min_width = min(width, longest)
    return table


def site_table(sites: Sequence[SiteRow], *, everything: bool = False) -> Table:
    """Compressed sites, the worst first; all of them, and the uncompressed too, with `everything`."""
    rows = data.worst_first(sites if everything else filter(data.is_compressed, sites))
    shown = rows if everything else rows[:_WORST]
    title = (
        f"Worst {len(shown)} of {len(rows)} compressed weights" if len(shown) < len(rows) else f"{len(rows)} weights"
    )
    table = titled(title, "weight", ">", ">was", ">file", "encoding", "kernel", "source" if everything else "")
    for site in shown:
        table.add_row(
            Text(site.weight),
            data.decibel_text(site.snr_db),
            data.bytes_text(site.dense_bytes),
            data.bytes_text(site.file_bytes),
            Text(site.encoding + (f" × {site.activation.replace('+', ' + ')}" if site.activation else "")),
            Text(site.kernel),
            Text(data.source_text(site.source) if everything else "", style="dim"),
        )
    table.columns[0].no_wrap = True
    return table


# what was not done ----------------------------------------------------------------------------------------------------
def _left_alone(ledger: Ledger, everything: bool) -> list[RenderableType]:
    rows = [("stayed dense", reason) for reason in data.dense_reasons(ledger.sites)]
    rows += [("compressed", reason) for reason in data.notes(ledger.sites)]
    for row in ledger.passes:
        rows += [(row.name.partition("(")[0], reason) for reason in data.skip_reasons(row)]
    if not rows:
        return []
    table = titled("Left alone", "by", ">how many", "why", "for example")
    shown = rows if everything else rows[: 3 * _REASONS]
    for who, reason in shown:
        table.add_row(Text(who), str(reason.count), Text(reason.why), Text(", ".join(reason.examples), style="dim"))
    if len(shown) < len(rows):
        table.add_row("", str(len(rows) - len(shown)), "more reasons (--all shows them)", "")
    return [table]


def _diagnostics(diagnostics: Sequence[Diagnostic], everything: bool) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for each in data.by_severity(diagnostics, Severity.WARNING):
        parts.append(Text(str(each), style="yellow"))
    remarks = data.by_severity(diagnostics, Severity.REMARK)
    if everything:
        parts += [Text(str(each), style="dim") for each in remarks]
    elif remarks:
        counted = ", ".join(f"{count} × {code} ({title})" for code, title, count, _ in data.by_code(remarks)[:_REASONS])
        parts.append(Text(f"{len(remarks)} remark{'s' * (len(remarks) > 1)}: {counted}", style="dim"))
    return parts


def titled(title: str, *columns: str) -> Table:
    """An empty table; a column whose name begins with `>` is set to the right."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table
