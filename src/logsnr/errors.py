"""Errors a person can act on: one line that names the value, the allowed range and the fix."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class LogsnrError(ValueError):
    """A bad file, checkpoint, data set or recipe; its message is one clear line."""


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional dependency at the moment it is needed.

    Args:
        module: the module to import, e.g. "diffusers".
        extra: the extra of this package that brings it, e.g. "train".
        purpose: what needs it, the start of the error's sentence.

    Raises:
        LogsnrError: if it is not installed, naming the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise LogsnrError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed: pip install 'logsnr[{extra}]'"
        ) from error


def one_line(error: BaseException) -> str:
    """The message of any exception on one line, for quoting inside ours."""
    return " ".join(str(error).split()) or type(error).__name__


def nearest(value: str, known: Iterable[str]) -> str:
    """The known name that a misspelt `value` most resembles, upper and lower case alike; "" if none does."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5)
    return names[found[0]] if found else ""
