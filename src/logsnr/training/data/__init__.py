"""Data: images by index, in memory or not, from every kind of source."""

from __future__ import annotations

from logsnr.training.data.arrays import array_images
from logsnr.training.data.dataset import Dataset, Images, Rows, Store
from logsnr.training.data.latents import Encoder, Latent
from logsnr.training.data.prepared import is_prepared
from logsnr.training.data.preparing import Prepared, prepare
from logsnr.training.data.sources import DATASETS, Source, is_generated, load_data, told_sources
from logsnr.training.data.vae import VAE

__all__ = [
    "DATASETS",
    "VAE",
    "Dataset",
    "Encoder",
    "Images",
    "Latent",
    "Prepared",
    "Rows",
    "Source",
    "Store",
    "array_images",
    "is_generated",
    "is_prepared",
    "load_data",
    "prepare",
    "told_sources",
]
