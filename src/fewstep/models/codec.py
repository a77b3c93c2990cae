"""Latent spaces: the autoencoders of diffusers as a codec between latents and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.pipeline import Codec
from fewstep.errors import InputError, unknown

FACTORS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "AutoencoderKL": lambda config: 2 ** (len(config["block_out_channels"]) - 1),
    "AutoencoderDC": lambda config: 2 ** (len(config["encoder_block_out_channels"]) - 1),
}
"""The autoencoders that are known, and by how much each makes a picture's sides smaller."""


def factor_of(class_name: str, config: Mapping[str, Any]) -> int:
    """Pixels per latent along one side.

    Raises:
        InputError: an autoencoder that is not supported.
    """
    if class_name not in FACTORS:
        raise unknown("autoencoder class of diffusers", class_name, FACTORS)
    return FACTORS[class_name](config)


class Autoencoder(Codec):
    """An ``AutoencoderKL`` or ``AutoencoderDC`` of diffusers (arXiv 2112.10752, 2410.10733), loaded on first use.

    Latents are what the denoiser sees: ``(z - shift_factor) * scaling_factor`` of the autoencoder's own ``z``, or
    standardised by ``latents_mean`` and ``latents_std`` where its configuration has them.
    """

    def __init__(self, load: Callable[[], nn.Module], *, tiled: bool = False) -> None:
        """``tiled`` decodes large pictures in overlapping tiles and one at a time: less memory, faint seams."""
        self._load, self.tiled = load, tiled

    @property
    def vae(self) -> Any:
        """The autoencoder itself.

        Raises:
            InputError: a class without tiled decoding was asked for it.
        """
        vae: Any = self._load()
        for name in ("tiling", "slicing"):
            switch = getattr(vae, f"{'enable' if self.tiled else 'disable'}_{name}", None)
            if switch is not None:
                switch()
            elif self.tiled:
                raise InputError(f"{type(vae).__name__} has no {name}: open the pipeline with tiled=False")
        return vae

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, H, W), float32, about [-1, 1]."""
        vae = self.vae
        mean, scale = _affine(vae, latents)
        z = (latents / scale + mean).to(_dtype(vae))
        return vae.decode(z, return_dict=False)[0].float()

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), float32: the posterior's mean, nothing drawn."""
        vae = self.vae
        found = vae.encode(pictures.to(_dtype(vae)), return_dict=False)[0]
        z = (found.mean if hasattr(found, "mean") and not isinstance(found, Tensor) else found).float()
        mean, scale = _affine(vae, z)
        return (z - mean) * scale


def _dtype(vae: Any) -> torch.dtype:
    found: torch.dtype = next(vae.parameters()).dtype
    return found


def _affine(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """``(mean, scale)`` with ``latents = (z - mean) * scale``."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        column = [torch.tensor(v, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1) for v in (mean, std)]
        return column[0], config.scaling_factor / column[1]
    return config.get("shift_factor") or 0.0, config.scaling_factor
