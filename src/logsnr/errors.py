"""Errors a person can act on: one line that names the value, the allowed range and the fix."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

LONGEST = 2000
"""Characters of the longest message that is printed."""
LISTED = 20
"""Names that an error lists beside the one that was meant."""


class LogsnrError(ValueError):
    """Whatever a user typed and cannot be: a name, option, file, recipe or value; its message is one clear line.

    A misuse in code is a plain ValueError.
    """


class UnknownNameError(LogsnrError, KeyError):
    """A name that its registry does not hold: a failed look-up too, so that `Mapping.get` works."""

    def __str__(self) -> str:  # KeyError's would quote the sentence
        return str(self.args[0])


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


def one_line(error: BaseException | str) -> str:
    """The message of any exception on one printable line, for quoting inside ours; the middle of a long one is cut."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"


def printable(text: str) -> str:
    """The text with its control characters and broken code points written out: it cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, most: int = 80) -> str:
    """The repr of what somebody wrote, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4].rstrip()} ..."


def nearest(value: object, known: Iterable[object], cutoff: float = 0.5) -> str:
    """The known name that a misspelt `value` most resembles, upper and lower case alike; "" if none does.

    Of numbers the one least far away.  `cutoff` is how alike they must be, from 0 to 1.
    """
    if isinstance(value, (int, float)):
        return min(map(str, known), key=lambda number: abs(float(number) - value), default="")
    names = {str(name).lower(): str(name) for name in known}
    found = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=cutoff)
    return names[found[0]] if found else ""


def unknown(what: str, value: object, known: Iterable[object], more: str = "") -> UnknownNameError:
    """The error of a name that is none: `raise unknown("label", label, LABELS, "; or pass a function of sigma")`.

    Args:
        what: what it should name, e.g. "label" or "--solver".
        value: what was given.
        known: the valid names.
        more: what else is allowed, appended to them.
    """
    names = list(dict.fromkeys(map(str, known)))
    near = nearest(value, names)
    hint = f": did you mean {near!r}?" if near else ""
    listed = ", ".join(names) if len(names) <= LISTED or not near else f"the {len(names)} that there are"
    return UnknownNameError(f"{what} {value!r} is not one of {listed}{more}{hint}")
