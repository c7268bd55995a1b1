"""Generation: any number of images, by any number of processes, into shards that are always whole."""

from logsnr.generation.run import Generated, generate
from logsnr.generation.shards import Shards

__all__ = ["Generated", "Shards", "generate"]
