"""Compare: every sampler from the same noise, at counted evaluations, against one teacher.

comparison = compare(denoiser, [5, 8])        # or: measure(denoiser, [*ours(...), *peers(...), *plans(...)])
print(markdown(comparison))
"""

from logsnr.evaluation.compare.entries import Entry, ours, own, plans, searched, started, uncalibrated
from logsnr.evaluation.compare.render import markdown, table, write
from logsnr.evaluation.compare.result import Cell, Comparison, Row, Teacher, merged
from logsnr.evaluation.compare.run import compare, measure
from logsnr.evaluation.compare.schedulers import peers

__all__ = [
    "Cell",
    "Comparison",
    "Entry",
    "Row",
    "Teacher",
    "compare",
    "markdown",
    "measure",
    "merged",
    "ours",
    "own",
    "peers",
    "plans",
    "searched",
    "started",
    "table",
    "uncalibrated",
    "write",
]
