"""Files written whole: every file of this library goes through `replace_file`, so a reader sees the old or the new one.

    temporary name beside the target -> write, fsync -> rename over it -> fsync of the folder

A kill, a full disk or a power cut at any point leaves what was there before.  Names carry the process, so two writers
never share a temporary; one that a kill left is removed by the next writer of the same file.  Links are followed, and
a device or a pipe is written to: neither is ever replaced.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import shutil
import socket
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logsnr.errors import LogsnrError, one_line
from logsnr.paths import expanded

if TYPE_CHECKING:
    import numpy as np

_count = itertools.count()


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` at `path` in one atomic step that survives a power cut; folders are made.

    Raises:
        OSError: from the file system; what was at `path` before is untouched.
    """
    path = expanded(path)
    if is_stream(path):
        with open(path, "wb") as stream:
            stream.write(data)
        return
    _put(path, data, os.replace)


def create_file(path: str | os.PathLike[str], data: bytes) -> bool:
    """Put `data` at `path` if nothing is there, as `replace_file` does: of many that try at one time, one is told True.

    Raises:
        OSError: from the file system.
    """
    try:
        _put(expanded(path), data, _link)
    except FileExistsError:
        return False
    return True


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _put(path: Path, data: bytes, move: Callable[[Path, Path], object]) -> None:
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            if path.exists():
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # whoever reads it knows this name, not the temporary
        raise
    _sync(path.parent)
    remove_temporaries(path.parent, re.escape(path.name))


def replace_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Put a folder of these files at `path`, all or none of them; where one was, for a moment there is none.

    Raises:
        OSError: from the file system; what was at `path` before is untouched.
    """
    path = Path(os.path.realpath(expanded(path)))
    temporary, old = _temporary(path), _temporary(path)
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(temporary)
        with suppress(FileNotFoundError):
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            with suppress(FileNotFoundError):
                os.rename(old, path)
            raise
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
    _sync(path.parent)
    remove_temporaries(path.parent, re.escape(path.name))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{next(_count)}.tmp")


def _sync(folder: Path) -> None:
    if os.name == "posix":
        with suppress(OSError):  # the file is in place; not every file system syncs folders
            directory = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def npz(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """An .npz file of arrays by name, not compressed: equal arrays give equal bytes, whenever they are written."""
    import numpy as np

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():  # a ZipInfo of 1980: numpy.savez writes the time
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def remove_temporaries(folder: Path, name: str) -> None:
    """Remove what killed writers left of files whose names match the expression `name`."""
    with suppress(OSError):
        for left in folder.glob(".*.tmp"):
            found = re.fullmatch(rf"\.{name}(?:\.(\d+)-\d+)?\.tmp", left.name)
            if found and (found[1] is None or not _runs(int(found[1]))):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def check_output(path: str | os.PathLike[str], option: str = "--out") -> Path:
    """The path, once it is sure that a file can be written there: asked before the work, not after it.

    Its folder is made, and a file of no bytes is written beside it and removed again.

    Raises:
        LogsnrError: if it is a folder, or the disk refuses.
    """
    path = expanded(path)
    if path.is_dir():
        raise LogsnrError(f"{option} {path} is a folder: give the name of a file in it")
    if not is_stream(path):
        check_folder(Path(os.path.realpath(path)).parent, option)
    return path


def check_folder(folder: str | os.PathLike[str], option: str = "--out") -> Path:
    """The folder, made, once it is sure that files can be written into it.

    Raises:
        LogsnrError: if something else has its name, or the disk refuses.
    """
    folder = expanded(folder)
    probe = folder / f".write.{os.getpid()}-{next(_count)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        remove_temporaries(folder, "write")
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror or one_line(error)
        raise LogsnrError(
            f"{option}: {folder} cannot be written to ({why}): give a place in a folder of yours that has space"
        ) from error
    return folder


@contextmanager
def no_empty_folders(path: Path) -> Iterator[None]:
    """Leave no folder behind that was not there and that nothing was written into, if the work inside fails."""
    fresh = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in fresh:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def only_writer(path: Path, what: str) -> Iterator[None]:
    """Be the only process that writes at `path`, a folder or a file, while inside.

    A lock of the operating system on a small file, so that it ends with the process whatever happens; the file says
    who holds it.

    Args:
        path: what is written: inside it (a folder), or itself.
        what: what is refused a second time, in words.

    Raises:
        LogsnrError: if another one does, naming it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # no such locks on Windows
        yield
        return
    name = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise LogsnrError(f"{path} is in use by {who}: wait for it, or give {what} another place") from None
        except OSError:  # a file system without locks
            break
        if _same(handle, name):
            break
        os.close(handle)  # who held it before has removed it in between
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            name.unlink(missing_ok=True)
        os.close(handle)


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def is_stream(path: Path) -> bool:
    """Whether it is a device, a pipe or a socket, or one of this process's own open files by name."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or str(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
