"""A network of one's own, by `kind: "module:Class"` in a recipe; whatever else stands there goes to the class.

    Class(shape, classes=..., **options)                          an nn.Module
    network(x [B, *shape], label [B], class_labels [B]) -> F [B, *shape]      class_labels where there are classes

Index `classes` is the null condition.  The file only names the code: it is imported where permission.py allows, or
given by whoever loads the run; and nothing but a class of networks is ever called.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from logsnr.errors import LogsnrError, one_line, shown
from logsnr.models.base import Network, NetworkConfig
from logsnr.permission import code_is_allowed

PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class OwnConfig(NetworkConfig):
    """A network of one's own.

    Args:
        kind: "module:Class"; the module is looked for in the working directory too.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: Annotated[str, Field(pattern=PATTERN, max_length=200)]

    @property
    def options(self) -> dict[str, Any]:
        """What the class is given beside shape and classes."""
        return dict(self.model_extra or {})


class Own(Network):
    """Somebody's network, as one of ours.

    Args:
        config: that names it.
        shape: of one sample.
        made: the class in place of the one that is named, which then is not imported.

    Raises:
        LogsnrError: if the class may not be imported, is not there, is no class of networks, or refuses its arguments.
    """

    def __init__(self, config: OwnConfig, shape: tuple[int, ...], made: type[nn.Module] | None = None) -> None:
        super().__init__(config, shape)
        self.config: OwnConfig = config
        made = _class(config.kind) if made is None else made
        if not (isinstance(made, type) and issubclass(made, nn.Module)):
            raise LogsnrError(f"{shown(made)} is no class of networks: give a subclass of torch.nn.Module")
        try:
            self.own = made(tuple(shape), classes=config.classes, **config.options)
        except (TypeError, ValueError) as error:
            told = ", ".join(["shape", "classes", *config.options])
            raise LogsnrError(f"network {config.kind!r} does not take ({told}): {one_line(error)}") from error

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        classes = self.classes_or_null(x, class_labels)
        out: Tensor = self.own(x, label) if classes is None else self.own(x, label, classes)
        if out.shape != x.shape:
            raise LogsnrError(
                f"network {self.config.kind!r} answers {tuple(out.shape)} to {tuple(x.shape)}: it must answer in the "
                "shape of its input"
            )
        return out


def _class(kind: str) -> Any:
    module, _, name = kind.partition(":")
    if not code_is_allowed():
        raise LogsnrError(
            f"network {kind!r} is code, and a file that names code runs none until you say so: --allow-code, or in "
            f"Python logsnr.load(..., network={name}), with logsnr.allow_code(): ..."
        )
    here = os.getcwd()
    sys.path.insert(0, here)  # beside the recipe's user, as for `python -m`
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise LogsnrError(f"network {kind!r}: {one_line(error)}; run it where {module} lies, or install it") from error
    finally:
        sys.path.remove(here)
    if not hasattr(found, name):
        raise LogsnrError(f"network {kind!r}: module {module} has no {name}")
    return getattr(found, name)
