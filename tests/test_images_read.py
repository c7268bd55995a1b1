"""Images as they lie about: each is read as a person sees it, or refused in one line; nothing happens in silence."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import odd_images
import pytest
import torch
from PIL import Image, ImageCms
from torch.overrides import TorchFunctionMode

from logsnr import load
from logsnr.cli.data import data_of
from logsnr.cli.support import class_of
from logsnr.errors import LogsnrError
from logsnr.images import grid_columns
from logsnr.training import Dataset, folders, load_data, recipe_from, train
from logsnr.training.config import DataConfig
from logsnr.training.images import read_image, suffixes
from logsnr.training.pictures import in_turn


@pytest.mark.parametrize("case", odd_images.CASES, ids=lambda case: case.name)
def test_odd_images(case, tmp_path):
    assert odd_images.judged(case, tmp_path) == ("refused" if case.right is None else "right")


def test_one_file_is_one_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(odd_images.ALPHA).save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png", background="black")
    assert found.size == (odd_images.H, odd_images.W)  # as seen: on its side
    assert found.mode == "RGBA"
    assert found.said == ("turned as their EXIF says", "transparent, laid on black")
    assert np.array_equal(found.pixels, np.rot90(odd_images.OVER["black"], -1).transpose(2, 0, 1))


def swapped() -> bytes:
    """sRGB under another name, with red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(profile[128:132]), 12)}
    red, green = (slice(entries[name] + 4, entries[name] + 12) for name in (b"rXYZ", b"gXYZ"))
    profile[red], profile[green] = profile[green], profile[red]
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "rsGB".encode("utf-16-be"))


@pytest.mark.parametrize(
    ("mode", "stored", "seen"),
    [("RGB", (255, 0, 0), (0, 255, 0)), ("RGBA", (0, 200, 0, 255), (200, 0, 0)), ("RGBA", (9, 9, 9, 0), (0, 0, 0))],
)
def test_colours_are_those_of_their_profile(mode, stored, seen, tmp_path):
    picture = Image.new(mode, (4, 4), stored)
    picture.save(tmp_path / "a.png", icc_profile=swapped())
    found = read_image(tmp_path / "a.png", background="black")
    assert np.abs(found.pixels[:, 1, 1].astype(int) - seen).max() <= 1
    assert found.said[0] == "of another colour profile, made sRGB"
    # sRGB itself changes nothing, and says nothing; what is no profile is said
    picture = Image.new("RGB", (4, 4), (12, 34, 56))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, said in ((srgb, ()), (b"none", ("with a colour profile that cannot be read, taken for sRGB",))):
        picture.save(tmp_path / "b.png", icc_profile=profile)
        found = read_image(tmp_path / "b.png")
        assert (found.pixels[:, 1, 1].tolist(), found.said) == ([12, 34, 56], said)


def test_what_was_read_is_said_in_a_line(tmp_path):
    for name in ("cats/0.png", "cats/1.png", "dogs/0.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L" if name.startswith("dogs") else "RGB", (6, 9), "red" if "cats" in name else 9).save(
            tmp_path / name
        )
    (tmp_path / "dogs" / "1.png").write_bytes(b"")
    (tmp_path / "cats" / ".0.png").write_bytes(b"")
    said = load_data(DataConfig(source=str(tmp_path), size=8, broken="skip", holdout=0.3)).describe()
    assert said.startswith(f"{tmp_path.name}: 3 images (1 held out), 8 x 8 in colour; 2 classes: cats 2, dogs 1; ")
    for words in (
        "6 x 9 pixels, 2 RGB, 1 L",
        "all cropped to their central square",
        "all enlarged to 8 x 8",
        "left out as broken: 1 (dogs/1.png)",
        "not read: 1 hidden",
    ):
        assert words in said


def test_many_classes_are_not_all_listed():
    labels = torch.arange(1000)
    images = torch.zeros(1000, 1, 2, 2, dtype=torch.uint8)
    data = Dataset(
        train_images=images, train_labels=labels, test_images=images[:0], test_labels=labels[:0],
        grey_levels=256, classes=1000, class_names=tuple(f"n{i:03d}" for i in range(1000)),
    )  # fmt: skip
    assert "1,000 classes: n000 1, n001 1, n002 1, ..., n999 1" in data.describe()


def test_decoding_uses_threads_and_keeps_the_order(tmp_path, monkeypatch):
    for i in range(40):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i:02d}.png")
    seen = set()

    def read(file, **options):
        seen.add(threading.get_ident())
        return read_image(file, **options)

    monkeypatch.setattr(folders, "read_image", read)
    monkeypatch.setattr(folders, "_WINDOW", 16)
    told = []
    found = folders.read_folder(tmp_path, DataConfig(source=str(tmp_path), channels=1), lambda *at: told.append(at))
    assert threading.get_ident() not in seen
    assert found.images[:, 0, 0, 0].tolist() == list(range(40))
    assert told == [(16, 40), (32, 40), (40, 40)]


def test_the_spread_of_the_data_makes_no_copy_of_it(monkeypatch):
    images = torch.randint(0, 256, (64, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset(
        train_images=images, train_labels=None, test_images=images[:0], test_labels=None, grey_levels=256, classes=0
    )
    largest, own = 0, images.untyped_storage().data_ptr()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != own:
                largest = max(largest, out.nbytes)
            return out

    with Watch():
        spread = data.sigma_data
    assert largest <= 256 * 8  # counts of grey levels
    assert spread == pytest.approx(float((2 * (images.double() + 0.5) / 256 - 1).std(correction=0)), rel=1e-12)


def test_backgrounds_that_are_none():
    with pytest.raises(LogsnrError, match=r"data.background: 'whit' is no colour: give a name such as white"):
        recipe_from({"steps": 1, "data": {"background": "whit"}})


def test_suffixes_are_those_that_pillow_opens():
    Image.init()
    assert {".png", ".jpg", ".jfif", ".ppm", ".tga"} <= set(suffixes()) <= set(Image.registered_extensions())


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A run on a folder of two classes."""
    root = tmp_path_factory.mktemp("home") / "someone" / "flowers"
    for i, name in enumerate(("china", "sunflower")):
        (root / name).mkdir(parents=True)
        for j in range(6):
            Image.new("L", (4, 4), 100 * i + 20 * j).save(root / name / f"{j}.png")
    recipe = recipe_from(
        {
            "data": {"source": str(root), "channels": 1},
            "network": {"channels": [8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4},
            "objective": {"preset": "edm", "logsnr": [-8, 8]},
            "samples": {"every": 0},
            "conditional": True,
            "batch": 4,
            "steps": 1,
            "device": "cpu",
        }
    )
    return train(recipe, root.parent / "run", progress=False).out


def test_the_names_of_classes_are_kept_and_understood(flowers):
    denoiser = load(flowers)
    assert denoiser.card["class_names"] == ["china", "sunflower"]
    assert denoiser.card["data"].startswith(
        "flowers: 12 images (1 held out), 4 x 4 in grey; 2 classes: china 6, sunflo"
    )
    assert [class_of(denoiser, text) for text in ("sunflower", "1", "2", None)] == [1, 1, 2, None]
    with pytest.raises(LogsnrError, match=r"--class 'chima' is not one of china, sunflower, or a number: did"):
        class_of(denoiser, "chima")
    denoiser.card["class_names"] = ["10", "0"]
    assert class_of(denoiser, "10") == 0  # a name wins
    with pytest.raises(LogsnrError, match="this model has no names of classes; give a number"):
        class_of(load("zoo:fashion-mnist"), "boot")


def test_a_card_names_no_place_of_this_machine(flowers, tmp_path):
    card = (flowers / "card.json").read_text()
    assert "someone" not in card
    assert '"source": "flowers"' in card
    assert len(data_of(load(flowers), None).train_images) == 11  # its state knows where they lie
    shutil.copytree(flowers, tmp_path / "given", ignore=lambda *_: ["state"])
    with pytest.raises(LogsnrError, match=r"'flowers' does not exist: .*; or say with --data where"):
        data_of(load(tmp_path / "given"), None)
    assert data_of(load(tmp_path / "given"), str(flowers.parent / "flowers")).shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("count", "classes", "columns"), [(64, 0, 8), (64, 1, 8), (64, 2, 8), (64, 3, 9), (80, 10, 10), (64, 16, 16),
                                      (64, 17, 8), (64, 1000, 8), (1, 2, 1), (2, 1000, 1), (6, 4, 4)]
)  # fmt: skip
def test_grids_are_about_square_with_a_class_per_column_where_that_fits(count, classes, columns):
    assert grid_columns(count, classes) == columns


def test_a_picture_of_few_samples_spreads_them_over_many_classes():
    assert in_turn(4, 1000).tolist() == [0, 250, 500, 750]
    assert in_turn(5, 2).tolist() == [0, 1, 0, 1, 0]
