"""Paths as people write them: the one place where `~` is read, for options, recipes and calls alike."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path, with the home folder for `~`.

    Raises:
        ValueError: if it is the home of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(path)!r} names the home of an unknown user: write ./~... for a file") from error
