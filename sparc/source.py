"""Places in the user's code, without anything that belongs to one machine."""

import re
import sys
import traceback
from pathlib import Path

from sparc.diag import Location


def short_path(path: str) -> str:
    """A source path without anything that belongs to one machine: below site-packages, below sys.path, or the bare
    file name.
    """
    for marker in ("site-packages/", "dist-packages/"):
        if marker in path:
            return path.rpartition(marker)[2]
    roots = sorted((root for root in sys.path if root), key=len, reverse=True)
    for root in roots:
        if path.startswith(root.rstrip("/") + "/"):
            return path[len(root.rstrip("/")) + 1 :]
    return Path(path).name


def source_line(stack_trace: str) -> str:
    """The innermost frame of a captured stack that is not torch's, as `path:line in function`."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', stack_trace)
    outside = [frame for frame in frames if "/torch/" not in frame[0]]
    if not outside:
        return ""
    path, line, function = outside[-1]
    return f"{short_path(path)}:{line} in {function}"


def raised_at(error: BaseException) -> Location:
    """The innermost line of the user's code that an exception came through; nowhere if there is none."""
    own = (str(Path(__file__).parent), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    outside = [frame for frame in frames if "/torch/" not in frame.filename and "/importlib/" not in frame.filename]
    if not outside:
        return Location()
    return Location("", f"{short_path(outside[-1].filename)}:{outside[-1].lineno} in {outside[-1].name}")
