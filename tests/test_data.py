"""Data: the formats that are read, and one clear line for everything else."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from logsnr.errors import LogsnrError
from logsnr.training.config import DataConfig
from logsnr.training.data import load_data


def pictures(n=20, shape=(4, 4), high=256):
    return np.random.default_rng(0).integers(0, high, (n, *shape), dtype=np.uint8)


def load(source, **options):
    return load_data(DataConfig(source=str(source), **options))


def npz(tmp_path, **arrays):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


def everything(data):
    """All images, held out or not, in an order that does not depend on the split."""
    images = torch.cat([data.train_images, data.test_images]).flatten(1)
    return {bytes(image.tolist()) for image in images}


def test_digits_are_split_once_and_for_all():
    data = load("digits")
    assert (len(data.train_images), len(data.test_images), data.grey_levels, data.classes) == (1500, 297, 17, 10)
    assert data.shape == (1, 8, 8)
    again = load("digits")
    assert torch.equal(data.test_images, again.test_images)
    other = load("digits", split_seed=1)
    assert not torch.equal(data.test_images, other.test_images)
    assert everything(data) == everything(other)
    # Each label stayed with its image: the mean zero and the mean one of both parts look alike.
    for label in (0, 1):
        train, test = (
            i[t == label].float().mean(0)
            for i, t in ((data.train_images, data.train_labels), (data.test_images, data.test_labels))
        )
        assert torch.corrcoef(torch.stack([train.flatten(), test.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6), (1, 5, 6)),
        ((5, 6, 1), (1, 5, 6)),
        ((5, 6, 3), (3, 5, 6)),
        ((3, 5, 6), (3, 5, 6)),
        ((1, 5, 6), (1, 5, 6)),
    ],
)
def test_layouts_are_understood(tmp_path, shape, expected):
    images = pictures(4, shape)
    data = load(npz(tmp_path, images=images), holdout=0)
    assert data.shape == expected
    channels_last = shape[-1] in (1, 3)
    reference = np.moveaxis(images, -1, 1) if channels_last else images.reshape(4, *expected)
    assert everything(data) == {bytes(image.flatten()) for image in reference}


def test_an_npy_file_and_its_held_out_part(tmp_path):
    images = pictures(20)
    np.save(tmp_path / "x.npy", images)
    data = load(tmp_path / "x.npy", holdout=0.25)
    assert (len(data.train_images), len(data.test_images), data.classes) == (15, 5, 0)
    assert data.train_labels is None
    assert everything(data) == {bytes(image.flatten()) for image in images}


def test_labels_follow_their_images(tmp_path):
    images = pictures(20)
    labels = images[:, 0, 0].astype(np.int64) % 7
    data = load(npz(tmp_path, x_train=images, y_train=labels), holdout=0.3)
    assert data.classes == labels.max() + 1
    for part, of in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert torch.equal(part[:, 0, 0, 0].long() % 7, of)


def test_a_held_out_part_of_ones_own_is_kept(tmp_path):
    train, test = pictures(6), pictures(9)[6:]
    data = load(npz(tmp_path, x_train=train, y_train=np.arange(6), x_test=test, y_test=np.arange(3)))
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(train))
    assert torch.equal(data.test_images[:, 0], torch.from_numpy(test))
    assert data.test_labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pictures().astype(np.float32) / 255}, r"float32 images with 320 values: give stored grey levels"),
        ({"images": np.array([[[np.nan, 1.0], [np.inf, 0.0]]])}, r"float64 .*, 2 of them NaN or infinite: .*as uint8"),
        ({"images": pictures().astype(np.int64)}, r"int64 images: give stored grey levels as uint8 in 0 \.\.\. 255"),
        ({"images": pictures(4, ())}, r"shape \(4,\): give \[N, H, W\]"),
        ({"images": pictures(4, (5, 6, 7))}, r"shape \(4, 5, 6, 7\): give \[N, H, W\]"),
        ({"images": pictures(0)}, r"shape \(0, 4, 4\)"),
        ({"pictures": pictures()}, r"has no images: its keys are pictures; use one of images, train_images"),
        (
            {"images": pictures(20), "labels": np.arange(19)},
            r"20 images and labels of shape \(19,\): give one label per image",
        ),
        ({"images": pictures(2), "labels": np.array([0.0, 1.0])}, r"float64 labels: give integers"),
        ({"images": pictures(2), "labels": np.array([0, -1])}, r"label -1: labels must be 0"),
        ({"x_train": pictures(2), "x_test": pictures(2, (5, 5))}, r"\(1, 4, 4\) and holds out images of \(1, 5, 5\)"),
    ],
)
def test_arrays_that_are_wrong(tmp_path, arrays, message):
    with pytest.raises(LogsnrError, match=message) as caught:
        load(npz(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


def test_grey_levels_above_the_stated_ones(tmp_path):
    images = pictures(20, high=16)
    images[3, 0, 0] = 17
    with pytest.raises(
        LogsnrError, match=r"pixel value 17 with data.grey_levels = 17: values must be in 0 \.\.\. 16; raise"
    ):
        load(npz(tmp_path, images=images), grey_levels=17)
    with pytest.raises(LogsnrError, match=r"held-out part .* pixel value 17 with data.grey_levels = 17"):
        load(npz(tmp_path, x_train=images[:3], x_test=images[3:]), grey_levels=17)


def test_everything_held_out(tmp_path):
    with pytest.raises(LogsnrError, match=r"1 images, of which 1 are held out: lower data.holdout"):
        load(npz(tmp_path, images=pictures(1)), holdout=0.9)


@pytest.mark.parametrize("cut", [30, 200, 420])
def test_a_truncated_npz(tmp_path, cut):
    path = npz(tmp_path, images=pictures())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(LogsnrError, match=r"images.npz cannot be read as a NumPy file .*truncated or not a NumPy file"):
        load(path)


def test_a_truncated_npy(tmp_path):
    np.save(tmp_path / "x.npy", pictures())
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data[:-10])
    with pytest.raises(LogsnrError, match=r"x.npy.* more than the file holds"):
        load(tmp_path / "x.npy")


def test_nothing_is_ever_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    objects = np.empty(1, dtype=object)
    objects[0] = Bomb()
    with pytest.raises(LogsnrError, match="Python objects, which are never unpickled: save plain uint8"):
        load(npz(tmp_path, images=objects))
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LogsnrError, match=r"raw.npy"):
        load(tmp_path / "raw.npy")


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(
        LogsnrError,
        match=r"'nowhere' does not exist: give 'digits', an .npz or .npy file, .*, the folder of .*, or a f",
    ):
        load("nowhere")
    with pytest.raises(LogsnrError, match=r"x.npz' does not exist: check the path"):
        load(tmp_path / "x.npz")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(LogsnrError, match=r"is of no kind that is read: give 'digits', an .npz"):
        load(tmp_path / "x.txt")
    with pytest.raises(LogsnrError, match="apply to folders of images: remove them"):
        load(npz(tmp_path, images=pictures()), size=8)


@pytest.mark.parametrize("option", [{"size": 8}, {"channels": 1}, {"background": "black"}, {"broken": "skip"}])
def test_options_of_folders_beside_other_data(tmp_path, option):
    for source in ("digits", npz(tmp_path, images=pictures())):
        with pytest.raises(LogsnrError, match="apply to folders of images: remove them"):
            load(source, **option)


def test_a_layout_beside_what_has_none(tmp_path):
    write_images(tmp_path, pictures(2))
    for source in ("digits", tmp_path):
        with pytest.raises(LogsnrError, match=r"data.layout applies to .npz and .npy files: remove it"):
            load(source, layout="NCHW")


def write_images(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def test_a_folder_of_images(tmp_path):
    images = pictures(5, (4, 6, 3))
    write_images(tmp_path, images)
    data = load(tmp_path, holdout=0)
    assert data.shape == (3, 4, 6)
    assert everything(data) == {bytes(np.moveaxis(image, -1, 0).flatten()) for image in images}
    assert data.train_labels is None


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path):
    for name, value in (("b", 200), ("a", 100)):
        write_images(tmp_path / name, [np.full((4, 4), value, np.uint8)] * 3)
    data = load(tmp_path, channels=1, holdout=0)
    assert data.shape == (1, 4, 4)
    assert data.classes == 2
    assert torch.equal(data.train_images[:, 0, 0, 0] == 200, data.train_labels == 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_crop_and_resize(tmp_path, axis):
    """A white square in the middle of a black strip, across or along: the central crop is all white."""
    strip = np.zeros((6, 18), np.uint8)
    strip[:, 6:12] = 255
    write_images(tmp_path, [np.moveaxis(strip, 1, axis), np.full((9, 9), 255, np.uint8)])
    data = load(tmp_path, size=3, channels=1, holdout=0)
    assert torch.equal(data.train_images, torch.full((2, 1, 3, 3), 255, dtype=torch.uint8))


def test_folders_that_are_wrong(tmp_path):
    with pytest.raises(LogsnrError, match=r"holds no images \(.png, .apng, .jpg.*check the path"):
        load(tmp_path)
    write_images(tmp_path, pictures(2))
    (tmp_path / "zz.png").write_bytes(b"not a picture")
    with pytest.raises(LogsnrError, match=r"zz.png cannot be read as an image .*repair or remove it"):
        load(tmp_path)
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "zz.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LogsnrError, match=r"zz.png cannot be read as an image"):
        load(tmp_path)
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(tmp_path / "zz.png")
    with pytest.raises(LogsnrError, match=r"zz.png is 5 x 3, 000.png is 4 x 4: set data.size"):
        load(tmp_path)
    (tmp_path / "zz.png").unlink()
    write_images(tmp_path / "cats", pictures(1))
    with pytest.raises(LogsnrError, match=r"class folder 'cats' and, beside it, the image '000.png'"):
        load(tmp_path)
