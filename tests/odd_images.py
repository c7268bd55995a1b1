"""Odd images: files and folders as they lie about, each with what reading it must give.

A case writes into an empty folder and then either has a right value (the pictures that a person sees, in order) and a
phrase that must be said, or is refused in one line.  `judged` reads it and says which of these happened.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from logsnr.errors import LogsnrError
from logsnr.training.config import DataConfig
from logsnr.training.data import load_data

W, H = 12, 8
_y, _x = np.mgrid[:H, :W]
COLOUR = np.stack([20 * _x, 30 * _y, 255 - 10 * _x - 10 * _y], -1).astype(np.uint8)
"""No symmetry: any turn, swap of channels or inversion shows."""
GREY = (7 * _x + 20 * _y).astype(np.uint8)
WHITE = np.full((H, W, 3), 255, np.uint8)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An odd folder.

    Attributes:
        name: what is odd.
        make: writes it.
        options: of `data`.
        right: the pictures `[H, W, C]` or `[H, W]` in order; None where it must be refused.
        says: words of the report, or of the refusal.
        tolerance: largest difference of a grey level.
        labels: of the pictures.
    """

    name: str
    make: Callable[[Path], None]
    options: dict[str, Any] = field(default_factory=dict)
    right: list[Any] | None = None
    says: str = ""
    tolerance: int = 0
    labels: list[int] | None = None


def judged(case: Case, folder: Path) -> str:
    """ "right", "refused", or what went wrong."""
    case.make(folder)
    try:
        source = folder / "x.npz" if (folder / "x.npz").exists() else folder
        data = load_data(DataConfig(source=str(source), holdout=0, **case.options))
    except LogsnrError as error:
        if "\n" in str(error):
            return f"several lines: {error}"
        return "refused" if case.right is None and case.says in str(error) else f"refused: {error}"
    if case.right is None:
        return "silent: read, where it should be refused"
    found, told = data.train_images.numpy(), data.describe()
    if len(found) != len(case.right):
        return f"silent: {len(found)} images instead of {len(case.right)}"
    order = _matched(found, case)  # none is held out, but the order is drawn
    for image, i in zip(found, order, strict=True):
        wanted = _channels_first(case.right[i])
        if image.shape != wanted.shape:
            return f"silent: {image.shape} instead of {wanted.shape}"
        if np.abs(image.astype(int) - wanted).max() > case.tolerance:
            return f"silent: off by {np.abs(image.astype(int) - wanted).max()} grey levels"
        if case.labels is not None and int(data.train_labels[order.index(i)]) != case.labels[i]:
            return "silent: a label went to another image"
    if case.says not in told:
        return f"silent: {told!r} does not say {case.says!r}"
    return "right"


def right(
    name: str,
    make: Callable[[Path], None],
    pictures: list[Any],
    says: str = "",
    *,
    tolerance: int = 0,
    labels: list[int] | None = None,
    **options: Any,
) -> Case:
    """A case that has a right value."""
    return Case(name=name, make=make, options=options, right=pictures, says=says, tolerance=tolerance, labels=labels)


def refused(name: str, make: Callable[[Path], None], says: str, **options: Any) -> Case:
    """A case that must be refused."""
    return Case(name=name, make=make, options=options, says=says)


def _channels_first(image: Any) -> np.ndarray[Any, Any]:
    return np.moveaxis(np.atleast_3d(np.asarray(image)), -1, 0).astype(int)


def _matched(found: np.ndarray[Any, Any], case: Case) -> list[int]:
    """For each image read, the wanted one that it is nearest to."""
    left, order = list(range(len(case.right or []))), []
    for image in found:
        wanted = [_channels_first((case.right or [])[i]) for i in left]
        far = [np.inf if w.shape != image.shape else np.abs(image - w).mean() for w in wanted]
        order.append(left.pop(int(np.argmin(far))))
    return order


def image(values: Any, mode: str | None = None) -> Image.Image:
    """Pillow's image of an array."""
    made = Image.fromarray(np.asarray(values))
    return made if mode is None else made.convert(mode)


def png(raw: np.ndarray[Any, Any], depth: int, kind: int, extra: bytes = b"") -> bytes:
    """A PNG file of any bit depth, rows unfiltered; `extra` stands between header and pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in raw)
    header = struct.pack(">IIBBBBB", raw.shape[1], raw.shape[0], depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def saved(name: str, picture: Image.Image, **options: Any) -> Callable[[Path], None]:
    """Writes one picture."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, **options)

    return make


def written(name: str, data: bytes) -> Callable[[Path], None]:
    """Writes bytes."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return make


def both(*makers: Callable[[Path], None]) -> Callable[[Path], None]:
    """Writes several."""

    def make(folder: Path) -> None:
        for maker in makers:
            maker(folder)

    return make


def stored(**arrays: Any) -> Callable[[Path], None]:
    """Writes x.npz."""
    return lambda folder: np.savez(folder / "x.npz", **arrays)


def _cut(name: str, share: float, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / name
        image(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))).save(file, **options)
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return make


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# What a viewer shows of COLOUR stored under each orientation.
SEEN = {
    1: COLOUR,
    2: COLOUR[:, ::-1],
    3: COLOUR[::-1, ::-1],
    4: COLOUR[::-1],
    5: COLOUR.transpose(1, 0, 2),
    6: np.rot90(COLOUR, -1),
    7: np.rot90(COLOUR, 2).transpose(1, 0, 2),
    8: np.rot90(COLOUR),
}
WIDE = (GREY.astype(np.uint16) * 257).astype(np.uint16)
ALPHA = np.dstack([COLOUR, np.where(_x < 6, 255, 0).astype(np.uint8)])
OVER = {
    "white": np.where(_x[..., None] < 6, COLOUR, 255).astype(np.uint8),
    "black": np.where(_x[..., None] < 6, COLOUR, 0).astype(np.uint8),
    "#102030": np.where(_x[..., None] < 6, COLOUR, [16, 32, 48]).astype(np.uint8),
}
HALF = np.dstack([COLOUR, np.full((H, W), 128, np.uint8)])
PALETTE = image(COLOUR).quantize(16, dither=Image.Dither.NONE)
PALE = np.asarray(PALETTE.convert("RGB"))
plain = saved("a.png", image(COLOUR))
ARRAYS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)


def _turn_cases() -> list[Case]:
    return [
        right(
            f"{suffix} with EXIF orientation {n}",
            saved(
                f"a.{suffix}",
                image(COLOUR),
                exif=_turned(n),
                **{"quality": 100, "subsampling": 0} if suffix == "jpg" else {},
            ),
            [SEEN[n]],
            "" if n == 1 else "turned as their EXIF says",
            tolerance=4 if suffix == "jpg" else 0,
        )
        for suffix, turns in (("png", range(1, 9)), ("jpg", (3, 6, 8)), ("tif", (3, 6)))
        for n in turns
    ]


def _sixteen_cases() -> list[Case]:
    dark = (GREY.astype(np.uint16) * 16).astype(np.uint16)
    twelve = written("a.pgm", b"P5 12 8 4095\n" + (GREY.astype(">u2") * 16).astype(">u2").tobytes())
    grey = {"channels": 1}
    return [
        right("16-bit grey PNG", saved("a.png", image(WIDE)), [GREY], "scaled to 8", **grey),
        right("16-bit grey PNG read as colour", saved("a.png", image(WIDE)), [np.dstack([GREY] * 3)]),
        right("16-bit grey TIFF", saved("a.tif", image(WIDE)), [GREY], "scaled to 8", **grey),
        right(
            "16-bit grey TIFF whose zero is white",
            saved("a.tif", image(65535 - WIDE), tiffinfo={262: 0}),
            [GREY],
            **grey,
        ),
        right(
            "big-endian 16-bit TIFF",
            saved("a.tif", Image.frombytes("I;16B", (W, H), WIDE.astype(">u2").tobytes())),
            [GREY],
            **grey,
        ),
        right("16-bit PGM", saved("a.pgm", image(WIDE)), [GREY], "scaled to 8", **grey),
        right("12-bit PGM", twelve, [GREY], "scaled to 8", tolerance=1, **grey),
        right(
            "12 bits in a 16-bit PNG", saved("a.png", image(dark)), [GREY // 16], "nearly black", tolerance=1, **grey
        ),
        right(
            "16-bit colour PNG", written("a.png", png((COLOUR.astype(np.uint16) * 257).astype(">u2"), 16, 2)), [COLOUR]
        ),
        right(
            "16-bit grey PNG with a transparent grey",
            written("a.png", png(WIDE.astype(">u2"), 16, 0, chunk(b"tRNS", struct.pack(">H", 257 * 27)))),
            [np.where(GREY == 27, 255, GREY)],
            "laid on white",
            **grey,
        ),
        refused("32-bit integers", saved("a.tif", image(WIDE.astype(np.int32))), "32-bit integers"),
        refused("floats in 0 ... 1", saved("a.tif", image((GREY / 255).astype(np.float32))), "holds floats"),
        refused(
            "a portable float map", written("a.ppm", b"Pf\n12 8\n-1.0\n" + GREY.astype("<f4").tobytes()), "holds floats"
        ),
        refused("uint16 arrays", stored(images=np.stack([WIDE, WIDE])), "(images // 257).astype('uint8')"),
        refused("float arrays", stored(images=ARRAYS / 255), "give stored grey levels as uint8"),
    ]


def _alpha_cases() -> list[Case]:
    return [
        *(
            right(
                f"transparent PNG on {name}",
                saved("a.png", image(ALPHA)),
                [seen],
                f"transparent, laid on {name}",
                **{} if name == "white" else {"background": name},
            )
            for name, seen in OVER.items()
        ),
        refused("transparent, refused", saved("a.png", image(ALPHA)), "is transparent", background="refuse"),
        right(
            "an opaque alpha, nothing refused",
            saved("a.png", image(np.dstack([COLOUR, np.full((H, W), 255, np.uint8)]))),
            [COLOUR],
            background="refuse",
        ),
        right(
            "half transparent",
            saved("a.png", image(HALF)),
            [(COLOUR * (128 / 255) + 255 * (127 / 255)).round()],
            "laid on white",
            tolerance=1,
        ),
        right(
            "grey with alpha",
            saved("a.png", image(np.dstack([GREY, ALPHA[..., 3]]), None)),
            [np.where(_x < 6, GREY, 255)],
            "laid on white",
            channels=1,
        ),
        right("a palette", saved("a.png", PALETTE), [PALE]),
        right(
            "a palette with one transparent colour",
            saved("a.png", PALETTE, transparency=3),
            [np.where((np.asarray(PALETTE) == 3)[..., None], 255, PALE)],
            "laid on white",
        ),
        right(
            "a GIF with a transparent colour",
            saved("a.gif", PALETTE, transparency=3),
            [np.where((np.asarray(PALETTE) == 3)[..., None], 255, PALE)],
            "laid on white",
        ),
        right(
            "a transparent RGB colour",
            saved("a.png", image(COLOUR), transparency=tuple(int(v) for v in COLOUR[2, 3])),
            [np.where((COLOUR == COLOUR[2, 3]).all(-1)[..., None], 255, COLOUR)],
            "laid on white",
        ),
        right(
            "a transparent WebP",
            saved("a.webp", image(ALPHA), lossless=True, exact=True),
            [OVER["white"]],
            "laid on white",
        ),
        right("a transparent TGA", saved("a.tga", image(ALPHA)), [OVER["white"]], "laid on white"),
    ]


def _mode_cases() -> list[Case]:
    black = np.where(GREY > 90, 255, 0).astype(np.uint8)
    frames = [image(np.roll(COLOUR, i, 1)) for i in range(3)]
    return [
        right("one bit", saved("a.png", image(black).convert("1")), [black], channels=1),
        right(
            "one-bit TIFF by fax", saved("a.tif", image(black).convert("1"), compression="group4"), [black], channels=1
        ),
        right("grey read as colour", saved("a.png", image(GREY)), [np.dstack([GREY] * 3)]),
        right("colour read as grey", plain, [np.asarray(image(COLOUR).convert("L"))], channels=1),
        right("CMYK TIFF", saved("a.tif", image(COLOUR).convert("CMYK")), [COLOUR], "CMYK, made RGB", tolerance=1),
        right(
            "CMYK JPEG",
            saved("a.jpg", image(COLOUR).convert("CMYK"), quality=100, subsampling=0),
            [COLOUR],
            "CMYK, made RGB",
            tolerance=6,
        ),
        refused("LAB", saved("a.tif", Image.merge("LAB", image(COLOUR).split())), "LAB values"),
        right("PAM-like PPM text", written("a.ppm", b"P3 2 1 255 255 0 0 0 0 255\n"), [[[[255, 0, 0], [0, 0, 255]]]]),
        right(
            "an animated GIF",
            saved("a.gif", image(GREY), save_all=True, append_images=[image(GREY[::-1])]),
            [GREY],
            "of several frames",
            channels=1,
        ),
        right(
            "an animated PNG",
            saved("a.png", frames[0], save_all=True, append_images=frames[1:]),
            [COLOUR],
            "of several frames",
        ),
        right(
            "a TIFF of several pages",
            saved("a.tif", frames[0], save_all=True, append_images=frames[1:]),
            [COLOUR],
            "of several frames",
        ),
        right(
            "a JPEG called .png",
            written("a.png", _bytes(image(COLOUR), "JPEG", quality=100, subsampling=0)),
            [COLOUR],
            tolerance=4,
        ),
    ]


def _bytes(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _suffix_cases() -> list[Case]:
    kinds = {
        "jfif": "JPEG",
        "jpe": "JPEG",
        "ppm": "PPM",
        "tga": "TGA",
        "bmp": "BMP",
        "dib": "DIB",
        "webp": "WEBP",
        "avif": "AVIF",
        "jp2": "JPEG2000",
        "PNG": "PNG",
    }
    how = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "JPEG2000": {"irreversible": False},
    }
    Image.init()
    return [
        right(
            f".{suffix}",
            written(f"a.{suffix}", _bytes(image(COLOUR), kind, **how.get(kind, {}))),
            [COLOUR],
            tolerance=6 if kind in ("JPEG", "AVIF") else 0,
        )
        for suffix, kind in kinds.items()
        if kind in Image.SAVE
    ] + [
        right(".heic beside .png", both(plain, written("b.heic", b"?")), [COLOUR], "not read: 1 .heic"),
        right("captions beside images", both(plain, written("a.txt", b"a cat")), [COLOUR], "1 .txt"),
        refused("nothing but .heic", written("b.heic", b"?"), "it holds 1 .heic"),
        refused(
            "an EPS called .png",
            written("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
            "cannot be read as an image",
        ),
    ]


def _folder_cases() -> list[Case]:
    cats = [saved(f"cats/{i}.png", image(np.roll(COLOUR, i, 1))) for i in range(2)]
    dogs = [saved(f"dogs/{i}.png", image(np.roll(255 - COLOUR, i, 1))) for i in range(2)]
    four, labels = (
        [np.roll(COLOUR, i, 1) for i in range(2)] + [np.roll(255 - COLOUR, i, 1) for i in range(2)],
        [0, 0, 1, 1],
    )
    classes = both(*cats, *dogs)

    def hidden(name: str, *, says: str = "1 hidden") -> Case:
        return right(f"{name} among classes", both(classes, saved(name, image(WHITE))), four, says, labels=labels)

    def linked(folder: Path) -> None:
        (folder / ".store").mkdir()
        both(*cats, *dogs)(folder / ".store")
        for name in ("cats", "dogs"):
            os.symlink(folder / ".store" / name, folder / name)
        os.symlink(folder, folder / "cats" / "above")

    return [
        hidden(".ipynb_checkpoints/0-checkpoint.png"),
        hidden("cats/.ipynb_checkpoints/0-checkpoint.png"),
        hidden("__MACOSX/0.png"),
        hidden("cats/._0.png"),
        hidden("dogs/@eaDir/0.png"),
        hidden(".thumbnails/x/0.png"),
        right(
            ".ipynb_checkpoints in a flat folder",
            both(plain, saved(".ipynb_checkpoints/a-checkpoint.png", image(WHITE))),
            [COLOUR],
            "1 hidden",
        ),
        right("._a.png that is no image", both(plain, written("._a.png", b"\x00\x05\x16\x07")), [COLOUR], "1 hidden"),
        right("classes that are links, one in a circle", linked, four, labels=labels),
        right(
            "a class without images",
            both(classes, written("eels/x.txt", b"")),
            four,
            "no class, as without images: eels",
            labels=labels,
        ),
        refused("an image beside class folders", both(classes, plain), "put every image into a class folder, or none"),
        right(
            "train and test as classes",
            both(saved("train/a.png", image(COLOUR)), saved("test/a.png", image(WHITE))),
            [WHITE, COLOUR],
            "train are read as classes",
        ),
        right("a dangling link", both(plain, lambda f: os.symlink(f / "none", f / "b.png")), [COLOUR], "1 .png"),
        right("a pipe called .png", both(plain, lambda f: os.mkfifo(f / "b.png")), [COLOUR], "1 .png"),
        refused("two sizes", both(plain, saved("b.png", image(COLOUR[:4]))), "set data.size"),
    ]


def _size_cases() -> list[Case]:
    square = {"size": 16}
    return [
        right(
            "enlarged",
            saved("a.png", image(np.full((5, 5, 3), 9, np.uint8))),
            [np.full((16, 16, 3), 9)],
            "enlarged to 16 x 16",
            **square,
        ),
        right(
            "cropped",
            saved("a.png", image(np.full((32, 64, 3), 9, np.uint8))),
            [np.full((16, 16, 3), 9)],
            "cropped to their central square",
            **square,
        ),
        right(
            "turned, then cropped", saved("a.png", image(COLOUR), exif=_turned(6)), [SEEN[6][2:10]], "turned", size=8
        ),
    ]


def _broken_cases() -> list[Case]:
    names = {
        "a.jpg": {},
        "a.gif": {},
        "a.bmp": {},
        "a.tif": {},
        "a.webp": {"lossless": True},
        "a.tga": {},
        "a.ppm": {},
        "b.png": {},
    }
    bad = written("b.png", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40)
    return [
        *(refused(f"half of {name}", _cut(name, 0.5, **how), "repair or remove it") for name, how in names.items()),
        *(
            refused(f"nothing of {name}", written(name, b""), "cannot be read as an image")
            for name in ("a.png", "a.jpg", "a.tga")
        ),
        refused("a web page called .jpg", written("a.jpg", b"<html>404</html>"), "cannot be read as an image"),
        refused(
            "a pointer of Git LFS",
            written("a.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "cannot be read as an image",
        ),
        refused("a flipped bit in a PNG", lambda f: (plain(f), _flip(f / "a.png"))[0], "cannot be read as an image"),
        right("broken, left out", both(plain, bad), [COLOUR], "left out as broken: 1 (b.png)", broken="skip"),
        refused("all broken, left out", bad, "none of the 1 images", broken="skip"),
        refused(
            "a bomb of 2^31 pixels",
            written(
                "a.png",
                png(np.zeros((1, 1), np.uint8), 8, 0).replace(
                    struct.pack(">II", 1, 1), struct.pack(">II", 50000, 50000)
                ),
            ),
            "cannot be read as an image",
        ),
    ]


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def _array_cases() -> list[Case]:

    def rows(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return np.random.default_rng(1).integers(0, 256, (5, *shape), dtype=np.uint8)

    last = [(3, 6, 3), (4, 6, 3), (4, 4, 3), (3, 3, 3), (1, 6, 3), (3, 9, 1), (4, 6, 4), (3, 4, 3)]
    first = [(3, 4, 4), (3, 3, 3), (1, 3, 3), (4, 3, 3)]
    return [
        *(
            right(f"[N, H, W, C] with {shape}", stored(images=rows(shape)), list(rows(shape)), "stored as NHWC")
            for shape in last
        ),
        *(
            right(
                f"[N, C, H, W] with {shape}",
                stored(images=rows(shape)),
                list(np.moveaxis(rows(shape), 1, -1)),
                "stored as NCHW",
                **{"layout": "NCHW"} if shape == (3, 3, 3) else {},
            )
            for shape in first
        ),
        refused(
            "a layout that cannot be", stored(images=rows((4, 6, 3))[:, :2]), "data.layout says NCHW", layout="NCHW"
        ),
        refused(
            "names of too few classes",
            stored(images=rows((4, 4)), labels=np.arange(5), class_names=np.array(["a"])),
            "give one text per class",
        ),
        right(
            "a class without images in labels",
            stored(images=rows((4, 4)), labels=np.array([0, 0, 2, 2, 0])),
            list(rows((4, 4))),
            "1 of the classes have no images",
            labels=[0, 0, 2, 2, 0],
        ),
    ]


CASES = [
    *_turn_cases(),
    *_sixteen_cases(),
    *_alpha_cases(),
    *_mode_cases(),
    *_suffix_cases(),
    *_folder_cases(),
    *_size_cases(),
    *_broken_cases(),
    *_array_cases(),
]
"""All of them."""
