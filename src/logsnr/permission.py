"""Permission: whether code that a recipe or a card names may run.

Files may come from anyone, and a module that is imported runs.  So none is, before whoever uses the library says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ALLOWED: ContextVar[bool] = ContextVar("code_is_allowed", default=False)


def code_is_allowed() -> bool:
    """Whether somebody said so."""
    return _ALLOWED.get()


@contextmanager
def allow_code(allowed: bool = True) -> Iterator[None]:
    """Inside, networks that recipes and cards name as `module:Class` are imported and built.

    with logsnr.allow_code():
        train(load_recipe("my.yaml"), "runs/mine")
    """
    token = _ALLOWED.set(allowed)
    try:
        yield
    finally:
        _ALLOWED.reset(token)
