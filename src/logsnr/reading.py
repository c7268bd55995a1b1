"""Files from elsewhere, read within bounds: whatever is wrong with one is an error that names it and the fix.

A file may be cut, altered, of another kind, or made to harm.  Of every kind the reader takes no more than this:

    text      so many bytes, even of a device that never ends          LARGEST
    JSON      so many levels, so many values                           DEEPEST, MOST
    YAML      the same, its aliases written out; as few of these       ALIASES
    arrays    no more than an .npy's own size, than the machine's memory, than honest images shrink to
    tensors   what safetensors' own header allows

Contents are never quoted where a file is not what it should be: it may be a secret.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from numpy.lib import format as npy
from safetensors import safe_open
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor

from logsnr.errors import LogsnrError, one_line, shown
from logsnr.paths import expanded

LARGEST = 2**26
"""Bytes of the largest JSON file; a plan has a few thousand."""
LARGEST_YAML = 2**18
"""Bytes of the largest recipe: YAML is slow to read, and a recipe has one or two thousand."""
DEEPEST = 32
MOST = 2_000_000
ALIASES = 20
"""Aliases of a YAML file: of n, nested, e^(n/e) values can be made."""
SMALL, SHRUNK = 2**26, 200
"""An archive's part that grows beyond 64 MiB, and so many times, is no data: images shrink to a tenth."""

Arrays = dict[str, "np.ndarray[Any, Any]"]


@contextmanager
def reading(path: str | os.PathLike[str], fix: str, what: str = "") -> Iterator[None]:
    """Whatever goes wrong inside is the fault of the file at `path`, and becomes one line that says so.

    Decoders and constructors meet damaged values with errors of every kind; here they have one meaning.

    Args:
        path: the file that the error names.
        fix: what to do, the end of the sentence.
        what: what the file should be, e.g. "a plan".

    Raises:
        LogsnrError: in place of any other exception.
    """
    named = f" as {what}" if what else ""
    try:
        yield
    except LogsnrError as error:
        if str(path) in str(error):
            raise
        raise LogsnrError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise LogsnrError(f"{path} does not exist: {fix}") from error
    except OSError as error:
        raise LogsnrError(f"{path} cannot be read{named} ({error.strerror or one_line(error)}): {fix}") from error
    except UnicodeDecodeError as error:
        raise LogsnrError(f"{path} cannot be read{named} (it is not UTF-8 text): {fix}") from error
    except (RecursionError, MemoryError) as error:
        small = "it is nested too deeply" if isinstance(error, RecursionError) else "it does not fit into memory"
        raise LogsnrError(f"{path} cannot be read{named} ({small}): {fix}") from error
    except Exception as error:
        raise LogsnrError(f"{path} cannot be read{named} ({_kind(error)}): {fix}") from error


def _kind(error: Exception) -> str:
    """An error of a decoder in words: its message, after its type where that is no sentence."""
    text = one_line(error)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def read_text(path: str | os.PathLike[str], *, largest: int = LARGEST) -> str:
    """A whole UTF-8 file.

    Raises:
        LogsnrError: if it has more bytes than that.
        OSError: from the file system.
        UnicodeDecodeError: if it is no such text.
    """
    with open(expanded(path), "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise LogsnrError(f"{path} has more than {largest:,} bytes: this is no file of that kind")
    return data.decode("utf-8")


def read_json(path: str | os.PathLike[str], fix: str, what: str = "JSON") -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        LogsnrError: if it cannot be read, is no JSON, too deep, or no mapping; `fix` ends the sentence.
    """
    with reading(path, fix, what):
        return mapping(parse_json(read_text(path)), str(path), fix)


def mapping(values: Any, name: str, fix: str) -> dict[str, Any]:
    """The values, if they are a mapping.

    Raises:
        LogsnrError: naming what they are.
    """
    if not isinstance(values, dict):
        raise LogsnrError(f"{name} holds a {type(values).__name__}, no mapping of names: {fix}")
    return values


def parse_json(text: str) -> Any:
    """The values of a JSON text, at most DEEPEST levels of them.

    Raises:
        LogsnrError: if they are deeper, or more than MOST.
        ValueError, RecursionError: if it is no JSON.
    """
    return _bounded(json.loads(text))


class _Loader(yaml.SafeLoader):
    """YAML of plain values, with few aliases."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > ALIASES:
                raise LogsnrError(f"more than {ALIASES} aliases (*name): write the values out")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """The values of a YAML text of plain values, within the bounds of JSON's.

    Raises:
        LogsnrError: if it is no YAML, or beyond the bounds; the text is not quoted.
    """
    try:
        return _bounded(yaml.load(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = str(error.problem or error.context or "it cannot be parsed").partition("'")[0].rstrip(" ,")
        raise LogsnrError(f"not valid YAML ({why}{where})") from error
    except RecursionError as error:
        raise LogsnrError("not valid YAML (it is nested too deeply)") from error
    except LogsnrError:
        raise
    except Exception as error:  # the constructors of dates, numbers and bytes raise whatever they meet
        raise LogsnrError(f"not valid YAML ({type(error).__name__} in a value)") from error


def _bounded(values: Any) -> Any:
    """The values, after a walk through them, level by level: values that repeat count as often as they stand there."""
    level, count = [values], 0
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                below += value.values() if isinstance(value, dict) else value
                if count + len(below) > MOST:
                    raise LogsnrError(f"more than {MOST:,} values: this is no file of that kind")
            elif isinstance(value, int) and abs(value) > 2**63:
                raise LogsnrError("a whole number beyond 2^63: give it with an exponent, e.g. 1e+30")
        if not below:
            return values
        level, count = below, count + len(below)
    raise LogsnrError(f"nested more than {DEEPEST} levels deep: this is no file of that kind")


def read_tensors(data: bytes, path: Path, fix: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file at `path`.

    Raises:
        LogsnrError: if they are none.
    """
    with reading(path, fix, "safetensors"):
        return tensors_from_bytes(data)


def open_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header's facts, and the tensors, of a safetensors file; call it within `reading`."""
    with safe_open(os.fspath(expanded(path)), framework="pt") as file:
        return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_arrays(path: Path, fix: str, only: Callable[[str], bool] | None = None) -> Arrays:
    """The arrays of an .npz file by name, or those whose names `only` takes; of an .npy file one, "images".

    Nothing is unpickled, and nothing is allocated before the headers agree with the file.

    Raises:
        LogsnrError: if the file is missing, damaged, holds Python objects, or more than it may.
    """
    with reading(path, fix, "a NumPy file"), path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return {"images": _array(file, path.stat().st_size)}
        arrays: Arrays = {}
        with zipfile.ZipFile(file) as archive:
            parts = [part for part in archive.infolist() if part.filename.endswith(".npy")]
            if only is not None:
                parts = [part for part in parts if only(part.filename.removesuffix(".npy"))]
            if (total := sum(part.file_size for part in parts)) > memory():
                raise LogsnrError(f"holds {gigabytes(total)} of arrays, this machine {gigabytes(memory())}: {fix}")
            for part in parts:
                if part.file_size > max(SMALL, SHRUNK * part.compress_size):
                    raise LogsnrError(
                        f"{part.filename} would grow {part.file_size // max(part.compress_size, 1)} times: this is no "
                        "data; if it is, save it with numpy.savez, uncompressed"
                    )
                with archive.open(part) as member:
                    arrays[part.filename.removesuffix(".npy")] = _array(member, part.file_size)
        return arrays


def _array(file: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    """The array of `size` bytes, header included, at the file's beginning."""
    _header(file, size)
    file.seek(0)
    found: np.ndarray[Any, Any] = npy.read_array(file, allow_pickle=False)
    return found


def _header(file: IO[bytes], size: int, first: int = 0) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype of the array of `size` bytes that begins at `first`; the file is
    then at its values."""
    file.seek(first)
    version = npy.read_magic(file)
    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, columns, dtype = header(file)
    if dtype.hasobject:
        raise LogsnrError("holds Python objects, which are never unpickled: save plain uint8 arrays")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size - (file.tell() - first):
        raise LogsnrError(f"has a header of shape {shape}, more than the file holds: copy it again")
    return shape, columns, dtype


@dataclass(frozen=True, kw_only=True)
class Region:
    """An array in a file, where it lies.

    Attributes:
        path: of the file.
        offset: of its first value, in bytes.
        shape: of the array, rows first in memory.
        dtype: of its values.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def opened(self) -> np.ndarray[Any, Any]:
        """The array, mapped: pages are read when they are touched, and given back when memory is short."""
        flat = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return np.asarray(flat).view(self.dtype).reshape(self.shape)


def find_arrays(path: Path, fix: str) -> dict[str, Region | None]:
    """Where the arrays of an .npz or .npy file lie, as `read_arrays` names them; None for one that cannot be mapped:
    it is compressed, or its columns come first.

    Raises:
        LogsnrError: if the file is missing, damaged or holds Python objects.
    """
    with reading(path, fix, "a NumPy file"), path.open("rb") as file:
        size = path.stat().st_size
        if not zipfile.is_zipfile(file):
            return {"images": _region(path, file, size, 0)}
        found: dict[str, Region | None] = {}
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if not part.filename.endswith(".npy"):
                    continue
                name = part.filename.removesuffix(".npy")
                if part.compress_type != zipfile.ZIP_STORED:
                    found[name] = None
                    continue
                # The header before the values repeats the name, and has extra fields of a length of its own.
                file.seek(part.header_offset + 26)
                lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
                first = part.header_offset + 30 + lengths
                if first + part.file_size > size:
                    raise LogsnrError(f"{part.filename} ends after the file does: copy it again")
                found[name] = _region(path, file, part.file_size, first)
        return found


def _region(path: Path, file: IO[bytes], size: int, first: int) -> Region | None:
    shape, columns, dtype = _header(file, size, first)
    return None if columns and len(shape) > 1 else Region(path=path, offset=file.tell(), shape=shape, dtype=dtype)


def memory() -> int:
    """Bytes of this machine's memory; an exabyte where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**60


def gigabytes(n: float) -> str:
    """A number of bytes for a person."""
    return f"{n / 1e9:.3g} GB"


def check_format(found: object, known: int, name: str, fix: str) -> None:
    """Compare the version of a file with the one that is read here.

    Raises:
        LogsnrError: that says whether a newer library wrote it.
    """
    if isinstance(found, int) and not isinstance(found, bool) and found > known:
        raise LogsnrError(
            f"{name} has format {found}, of a newer logsnr (this one reads {known}): pip install --upgrade logsnr"
        )
    if found != known or isinstance(found, bool):
        raise LogsnrError(f"{name} has format {shown(found)}, this version reads format {known}: {fix}")
