"""Writes docs/diagnostics.md from the catalogue in sparc/codes: `make docs`."""

from pathlib import Path

from sparc.codes import Code, catalogue

PAGE = Path(__file__).parent / "diagnostics.md"

_GROUPS = {
    "1": ("Capture", "CaptureError"),
    "2": ("Passes and recipes", "PassError"),
    "3": ("Verification", "VerifyError"),
    "4": ("Lowering", "LoweringError"),
    "5": ("Artifacts", "ArtifactError"),
}
_INTRODUCTION = """\
# Diagnostics

Every error that sparc raises on purpose is a `SparcError` with a stable code, and so is every warning and every remark
about what was not done. Each says what happened, where in the user's model, why, and what to do next.
`sparc explain CODE` prints an entry of this page. A code keeps its meaning for ever; one that is no longer used is not
given to anything else.

This page is generated from `sparc/codes` by `make docs`.
"""


def diagnostics_page() -> str:
    """The page as Markdown."""
    parts = [_INTRODUCTION]
    codes = catalogue()
    for digit, (title, error) in _GROUPS.items():
        parts.append(f"## {title}: SPARC{digit}xx\n\nAs an error: `sparc.{error}`.\n")
        parts += [_entry(code) for name, code in codes.items() if name.startswith(f"SPARC{digit}")]
    return "\n".join(parts)


def _entry(code: Code) -> str:
    lines = [f"### {code.id}: {code.title}", "", code.meaning]
    if code.hint:
        lines += ["", f"*Next:* {code.hint}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(diagnostics_page(), encoding="utf-8")
