"""Places in the user's code, without anything that belongs to one machine."""

import re
import sys
from pathlib import Path


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
