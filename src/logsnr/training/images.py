"""Images: what one file means as a picture.

    as a person sees it      turned as its EXIF says, its colour profile made sRGB, 8 bits per channel, transparency
                             laid on a background
    as a network wants it    grey or RGB, its central square, resized: by one of `CROPS`

What has no one meaning is refused: 32-bit integers and floats name no white, LAB no RGB.  Whatever was done that nobody
asked for is said: `Picture.said` names it, in words that follow a count of files.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, TiffImagePlugin

from logsnr.errors import LogsnrError, one_line

FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
}
"""Formats that are read, in Pillow's words, with their suffixes; Pillow may lack one (AVIF before 11.3)."""
REFUSE = "refuse"
"""A background that is none: transparent images are refused."""
DARK = 2**12
"""16-bit images that stay below look black: cameras of 12 bits write such."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
_PLAIN = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


class BrokenImageError(LogsnrError):
    """A file that no decoder can read; a recipe may say that such are left out."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image file as it was read.

    Attributes:
        pixels: uint8 `[C, H, W]`.
        size: (width, height) of the whole picture, as seen.
        mode: how the file stores it, in Pillow's words: "L", "RGB", "RGBA", "I;16", ...
        said: what was done to it unasked.
    """

    pixels: np.ndarray[Any, Any]
    size: tuple[int, int]
    mode: str
    said: tuple[str, ...]


def suffixes() -> tuple[str, ...]:
    """Suffixes of the files that are read here."""
    return tuple(suffix for name in _known() for suffix in FORMATS[name])


def read_image(
    file: Path,
    *,
    channels: int = 3,
    size: int | None = None,
    background: str = "white",
    crop: str = "square",
    data: io.BytesIO | None = None,
) -> Picture:
    """The picture in a file.

    Args:
        file: of any of `FORMATS`, whatever its suffix says.
        channels: 1 for grey, 3 for colour.
        size: crop to the central square and resize to this side; None for neither.
        background: colour under transparent parts, a name or "#rrggbb"; "refuse" for an error instead.
        crop: a name of `CROPS`, how size is reached.
        data: what is in the file, where it is at hand; `file` is then its name.

    Raises:
        BrokenImageError: if no decoder reads it.
        LogsnrError: if it has no one meaning in 8 bits, or is transparent and `background` is "refuse".
    """
    # A TGA file has no mark of its own: only its name can say so.
    formats = [name for name in _known() if name != "TGA" or file.suffix.lower() in FORMATS["TGA"]]
    try:
        with Image.open(data or file, formats=formats) as opened:
            if opened.format == "PNG":
                opened.verify()  # reading the pixels does not look at their checksum
        if data is not None:
            data.seek(0)
        with Image.open(data or file, formats=formats) as opened:
            turn = _orientation(opened)
            frames = getattr(opened, "n_frames", 1)
            opened.load()
    except Exception as error:  # decoders of damaged files raise whatever they run into
        raise BrokenImageError(
            f"{file} cannot be read as an image ({one_line(error)}): repair or remove it, or leave such files out "
            "with data.broken: skip"
        ) from error
    said = ["of several frames, read as the first"] if frames > 1 and opened.format != "MPO" else []
    image = _narrowed(opened, file, said.append)
    # Pillow turns TIFF files itself.
    if turn in _TURNS:
        said.append("turned as their EXIF says")
        if opened.format != "TIFF":
            image = image.transpose(_TURNS[turn])
    image = _in_srgb(image, opened.info.get("icc_profile"), said.append)
    image = _opaque(image, file, background, said.append)
    if image.mode in ("CMYK", "YCbCr"):
        said.append(f"{image.mode}, made RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    whole = image.size
    if size is not None:
        image = CROPS[crop](image, size, said.append)
    pixels = np.atleast_3d(np.asarray(image, dtype=np.uint8)).transpose(2, 0, 1)
    return Picture(pixels=pixels, size=whole, mode=opened.mode, said=tuple(said))


def colour(name: str) -> tuple[int, int, int]:
    """The RGB of a colour's name or "#rrggbb".

    Raises:
        LogsnrError: if it is none.
    """
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise LogsnrError(f"{name!r} is no colour: give a name such as white, '#rrggbb', or {REFUSE}") from error
    return red, green, blue


@cache
def _known() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels may be sound where the EXIF is not
        return 1


def _narrowed(image: ImageFile.ImageFile, file: Path, say: Callable[[str], None]) -> Image.Image:
    """The image with 8 bits per channel: 16-bit grey 0 ... 65535 becomes 0 ... 255."""
    # Pillow reads grey of more than 8 bits in PNM files as "I", stretched to 16.
    if image.mode in _WIDE or (image.mode == "I" and image.format in ("PNG", "PPM")):
        full, negative = 65535, False
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            full = 2 ** int(np.max(image.tag_v2.get(_BITS, 16))) - 1
            negative = image.tag_v2.get(_PHOTOMETRIC) == 0
        stored = np.asarray(image).astype(np.int64)
        see_through = image.info.get("transparency")
        say("of 16 bits, scaled to 8" if full == 65535 else "of over 8 bits, scaled to 8")
        if full == 65535 and int(stored.max()) < DARK:
            say(f"of 16 bits with values below {DARK} alone, nearly black (scale them first)")
        seen = (full - stored if negative else stored) * 255 + full // 2
        narrow = Image.fromarray((seen // full).clip(0, 255).astype(np.uint8))
        if isinstance(see_through, int):
            narrow.putalpha(Image.fromarray(np.where(stored == see_through, 0, 255).astype(np.uint8)))
        return narrow
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise LogsnrError(
            f"{file} holds {kind}, which do not say what is white: save it with 8 or 16 bits, e.g. "
            "Image.fromarray((255 * x).round().astype('uint8')) for x in 0 ... 1"
        )
    if image.mode not in _PLAIN:
        raise LogsnrError(f"{file} holds {image.mode} values, which are not read: save it as RGB or grey")
    return image


def _in_srgb(image: Image.Image, profile: bytes | None, say: Callable[[str], None]) -> Image.Image:
    """The image in sRGB, where it brings a profile of colours that are others: a photo's Display P3, a print's CMYK."""
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L", "LA"):
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return image
        flat, alpha = image, None
        if image.mode in ("RGBA", "LA"):
            flat, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
        seen = ImageCms.profileToProfile(flat, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        say("with a colour profile that cannot be read, taken for sRGB")
        return image
    assert seen is not None
    if alpha is not None:
        seen.putalpha(alpha)
    say("of another colour profile, made sRGB")
    return seen


def _opaque(image: Image.Image, file: Path, background: str, say: Callable[[str], None]) -> Image.Image:
    """The image over the background, where anything of it is transparent."""
    if not image.has_transparency_data:
        return image
    over = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if over.getchannel("A").getextrema() == (255, 255):
        return over.convert("RGB")
    if background == REFUSE:
        raise LogsnrError(
            f"{file} is transparent and data.background says {REFUSE}: give a colour to lay it on, e.g. white"
        )
    say(f"transparent, laid on {background}")
    return Image.alpha_composite(Image.new("RGBA", over.size, (*colour(background), 255)), over).convert("RGB")


def _square(image: Image.Image, size: int, say: Callable[[str], None]) -> Image.Image:
    """The central square, resized."""
    side = min(image.size)
    if image.width != image.height:
        say("cropped to their central square")
    if side < size:
        say(f"enlarged to {size} x {size}")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def _adm(image: Image.Image, size: int, say: Callable[[str], None]) -> Image.Image:
    """ADM's centre crop (2105.05233): halved by boxes while twice as large as needed, bicubic to the shorter side, then
    the central square."""
    if image.width != image.height:
        say("cropped to their central square")
    if min(image.size) < size:
        say(f"enlarged to {size} x {size}")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS = {"square": _square, "adm": _adm}
"""How an image becomes a square of a size: its central square, resized (Lanczos); or as ADM's ImageNet was made."""
