"""The command's root, and the options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="sparc",
    help="Compile sparse and quantized PyTorch models, and see the evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Trust = Annotated[bool, typer.Option("--trust", help="Allow a .pt2 file: reading one can run code that it carries.")]
ArtifactFolder = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="The folder of an artifact.", show_default=False)
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of the runtime.", show_default="the runtime's choice")
]
TaskName = Annotated[
    str | None, typer.Option("--task", help="What the model is for: text-generation.", show_default=False)
]
MODEL_HELP = (
    "A function [bold]pkg.mod:fn[/] that returns compile's arguments, "
    "a Hugging Face folder, a .gguf file, or a .pt2 file with --trust."
)
