"""`read_checkpoint`: a file or a folder to the checkpoint that it holds."""

from pathlib import Path

from sparc import codes
from sparc.checkpoint.base import Checkpoint, unknown
from sparc.diag import CaptureError


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a compressed checkpoint as it is; see `sparc.api.read_checkpoint`."""
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        from sparc.checkpoint.gguf_llama import read_gguf

        return read_gguf(place)
    if place.is_dir():
        from sparc.checkpoint.folder import read_folder

        return read_folder(place)
    if not place.exists():
        raise CaptureError(codes.LOAD_FAILED, f"there is no checkpoint {str(path)!r}")
    raise unknown(f"{place.name} is no .gguf file and no folder")
