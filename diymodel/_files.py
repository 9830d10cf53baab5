"""Writing files so that a reader finds the old content or the new, whole, whatever happens in between.

The new content goes under a unique temporary name in the same directory, reaches the disk, and takes the old one's
place in a single rename. A process killed on the way leaves at most a ``.diymodel-….tmp`` that nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Replace the file at ``path``, or create it, by what ``write`` puts into the binary file it is given.

    A symbolic link is followed: the file it points to is replaced.

    Raises:
        OSError: it could not be written (a full disk, no permission, …); of the type that the errno stands for. The
            message says that the old file is unchanged, or that there was none.
    """
    target = Path(path).resolve()
    temporary = _temporary_beside(target)
    try:
        with temporary.open("xb") as file:
            write(file)
            _sync_file(file)
        temporary.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _explained(error, path) from error
        raise
    _sync_directory(target.parent)


def require_place(path: str | os.PathLike[str]) -> None:
    """Refuse, before work is done for it, a file that could not be written; a file is made beside it, and removed.

    Raises:
        FileNotFoundError: its directory is not there; the message names it.
        FileExistsError: a directory, or something else that is no file, has its name.
        OSError: nothing can be created in its directory (no permission, a full disk, …); of the type that the errno
            stands for.
    """
    name = f"{os.fspath(path)} cannot be written"
    if not (directory := Path(path).parent).is_dir():
        raise FileNotFoundError(f"{name}: there is no directory {directory}")
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{name}: it is {'a directory' if target.is_dir() else 'no regular file'}")
    temporary = _temporary_beside(target)
    try:
        temporary.open("xb").close()
        temporary.unlink()
    except OSError as error:
        raise type(error)(f"{name}: no file can be created in {target.parent} ({error.strerror})") from error


def require_places(*paths: Path | None) -> None:
    """As :func:`require_place` for each that is not None, which must be different files.

    Raises:
        ValueError: two are one file.
        OSError: as :func:`require_place`.
    """
    found: set[Path] = set()
    for path in filter(None, paths):
        require_place(path)
        if path.resolve() in found:
            raise ValueError(f"{path} is named for two files, and the second would replace the first: name another")
        found.add(path.resolve())


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """As :func:`replace_file`, with a text, in UTF-8."""
    replace_file(path, lambda file: file.write(text.encode()))


def create_directory(path: str | os.PathLike[str], files: Mapping[str, bytes | bytearray]) -> None:
    """Create the directory ``path`` with these files (name to content) in it, all at once.

    Raises:
        FileExistsError: something is there already (an empty directory does not count).
        OSError: as :func:`replace_file`.
    """
    target = Path(path).resolve()
    temporary = _temporary_beside(target)
    try:
        temporary.mkdir()
        for name, content in files.items():
            with (temporary / name).open("xb") as file:
                file.write(content)
                _sync_file(file)
        _sync_directory(temporary)
        temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise _explained(error, path) from error
        raise
    _sync_directory(target.parent)


def _temporary_beside(target: Path) -> Path:
    # Unique, because two writers that share a temporary name mix their contents. Made by open() and mkdir() rather than
    # tempfile, whose files only their owner may read.
    return target.with_name(f".diymodel-{uuid.uuid4().hex}.tmp")


def _sync_file(file: BinaryIO) -> None:
    """Wait for the disk: a rename that reaches it before the content would put an empty file in place."""
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Make a rename inside ``directory`` survive a power cut."""
    if os.name == "nt":  # Windows cannot open a directory, and needs no such call
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error, saying what could not be written and what is there now."""
    fate = "what was there is unchanged" if Path(path).exists() else "nothing was there, and nothing is there now"
    # A rename onto a directory that is not empty may fail with either errno; FileExistsError is what it means.
    number = errno.EEXIST if error.errno == errno.ENOTEMPTY else error.errno
    return OSError(number, f"could not write {os.fspath(path)} ({error.strerror or error}); {fate}")
