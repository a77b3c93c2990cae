"""Image files to pixels: the check of a file before it is used, and one decoder for folders and Parquet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
GREY = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B"})
COLOUR = frozenset({"RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr"})
PEEK = 65536
# JPEG (with several pictures: MPO), the only format here whose orientation can be read without decoding
ORIENTED = ("JPEG", "MPO")
TURNED = (5, 6, 7, 8)
ORIENTATION = 0x0112

Filter = Literal["box", "lanczos"]
FILTERS: dict[Filter, Image.Resampling] = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class Found:
    """What a look at one encoded image shows: its size and colour, or the reason to reject it."""

    width: int = 0
    height: int = 0
    grey: bool = False
    digest: bytes = b""
    reason: str = ""


@dataclass(frozen=True)
class Fit:
    """How a decoded picture is brought to its place.

    Args:
        channels: 1 (grey) or 3 (RGB).
        size: side of the square result in pixels, or None to keep the picture's own size.
        centre_crop: cut the centred square out before resizing; otherwise the picture is stretched.
        filter: "box" (area average; Pillow rounds to whole values after each direction) or "lanczos".
    """

    channels: int
    size: int | None = None
    centre_crop: bool = True
    filter: Filter = "lanczos"


def inspect(file: BinaryIO) -> Found:
    """Looks at an encoded image, mostly without decoding it.

    PNG checksums are verified, the end of JPEG and WebP files is looked for, and other formats are decoded. The digest
    covers the length and the first and last 64 KiB.
    """
    head = file.read(PEEK)
    length = file.seek(0, 2)
    if not length:
        return Found(reason="empty file")
    file.seek(max(0, length - PEEK))
    tail = file.read()
    file.seek(0)
    whole = has_end(head, tail, length)
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if image.mode not in GREY | COLOUR:
                return Found(reason=f"unsupported pixel type {image.mode}")
            if image.format in ORIENTED and image.getexif().get(ORIENTATION) in TURNED:
                width, height = height, width
            grey = image.mode in GREY
            if image.format == "PNG":
                image.verify()
            elif not (whole and image.format in (*ORIENTED, "WEBP")):
                image.load()
    except UnidentifiedImageError:
        return Found(reason="not an image" if whole else "truncated")
    except Image.DecompressionBombError:
        return Found(reason="too many pixels")
    # decoders answer damaged bytes with many types of exception: OSError, SyntaxError, struct.error, ValueError
    except Exception:
        return Found(reason="damaged" if whole else "truncated")
    return Found(width, height, grey, hashlib.sha256(b"%d:" % length + head + tail).digest())


def has_end(head: bytes, tail: bytes, length: int) -> bool:
    """False if a file starts like one of the formats but lacks its end; some sound files do, so decoding decides."""
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail
    if head.startswith(b"\xff\xd8"):
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= length
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") <= length
    if head.startswith(b"GIF8"):
        return tail.rstrip(b"\0").endswith(b";")
    return True


def decode(file: BinaryIO, fit: Fit) -> Tensor:
    """One picture, first frame: uint8 (C, H, W). Transparent parts are laid on white.

    Raises:
        OSError, ValueError, SyntaxError: Pillow cannot decode it.
    """
    with Image.open(file, formats=FORMATS) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened) if opened.format in ORIENTED else opened
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit greys at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
    image = image.convert("L" if fit.channels == 1 else "RGB")
    if fit.size is not None:
        box = centre(*image.size) if fit.centre_crop else None
        image = image.resize((fit.size, fit.size), FILTERS[fit.filter], box=box)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if fit.channels == 1 else pixels.permute(2, 0, 1).contiguous()


def centre(width: int, height: int) -> tuple[int, int, int, int]:
    """The centred square of a picture as (left, upper, right, lower) in pixels."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side
