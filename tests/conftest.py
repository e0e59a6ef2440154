"""What every test shares: threads, property-based profiles, golden files, and which tests run in one process."""

import os
from collections.abc import Callable
from difflib import unified_diff
from pathlib import Path

import hypothesis
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` writes the files under tests/golden instead of comparing with them."""
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    """One torch thread for each of several worker processes, two for a single one; the same examples on every run."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    hypothesis.settings.register_profile("sparc", derandomize=True, deadline=None, max_examples=50, database=None)
    hypothesis.settings.load_profile("sparc")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark golden tests, and keep the tests of one file in one worker so that they share what its fixtures made.

    Files that share something expensive are kept together by a marker of their own:
    `pytestmark = pytest.mark.xdist_group("smollm2")`.
    """
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.golden)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden("name.txt", text)` compares text with tests/golden/name.txt; `make golden` writes the files anew."""
    update = request.config.getoption("--update-golden")

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"there is no tests/golden/{name}: run `make golden` and look at what it wrote"
        expected = path.read_text(encoding="utf-8")
        difference = "\n".join(
            unified_diff(expected.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="")
        )
        assert text == expected, f"{difference or 'only line ends differ'}\nif this is meant, run `make golden`"

    return compare
