"""Files that outlive a crash: written whole or not at all, and read within bounds.

A folder is written under a temporary name beside its final place, flushed to disk and renamed; a file likewise. Reading
refuses links, devices, anything larger than a stated limit, and names that could leave the folder.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sparc import codes
from sparc.diag import ArtifactError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BLOCK = 1 << 20
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about a file: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


# writing ------------------------------------------------------------------------------------------------------------
@contextmanager
def writing(name: str) -> Iterator[None]:
    """Turn an operating system's refusal to write the file or folder of this name into SPARC505."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ArtifactError(
            codes.WRITE_FAILED,
            f"{name} could not be written, and nothing was saved",
            why="no space is left on the disk" if full else _reason(error),
            hint="" if full else "choose another place",
        ) from None


def write_file(path: Path, chunks: Iterable[Buffer]) -> FileRecord:
    """Write a new file, flush it to disk and return its record. OSErrors are the caller's."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def replace_file(path: str | Path, content: Buffer | Iterable[Buffer]) -> None:
    """Put a file in place of whatever file was there, whole or not at all.

    Raises:
        ArtifactError: SPARC505 when the disk is full or the place not writable; the old file is unharmed.
    """
    target = _final(path)
    temporary = _beside(target, "new")
    chunks = [content] if isinstance(content, (bytes, bytearray, memoryview)) else content
    with writing(target.name):
        try:
            write_file(temporary, chunks)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


@contextmanager
def new_folder(path: str | Path, may_replace: Callable[[Path], str | None]) -> Iterator[Path]:
    """A temporary folder to write into; at the end of the block it takes its place at `path`, in one rename.

    Whatever interrupts the block (an error, a full disk, Ctrl-C) removes the temporary folder and leaves `path` as it
    was.

    Args:
        path: the folder's final place; missing parents are made.
        may_replace: says why the folder that is there must not be replaced, or None when it may be.

    Raises:
        ArtifactError: SPARC505.
    """
    check_destination(path, may_replace)
    target = _final(path)
    with writing(target.name):
        made = _make_parents(target.parent)
        temporary = _beside(target, "new")
        try:
            temporary.mkdir()
            yield temporary
            sync_folder(temporary)
            _swap(temporary, target)
        except BaseException:
            _remove(temporary)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise


def check_destination(path: str | Path, may_replace: Callable[[Path], str | None]) -> None:
    """Check, before any work is done, that a folder could be written to `path`.

    Raises:
        ArtifactError: SPARC505 when something else is there, or the place is not writable.
    """
    target = _final(path)
    reason = may_replace(target) if os.path.lexists(target) else None
    if reason is not None:
        raise ArtifactError(
            codes.WRITE_FAILED, f"{target.name} is not replaced", why=reason, hint="choose another folder"
        )
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ArtifactError(codes.WRITE_FAILED, f"{existing.name or '/'} is not writable", hint="choose another folder")


def _swap(temporary: Path, target: Path) -> None:
    """Put a folder in place of another; whatever interrupts this before it is on disk is undone."""
    aside = _beside(target, "old")
    try:
        if os.path.lexists(target):
            os.rename(target, aside)
        os.rename(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        if not os.path.lexists(temporary):
            os.rename(target, temporary)
        if os.path.lexists(aside):
            os.rename(aside, target)
        raise
    _remove(aside)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # Ctrl-C: finish, then obey
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were made, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
    return missing


def _final(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _beside(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}-{secrets.token_hex(4)}"


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


# reading ------------------------------------------------------------------------------------------------------------
def check_name(name: str) -> None:
    """Refuse a file name that is not a plain name in the folder itself.

    Raises:
        ArtifactError: SPARC504.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(
            codes.PATH_ESCAPES, f"the artifact names a file {name!r}", why="only plain file names are read"
        )


def check_file(folder: Path, name: str, limit: int) -> int:
    """The size of a file of the folder, which must be an ordinary file without links.

    Raises:
        ArtifactError: SPARC501 when it is missing, SPARC504 for a link or a device, SPARC503 when it is larger than
            `limit` bytes.
    """
    check_name(name)
    try:
        status = os.lstat(folder / name)
    except OSError:
        raise ArtifactError(codes.ARTIFACT_MISSING_FILE, f"{name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(codes.PATH_ESCAPES, f"{name} is not an ordinary file")
    if status.st_nlink > 1:
        raise ArtifactError(
            codes.PATH_ESCAPES, f"{name} is a hard link to a file elsewhere", hint="copy the folder without links"
        )
    if status.st_size > limit:
        raise ArtifactError(
            codes.ARTIFACT_MALFORMED, f"{name} is too large", why=f"{status.st_size} bytes, the limit is {limit}"
        )
    return status.st_size


def read_file(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of a file of the folder, at most `limit`.

    Raises:
        ArtifactError: those of `check_file`.
    """
    check_file(folder, name, limit)
    with _open(folder, name) as descriptor, open(descriptor, "rb", closefd=False) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ArtifactError(codes.ARTIFACT_MALFORMED, f"{name} grew while it was read")
    return content


def record_of(folder: Path, name: str) -> FileRecord:
    """Size and SHA-256 of a file of the folder, read in blocks.

    Raises:
        ArtifactError: those of `check_file`.
    """
    check_file(folder, name, 1 << 62)
    digest, size = hashlib.sha256(), 0
    with _open(folder, name) as descriptor, open(descriptor, "rb", closefd=False, buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def hash_bytes(content: Buffer) -> FileRecord:
    """Size and SHA-256 of bytes in memory."""
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


@contextmanager
def _open(folder: Path, name: str) -> Iterator[int]:
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        raise ArtifactError(codes.ARTIFACT_MISSING_FILE, f"{name} cannot be read", why=_reason(error)) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
