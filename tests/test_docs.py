"""The documentation's code runs."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


PAGES = [("writing_a_pass", 5), ("structure", 2), ("structural", 1), ("torch_compile", 1), ("rounding", 1)]


@pytest.mark.parametrize(("page", "count"), PAGES)
def test_a_page_runs_as_written(page, count):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) >= count
    scope = {"__name__": page}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), scope)
