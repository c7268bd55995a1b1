"""Judge every pipeline and scheduler class, keep the verdicts, and write docs/compatibility.md of the newest diffusers.

PYTHONPATH=tests python -m compatibility                judges all with the diffusers that is installed
PYTHONPATH=tests python -m compatibility PATTERN        prints these verdicts, writes nothing
PYTHONPATH=tests python -m compatibility PATTERN keep   judges these again, and the page with the others' verdicts
PYTHONPATH=tests python -m compatibility page           the page again, from the verdicts that are kept
"""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import diffusers

from compatibility.judge import Verdict, judge
from compatibility.page import page
from compatibility.pipelines import built, case
from compatibility.results import keep, kept, newest

diffusers.utils.logging.set_verbosity(50)
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def verdict_of(name: str) -> Verdict | str:
    """The verdict on a pipeline class, or why it does not run with its own scheduler either."""
    try:
        return judge(lambda: case(name))
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    finally:
        gc.collect()


def main() -> None:
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    if pattern == "page":
        PAGE.write_text(page(kept()))
        return
    verdicts = {}
    for name in built():
        if re.search(pattern, name):
            verdicts[name] = verdict_of(name)
            print(name, verdicts[name], flush=True)
    if sys.argv[2:] == ["keep"]:
        verdicts = {**kept()[diffusers.__version__][1], **verdicts}
    if not pattern or sys.argv[2:]:
        keep(verdicts)
        if newest():
            PAGE.write_text(page(kept()))


if __name__ == "__main__":
    main()
