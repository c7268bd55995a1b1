"""Hugging Face datasets as data: the images, labels and held-out part that the library itself gives."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from logsnr.errors import LogsnrError
from logsnr.training import load_data
from logsnr.training.config import DataConfig, recipe_from
from logsnr.training.data import Rows
from logsnr.training.draws import Draws

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's, about its own dependencies


def load(source, **options):
    return load_data(DataConfig(source=str(source), **options))


def test_without_the_library_the_extra_is_named(monkeypatch):
    import importlib

    real = importlib.import_module

    def missing(name, *rest):
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(LogsnrError, match=r"data.source = 'hf:mnist' needs datasets, .* pip install 'logsnr\[data\]'"):
        load("hf:mnist")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A folder of `save_to_disk` and a Parquet file of 24 pictures, and those pictures."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("tables")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3), dtype=np.uint8)

    def png(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    kinds = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])})

    def table(part, file):
        rows = {"picture": [png(image) for image in pixels[part]], "kind": [i % 3 for i in range(24)[part]]}
        parquet.write_table(pyarrow.table(rows, schema=kinds.arrow_schema), root / file)
        return str(root / file)

    files = {"train": table(slice(0, 20), "x.parquet"), "test": table(slice(20, 24), "test.parquet")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(root / "cache")).save_to_disk(root / "saved")
    return root, torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_saved_set_is_its_pictures_with_its_own_held_out_part(tables, tmp_path, monkeypatch, in_memory):
    monkeypatch.setenv("LOGSNR_CACHE", str(tmp_path))
    root, pixels = tables
    data = load(f"hf:{root / 'saved'}", in_memory=in_memory)
    assert isinstance(data.train_images, torch.Tensor if in_memory else Rows)
    assert torch.equal(data.train_images[:], pixels[:20])
    assert torch.equal(data.test_images[:], pixels[20:])
    assert data.train_labels.tolist() == [i % 3 for i in range(20)]
    assert data.class_names == ("a", "b", "c")


def test_a_parquet_file_trains_in_the_same_order_in_memory_and_read_ahead(tables, tmp_path, monkeypatch):
    monkeypatch.setenv("LOGSNR_CACHE", str(tmp_path))
    root, _ = tables
    batches = []
    for where in (True, False):
        recipe = recipe_from(
            {"data": {"source": str(root / "x.parquet"), "in_memory": where, "workers": 1}, "batch": 4, "steps": 1}
        )
        data = load_data(recipe.data)
        assert len(data.train_images) + len(data.test_images) == 20
        draw = Draws(recipe, data, generator=torch.Generator(), device=torch.device("cpu"))
        batches.append(torch.stack([draw(step)[0] for step in (3, 4, 9)]))
        draw.close()
    assert torch.equal(*batches)


def test_what_datasets_cannot_read_is_one_line(tables, tmp_path):
    root, _ = tables
    (tmp_path / "x.parquet").write_bytes(b"none")
    with pytest.raises(LogsnrError, match=r"x.parquet' cannot be read by datasets") as caught:
        load(tmp_path / "x.parquet")
    assert "\n" not in str(caught.value)
    with pytest.raises(LogsnrError, match=r"data.broken: skip is of folders"):
        load(f"hf:{root / 'saved'}", broken="skip")
