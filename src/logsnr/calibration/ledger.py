"""The ledger: what a calibration has measured, and what it cost.

Every measurement has a name and is a pure function of the settings, so a run that reads its measurements from a file
makes the same decisions as the run that wrote them: an interrupted calibration resumes where it stopped and ends on
the same plan, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logsnr import files
from logsnr.denoiser import Denoiser, NetworkDenoiser
from logsnr.errors import LogsnrError, one_line
from logsnr.reading import check_format, read_json, reading
from logsnr.sampling.counted import Counted
from logsnr.writing import replace_file

FORMAT = 5
"""Version of the file; 3 and 4 had no checksum."""
_FIX = "delete it to start again, or give resume= another path"


class SpentError(Exception):
    """The budget is used up."""


class Ledger:
    """Measurements by name, each with its cost, kept in a file if one is given.

    Args:
        meter: the denoiser whose answers are the cost.
        settings: what the measurements depend on, as JSON has it.
        path: a file to resume from and to write to, or None.
        budget: answers that may be paid for.

    Attributes:
        answers: samples denoised for what was asked so far, now or in an earlier run.
        passes: samples times network evaluations, of the same.

    Raises:
        LogsnrError: if the file is not a ledger, or that of other settings.
    """

    def __init__(self, meter: Counted, settings: dict[str, Any], path: Path | None, budget: int) -> None:
        self.meter, self.settings, self.path = meter, settings, path
        self.budget: float = budget
        self.known: dict[str, tuple[Any, int, int]] = {}
        self.asked: set[str] = set()
        self.answers = 0
        self.passes = 0
        self.plan_hash: str | None = None
        if path is not None and path.exists():
            self._read(path)

    def afford(self, price: int) -> None:
        """Check that so many answers are left.

        Raises:
            SpentError: if not.
        """
        if self.answers + price > self.budget:
            raise SpentError

    def recall(self, name: str, price: int, measure: Callable[[], Any]) -> Any:
        """The measurement of that name, a JSON value: remembered, or made now and remembered.

        Raises:
            SpentError: if it was not asked for yet, and its price is not left.
        """
        if name in self.asked:
            return self.known[name][0]
        self.afford(price)
        if name not in self.known:
            answers, passes = self.meter.answers, self.meter.passes
            value = measure()
            self.known[name] = value, self.meter.answers - answers, self.meter.passes - passes
            self.write()
        value, answers, passes = self.known[name]
        self.asked.add(name)
        self.answers += answers
        self.passes += passes
        return value

    def settle(self, plan_hash: str) -> None:
        """Record the plan that the search ended on; what is measured from here on is beside the budget.

        Raises:
            LogsnrError: if the file holds another one.
        """
        if self.plan_hash not in (None, plan_hash):
            raise LogsnrError(
                f"{self.path} records the plan {str(self.plan_hash)[:12]}..., this search ended on "
                f"{plan_hash[:12]}...: its report noise was used for another plan; start again with another seed"
            )
        self.plan_hash, self.budget = plan_hash, math.inf
        self.write()

    def keep(self, path: Path) -> None:
        """Write to a file from here on, where none was given before.

        Raises:
            LogsnrError: if the disk refuses.
        """
        if self.path is None:
            self.path = path
            self.write()

    def write(self) -> None:
        """Put everything on disk, atomically.

        Raises:
            LogsnrError: if the disk refuses.
        """
        if self.path is None:
            return
        data = {"format": FORMAT, "settings": self.settings, "plan_hash": self.plan_hash, "known": self.known}
        data["sha256"] = _checksum(data)
        try:
            replace_file(self.path, json.dumps(data).encode())
        except OSError as error:
            raise LogsnrError(
                f"cannot write {self.path}: {error.strerror or one_line(error)}; give resume= a file in a folder that "
                "exists and has space"
            ) from error

    def _read(self, path: Path) -> None:
        data = read_json(path, _FIX, "the file of a calibration")
        with reading(path, _FIX, "the file of a calibration"):
            form, settings, known = data["format"], dict(data["settings"]), data["known"]
            self.known = {name: (value, int(answers), int(passes)) for name, (value, answers, passes) in known.items()}
            self.plan_hash = data["plan_hash"]
        if form in (3, 4):  # what is n now
            settings |= {"n": settings.pop("batch")} if form == 3 and "batch" in settings else {}
        else:
            check_format(form, FORMAT, str(path), _FIX)
            if data.pop("sha256", None) != _checksum(data):
                raise LogsnrError(f"{path} was altered (its measurements are not those of its checksum): {_FIX}")
        if settings != self.settings:
            differ = [key for key, value in self.settings.items() if settings.get(key) != value]
            raise LogsnrError(
                f"{path} is of another calibration (different: {', '.join(differ)}): give resume= another path, or the "
                "settings it was started with"
            )


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def fingerprint(denoiser: Denoiser) -> str:
    """sha256 of the network's parameters and buffers, by name: which weights a plan was made for, whatever guidance or
    pipeline lies around them."""
    networks = [module for module in denoiser.modules() if isinstance(module, NetworkDenoiser)]
    return files.fingerprint((networks[0] if len(networks) == 1 else denoiser).state_dict())
