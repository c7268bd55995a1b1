"""Compare: every sampler from the same noise, at counted evaluations, against one teacher.

comparison = compare(denoiser, [5, 8])        # or: measure(denoiser, [*ours(...), *peers(...), *plans(...)])
print(markdown(comparison))
"""

from logsnr.compare.entries import Entry, ours, plans, universal
from logsnr.compare.render import markdown, table, write
from logsnr.compare.result import Comparison, Row, Teacher
from logsnr.compare.run import compare, measure
from logsnr.compare.schedulers import peers

__all__ = [
    "Comparison",
    "Entry",
    "Row",
    "Teacher",
    "compare",
    "markdown",
    "measure",
    "ours",
    "peers",
    "plans",
    "table",
    "universal",
    "write",
]
