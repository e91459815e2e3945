"""Atomic writing, reading JSON back, and locks: a reader sees the old file or the new, never half."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from pomona.errors import PomonaError

Content = TypeVar("Content")


def _sync(path: Path) -> None:
    """Flush a file or folder entry to the disk, so that a rename never outlives its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, else it is removed.

    Raises `PomonaError` naming `path` when the disk is full, read-only or otherwise refuses.
    """
    path = path.absolute()
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        _discard(partial)
        raise cannot_write(path, error) from error
    except BaseException:
        _discard(partial)
        raise


def _discard(partial: Path) -> None:
    with suppress(OSError):  # it may lie below a file that was taken for a folder
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Yield an empty temporary folder beside `path`; on success it becomes `path`, else it goes.

    `path` must be absent or an empty folder. Raises `PomonaError` when the disk refuses.
    """
    path = path.absolute()
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for written in sorted(partial.rglob("*"), reverse=True):
            _sync(written)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise cannot_write(path, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def follow_umask(path: Path) -> None:
    """Give a file the mode that the user's umask says; safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def digest_of(path: Path) -> str:
    """Return a file's SHA-256; raises `PomonaError` when it is missing or cannot be read."""
    return hashlib.sha256(_read_bytes(path)).hexdigest()


def cannot_write(path: Path, error: OSError) -> PomonaError:
    """Return the sentence for a write that the operating system refused."""
    reason = error.strerror or str(error)
    return PomonaError(
        f"cannot write {path}: {reason}; make room or choose another place, "
        "then run the same command again"
    )


def cannot_read(path: Path, error: OSError) -> PomonaError:
    """Return the sentence for a read that the operating system refused."""
    return PomonaError(
        f"cannot read {path}: {error.strerror or error}; check the path and its mode"
    )


def check_writable(path: Path) -> None:
    """Refuse a path where no file can be written, before hours are spent on what it should hold.

    A nameless file is tried in the nearest folder there is; nothing is left behind.
    """
    path = path.absolute()
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=next(p for p in path.parents if p.exists())):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write JSON that a person can read, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `PomonaError` naming the file that is damaged or none."""
    try:
        value = from_json(_read_bytes(path))
    except ValueError as error:  # no JSON, no UTF-8, half characters, nested without end
        raise damaged(path, error) from error
    if not isinstance(value, dict):
        raise damaged(path, "it is not a JSON object")
    return cast(dict[str, Any], value)


def read_as(path: Path, content: type[Content]) -> Content:
    """Read JSON as a dataclass, every field of its exact type; more fields than it has are ignored.

    Raises `PomonaError` naming the file and the first field that is absent or of another type.
    """
    try:
        return TypeAdapter(content).validate_json(_read_bytes(path), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise damaged(path, f"{place}: {problem['msg']}" if place else problem["msg"]) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def damaged(path: Path, reason: Exception | str) -> PomonaError:
    """Return the sentence for a file whose content is not what was once written."""
    told = " ".join(str(reason).split())
    return PomonaError(f"{path} is damaged or cut off ({told}); copy or download it again")


def check_name(name: str) -> None:
    """Raise `PomonaError` for a client's name that cannot be a folder in the run directory."""
    if not name.strip() or name.startswith(".") or any(c in '/\\\0:*?"<>|' for c in name):
        raise PomonaError(
            f'client name "{name}" cannot be a folder name; use letters, digits, spaces, - and _'
        )


@contextmanager
def held_folder(path: Path) -> Generator[None]:
    """Make a folder where there is none, and hold it for this process.

    Raises `PomonaError` when another process has it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(path, error) from error
    hold(lock, path)
    try:
        yield
    finally:
        os.close(lock)


def hold(lock: int, path: Path) -> None:
    """Lock an open folder for this process; raises `PomonaError` and closes it when another has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise PomonaError(f"{path} is in use by another command; wait until it ends") from error
