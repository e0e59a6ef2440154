"""Reports: readable with 200 sites, complete as JSON, and one self-contained page that cannot be injected into."""

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest

from sparc import codes, report_data
from sparc.diag import Diagnostics, Location, SparcError
from sparc.ledger import Ledger, PassRow, Ratio, SiteRow, SkipRow
from sparc.report import Report

INT4 = "IntGrid(bits=4, group=32)"
INT8_ROUND = "round(encoding=IntGrid(bits=8))"


def make_report(layers: int = 30, name: str = "layers") -> Report:
    ledger, diagnostics = Ledger(), Diagnostics()
    skips = [SkipRow(f"{name}.{index}.norm", "it has two uses") for index in range(layers)]
    measured = {"worst snr_db": 12.5, "restored": 1.0}
    ledger.passes = [
        PassRow("merge_common()", contract="exact"),
        PassRow(INT8_ROUND, "*", "approximate(snr_db)", 7, 7, skips, measured, 4000, 1000, 2.5),
    ]
    for index in range(layers):
        for part, noise in (("up", 20.0 + index), ("down", 40.0 - index / 10)):
            module = f"{name}.{index}.{part}"
            ledger.sites.append(
                SiteRow(
                    f"{module}.weight",
                    module,
                    "model.py:7 in forward",
                    "linear",
                    INT4,
                    "",
                    noise,
                    4000,
                    600,
                    600,
                    "MatMulNBits",
                )
            )
    ledger.sites[4].snr_db = math.inf
    ledger.sites.append(
        SiteRow("head.weight", "head", "", "linear", "dense", "", None, 9000, 9000, 9000, "MatMul", "excluded")
    )
    summary = ledger.summary
    summary.target, summary.data = "onnx", "held out"
    summary.dense_bytes, summary.file_bytes, summary.resident_bytes = 100_000_000, 25_400_000, 26_000_000
    summary.errors = {"logits": {"relative error": 0.0123, "cosine": 0.99912, "snr_db": 38.2}}
    summary.parity = {"logits": 3e-7}
    summary.latencies = [Ratio("eager torch", 0.31, 0.29, 0.33, 30)]
    summary.metric = 0.81
    place = Location("layers.5", "model.py:7 in forward")
    diagnostics.warn(codes.RESTORED, "layers.5.up was restored", where=place, why="11 dB, the floor is 12 dB")
    for index in range(layers):
        diagnostics.remark(codes.NOT_MATCHED, f"{name}.{index} was left alone", why="it has two uses")
    return Report(ledger, diagnostics)


# the terminal ---------------------------------------------------------------------------------------------------------
def test_two_hundred_sites_stay_readable() -> None:
    text = str(make_report(layers=100))
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text


def test_whole_model_lines_say_size_error_latency_and_metric() -> None:
    text = str(make_report())
    for part in (
        "25.4 MB",
        "25.4%",
        "26.0%",
        "0.0123",
        "0.99912",
        "38.2 dB",
        "3.0e-07",
        "0.31 × [0.29, 0.33] eager torch",
        "0.81",
        "held-out",
    ):
        assert part in text, part


def test_the_worst_site_comes_first() -> None:
    text = str(make_report())
    shown = re.findall(r"layers\.\d+\.\w+\.weight", text.partition("Worst")[2])
    assert shown[:3] == ["layers.0.up.weight", "layers.1.up.weight", "layers.3.up.weight"]


def test_reasons_are_counted_and_warnings_are_whole() -> None:
    text = str(make_report())
    assert re.search(r"round +30 +it has two uses", text)
    assert re.search(r"stayed dense +1 +excluded", text)
    assert "warning SPARC302: layers.5.up was restored" in text
    assert "the floor is 12 dB" in text
    assert "30 remarks: 30 × SPARC205" in text


def test_everything_can_be_shown() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=StringIO())
    make_report().render(console, everything=True)
    text = console.export_text()
    assert all(f"layers.{index}.down.weight" in text for index in range(30))
    assert "head.weight" in text
    assert text.count("remark SPARC205") == 30


def test_an_empty_report() -> None:
    report = Report(Ledger(), Diagnostics())
    assert "target" in str(report)
    assert "<html" in report.html()


# JSON -----------------------------------------------------------------------------------------------------------------
def test_json_is_json_and_complete() -> None:
    described = json.loads(json.dumps(make_report().to_json(), allow_nan=False))
    assert len(described["sites"]) == 61
    assert described["sites"][4]["snr_db"] == "inf"
    assert described["passes"][1]["seconds"] == 2.5
    assert described["diagnostics"][0]["code"] == "SPARC302"


# the page -------------------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Checks that tags are closed, and collects attributes and text."""

    VOID = ("meta", "input", "br")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_well_formed_and_shows_every_site() -> None:
    page = Page(make_report().html())
    assert page.open == []
    text = " ".join(page.text)
    assert all(f"layers.{index}.{part}.weight" in text for index in range(30) for part in ("up", "down"))
    assert page.tags.count("svg") == 3


def test_the_page_loads_nothing() -> None:
    source = make_report().html()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<img|<iframe|\bsrc=", source)
    assert not [name for _, name, _ in Page(source).attributes if name in ("src", "href")]
    assert "default-src 'none'" in source


def test_plots_have_finite_coordinates_within_their_boxes() -> None:
    page = Page(make_report().html())
    numbers = [
        float(value)
        for tag, name, value in page.attributes
        if tag in ("line", "rect", "circle", "text")
        and name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height")
    ]
    assert len(numbers) > 200
    assert all(math.isfinite(number) and 0 <= number <= 2000 for number in numbers)


def test_names_cannot_inject_markup() -> None:
    evil = "<script>alert(1)</script>"
    page = Page(make_report(3, name=evil).html(title=evil))
    assert page.tags.count("script") == 1
    assert page.open == []


def test_the_page_is_the_same_every_time() -> None:
    assert make_report().html() == make_report().html()


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = make_report().to_html(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == make_report().html()
    with pytest.raises(SparcError) as caught:
        make_report().to_html(tmp_path / "no" / "report.html")
    assert caught.value.code == "SPARC505"


# figures --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (99_960, "100 kB"), (999_600, "1 MB"),
     (22_900_000, "22.9 MB"), (2_500_000_000, "2.5 GB")],
)  # fmt: skip
def test_bytes(count: int, text: str) -> None:
    assert report_data.bytes_text(count) == text


def test_sites_group_by_block() -> None:
    sites = [SiteRow("a", module) for module in ("embed", "h.0.attn.q", "h.0.mlp", "h.1.attn.q", "stem.conv", "")]
    blocks = report_data.by_block(sites)
    assert {name: len(members) for name, members in blocks.items()} == {
        "embed": 1,
        "h.0": 2,
        "h.1": 1,
        "stem.conv": 1,
        "a": 1,
    }


def test_encodings_group_with_their_inputs_and_dense_comes_last() -> None:
    sites = [SiteRow("a", dense_bytes=100), SiteRow("b", encoding=INT4, dense_bytes=1, snr_db=10.0)]
    sites += [
        SiteRow("c", encoding=INT4, dense_bytes=2, snr_db=30.0),
        SiteRow("d", encoding=INT4, activation="IntGrid(bits=8)", dense_bytes=1),
    ]
    groups = report_data.by_encoding(sites)
    found = [(group.encoding, group.activation, group.sites) for group in groups]
    assert found == [(INT4, "", 2), (INT4, "IntGrid(bits=8)", 1), ("dense", "", 1)]
    assert (groups[0].worst, groups[0].middle) == (10.0, 20.0)
