"""Progress bars for long work: on stderr, and silent when that is not a terminal."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Iterate over `items` with a bar labelled `what`."""
    if not sys.stderr.isatty() or len(items) < 2:
        yield from items
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, description=what)


def collect(items: Iterable[Item], what: str, limit: int) -> list[Item]:
    """The first `limit` items of an iterable of unknown length, with a bar."""
    collected: list[Item] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        for item in items:
            collected.append(item)
            progress.advance(task)
            if len(collected) == limit:
                break
    return collected
