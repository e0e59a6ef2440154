"""`--size batch=8,seq=128`: sizes of dynamic dimensions."""

from typing import Annotated

import typer

from sparc import codes
from sparc.diag import ArtifactError

Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        help="Sizes of dynamic dimensions: [bold]batch=8,seq=128[/].",
        show_default="those of the example inputs",
    ),
]


def parse_sizes(texts: list[str]) -> dict[str, int]:
    """`["batch=8,seq=128"]` as `{"batch": 8, "seq": 128}`.

    Raises:
        ArtifactError: SPARC506 when a text is not written like that.
    """
    sizes: dict[str, int] = {}
    for part in ",".join(texts).split(",") if texts else []:
        name, equals, size = part.strip().partition("=")
        if not (name and equals and size.isdecimal() and 0 < int(size) < 1 << 31):
            raise ArtifactError(codes.CALL_MISMATCH, f"--size {part!r} is not understood", hint="write batch=8,seq=128")
        sizes[name] = int(size)
    return sizes
