"""Writing files whole or not at all, and by one process at a time."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

#: The errors of a disk without room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb") -> Iterator[IO]:
    """Open a file that takes the name `path` only once everything has been written.

    The content goes to a hidden temporary file beside `path`, is flushed to the disk and renamed over `path`
    when the block ends. If the block raises, the temporary file is removed and what stood at `path` stays as
    it was. A reader sees the old file or the new one, never a part; of two writers at once the last one wins.
    A missing folder is created; a symbolic link is followed.

    Args:
        path: the file to write.
        mode: ``"wb"`` for bytes, ``"w"`` for text (UTF-8, line ends as given).

    Yields:
        The open file; its ``name`` is the temporary path.

    Raises:
        ValueError: nothing can be written there, as in a read-only folder.
        OSError: the disk is full; it names `path`.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w'; got {mode!r}")
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.part")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        if target.parent.is_file():  # of which mkdir would say that it is there already
            raise NotADirectoryError(None, f"{str(target.parent)!r} is a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        file = open(partial, mode.replace("w", "x"), **text)
    except OSError as error:
        raise _cannot_write(path, error, "name a file in a folder that you may write to") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as on a full disk
            error.filename = str(path)
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that takes the name `path` once the block has ended without an error.

    Args:
        path: the folder; it must not exist, or be empty.

    Raises:
        ValueError: if it holds something already, or cannot be written.
    """
    folder = Path(path).expanduser().resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists already; name a new folder or an empty one")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    except Exception as error:
        if (failure := _of_the_system(error)) is None:
            raise
        raise _cannot_write(folder, failure, "name a folder you may write to") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def whole_rows(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the block appends to a file is all there in the end, or none of it, as on a full disk.

    Args:
        path: the file; if it does not exist and the block fails, it does not exist afterwards.
    """
    path = Path(path)
    size = path.stat().st_size if path.exists() else None
    try:
        yield
    except BaseException as error:
        if size is None:
            path.unlink(missing_ok=True)
        else:
            os.truncate(path, size)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


#: Descriptors of the folders that this process has locked.
_locks: set[int] = set()


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """No other process is in such a block with the same folder meanwhile.

    The lock is the kernel's (`flock`) and ends with the process, in whatever way that ends. It leaves no file.

    Args:
        folder: it is made if it is missing, and taken away again if it is empty in the end.

    Raises:
        ValueError: if another process has it.
    """
    folder = Path(folder).absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _lock(folder)
    _locks.add(descriptor)
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        _locks.discard(descriptor)
        os.close(descriptor)


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"another process is writing to {str(folder)!r}; wait for its end, or name another folder"
            ) from None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            warnings.warn(f"{str(folder)!r} cannot be locked ({reason}); let no other run write there", stacklevel=3)
        with contextlib.suppress(FileNotFoundError):  # the process before took it away in between
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        os.close(descriptor)


def _forget_locks() -> None:
    """In a forked process, as the workers of a loader are: a copy would keep the lock after the process that has it."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Removes the temporary files that killed processes have left in a folder; no other may be writing there."""
    for path in Path(folder).glob(".*.part"):
        if re.fullmatch(r"\..+\.[0-9a-f]{16}\.part", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _of_the_system(error: Exception) -> OSError | None:
    """The error of the operating system that this one is, or tells of, as those of libraries in Rust."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _cannot_write(path: str | os.PathLike[str], error: OSError, remedy: str) -> Exception:
    if error.errno in FULL:
        return OSError(error.errno, error.strerror, str(path))
    return ValueError(f"cannot write {str(path)!r}: {(error.strerror or str(error)).lower()}; {remedy}")
