"""Paths as people write them, the one place where `~` is read; and where the bundled recipes lie."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
RECIPES = (_PACKAGE / "recipes", _PACKAGE.parent.parent / "recipes")
"""Where bundled recipes lie: in an installed package, and in a checkout."""


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted({path.stem for folder in RECIPES for path in folder.glob("*.yaml")})


def cache_folder() -> Path:
    """Where what can be made again is kept: LOGSNR_CACHE, else logsnr in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("LOGSNR_CACHE")
    return expanded(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "logsnr")


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path, with the home folder for `~`.

    Raises:
        ValueError: if it is the home of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(path)!r} names the home of an unknown user: write ./~... for a file") from error
