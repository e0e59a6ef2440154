"""Writes docs/architectures.md from what the sweep asserts: `make docs`, or `python -m docs.architectures_page`."""

from collections import Counter
from pathlib import Path

from tests.architecture_outcomes import FLOOR_DB, REFUSED, SWEPT

PAGE = Path(__file__).parent / "architectures.md"

_INTRODUCTION = """\
# Architectures

The sweep (`tests/test_architecture_sweep.py`, part of `make test-all`) builds a tiny model of each architecture from
transformers' own code, with seeded random weights scaled so that every layer matters, and compiles it:

```python
sparc.compile(model, inputs, recipe="w8", target="onnx", dynamic=dynamic, measure=False)
```

**{passed} of {total} compile and agree**: {kinds}.
The other {refused} are refused with a coded diagnostic, never with a traceback from inside torch or ONNX Runtime.

An architecture agrees when, at the sizes of the example, at larger ones and at a batch of one:

- the artifact in ONNX Runtime computes what the compiled Program (eager torch with the rounded weights) computes: every
  output to 1e-4 of its largest element. The `onnx` target quantizes activations to two 8-bit terms; where a last bit
  flips such roundings, the artifact's error against the float model may exceed the Program's own by half instead.
- every output has a signal-to-noise ratio of at least {floor:g} dB against the eager float model: an error of at most
  {percent:.0f} % in root mean square.
  One matrix in 8 bits per output channel has about 40 dB; most architectures have 30 to 45 dB at their outputs.
  In mixtures of experts it is the median token that counts: a rounded router sends a token here and there to another
  expert, which is a jump and not noise.

This page is written from `tests/architecture_outcomes.py`, which the sweep asserts: it fails when an architecture
starts to fail, fails with another code, or starts to work.
"""


def page() -> str:
    """The page as Markdown."""
    passed = Counter(each.kind for name, each in SWEPT.items() if name not in REFUSED)
    head = _INTRODUCTION.format(
        passed=passed.total(),
        total=len(SWEPT),
        refused=len(REFUSED),
        kinds=", ".join(f"{count} {kind}" for kind, count in passed.items()),
        floor=FLOOR_DB,
        percent=100 * 10 ** (-FLOOR_DB / 20),
    )
    return "\n".join([head, *_refused(), *_every()])


def _refused() -> list[str]:
    rows = [f"| {name} | [{each.code}](diagnostics.md) | {each.reason} |" for name, each in REFUSED.items()]
    return ["## Refused", "", "| architecture | code | reason |", "|---|---|---|", *rows, ""]


def _every() -> list[str]:
    rows = []
    for name, each in SWEPT.items():
        result = REFUSED[name].code if name in REFUSED else "agrees"
        rows.append(f"| {name} | {each.kind} | {each.auto.removeprefix('AutoModelFor')} | {result} |")
    return ["## Every one", "", "| architecture | kind | class | result |", "|---|---|---|---|", *rows, ""]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
