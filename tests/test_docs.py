"""The documentation's code runs."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_writing_a_pass_runs_as_written():
    text = (DOCS / "writing_a_pass.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 4
    scope = {"__name__": "writing_a_pass"}
    for block in blocks:
        exec(compile(block, "writing_a_pass.md", "exec"), scope)
