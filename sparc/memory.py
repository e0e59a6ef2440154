"""Memory that is free but still counted as the process's own."""

import ctypes
import functools
import sys
from collections.abc import Callable


def trim() -> None:
    """Give freed memory back to the operating system, where the C library is glibc; elsewhere do nothing.

    glibc keeps what was freed between blocks that are still in use, and compressing a model frees tensors of that kind
    in every pass: up to the size of the model would stay.
    """
    release = _malloc_trim()
    if release is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        release: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return release
