"""Projection: how far a noisy state is from a set, the nearest point of it, and the smoothed squared distance.

    y = z / alpha = x + sigma eps          dist_K(y) = min over x in K of ||y - x||,   proj_K(y) the x that attains it
    1/2 grad dist_K(y)^2 = y - proj_K(y)                                         (2306.04848, sec. 2)
    dist_K^2(y, sigma) = -2 sigma^2 log sum over x in K of exp(-||y - x||^2 / (2 sigma^2))
    1/2 grad dist_K^2(y, sigma) = sigma eps*(y, sigma)

The last line is the paper's theorem: the ideal denoiser's step is the gradient of the smoothed distance.  With the
-sigma^2 that the paper prints in the line before, the gradient would be sigma eps* without the 1/2; the factor 2 makes
the theorem true and the smoothed distance tend to dist_K^2 at sigma -> 0.
"""

from logsnr.projection.points import Points, Softmin
from logsnr.projection.sets import Flat, Product, ReferenceSet, Sphere

__all__ = ["Flat", "Points", "Product", "ReferenceSet", "Softmin", "Sphere"]
