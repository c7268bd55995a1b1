"""Compare: every sampler from the same noise, at counted evaluations, against one teacher.

comparison = compare(denoiser, [5, 8])        # or: measure(denoiser, [*ours(...), *peers(...), *plans(...)])
print(markdown(comparison))
"""

from logsnr.evaluation.compare.entries import Entry, ours, own, plans, uncalibrated
from logsnr.evaluation.compare.render import markdown, table, write
from logsnr.evaluation.compare.result import Comparison, Row, Teacher
from logsnr.evaluation.compare.run import compare, measure
from logsnr.evaluation.compare.schedulers import peers

__all__ = [
    "Comparison",
    "Entry",
    "Row",
    "Teacher",
    "compare",
    "markdown",
    "measure",
    "ours",
    "own",
    "peers",
    "plans",
    "table",
    "uncalibrated",
    "write",
]
