"""Pictures of pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.core.state import write_bytes


def grid_image(pictures: Tensor, columns: int = 0, *, side: int = 0, gap: int = 1, paper: int = 255) -> Image.Image:
    """A contact sheet of (N, C, H, W) in [-1, 1]; small ones are enlarged to about ``side`` pixels, unblurred.

    ``paper`` is the grey level between the pictures, 0 to 255.
    """
    n, _, height, width = pictures.shape
    columns = columns or max(1, round(n**0.5))
    rows = -(-n // columns)
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    if levels.shape[1] != 3:
        levels = levels[:, :1].expand(-1, 3, -1, -1)
    sheet = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), paper, dtype=torch.uint8)
    for i, picture in enumerate(levels):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[:, y : y + height, x : x + width] = picture
    image = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    factor = max(1, round((side or 32) / max(height, width)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def save_grid(pictures: Tensor, path: Path, columns: int = 0) -> Path:
    """Writes :func:`grid_image` as PNG, whole or not at all."""
    held = io.BytesIO()
    grid_image(pictures, columns).save(held, "PNG")
    write_bytes(path, held.getvalue())
    return path


def save_strips(strips: Sequence[tuple[str, Tensor]], path: Path) -> Path:
    """Writes one labelled line of pictures (n, C, H, W) per entry, below each other, as PNG."""
    font = ImageFont.load_default(size=15)
    images = [grid_image(pictures, len(pictures)) for _, pictures in strips]
    label = 24
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height + label for i in images)), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for (text, _), image in zip(strips, images, strict=True):
        draw.text((4, y + 3), text, fill="black", font=font)
        sheet.paste(image, (0, y + label))
        y += image.height + label
    held = io.BytesIO()
    sheet.save(held, "PNG")
    write_bytes(path, held.getvalue())
    return path
