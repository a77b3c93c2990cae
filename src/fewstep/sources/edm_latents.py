"""The latent space of EDM2's networks for 512x512 pictures: Stable Diffusion's autoencoder, by channel rescaled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.core.cond import Classes
from fewstep.core.pipeline import Conditions, pipeline
from fewstep.errors import InputError
from fewstep.models.libraries import diffusers_class, opening, quiet


class LatentPipeline:
    """Latents ``raw scale + bias`` of an AutoencoderKL, where ``raw`` has the autoencoder's own size (2312.02696).

    Attributes:
        name: what the file calls its autoencoder.
        vae: the folder or Hub id that it is opened from; None if none was given.
        factor: pixels per latent along one side.
    """

    kind: ClassVar[str] = "edm2-latents"
    factor = 8

    def __init__(
        self,
        name: str,
        scale: tuple[float, ...],
        bias: tuple[float, ...],
        *,
        classes: int = 0,
        vae: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.scale, self.bias, self.classes = name, tuple(scale), tuple(bias), classes
        self.vae, self.device = None if vae is None else str(vae), torch.device(device)

    @property
    def conds(self) -> Conditions | None:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        return Classes((1.0,) * self.classes) if self.classes else None

    @property
    def codec(self) -> LatentPipeline:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        return self

    @cached_property
    def network(self) -> nn.Module:
        """The autoencoder, opened on first use.

        Raises:
            InputError: none was given, or it cannot be opened.
        """
        if self.vae is None:
            raise InputError(f"this network makes latents of {self.name}: pass vae=, its folder or Hub id, to see them")
        with quiet(), opening(self.vae, "AutoencoderKL"):
            made = diffusers_class("AutoencoderKL").from_pretrained(self.vae, use_safetensors=True)
        made.to(self.device).eval().requires_grad_(False)
        found: nn.Module = made
        return found

    def _by_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=like.dtype).reshape(-1, 1, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, H/8, W/8) -> pictures (B, 3, H, W) in about [-1, 1]."""
        raw = (latents - self._by_channel(self.bias, latents)) / self._by_channel(self.scale, latents)
        network: Any = self.network
        made: Tensor = network.decode(raw.to(self.device, next(network.parameters()).dtype)).sample
        # This autoencoder was run on pictures in [0, 1].
        return made.float() * 2 - 1

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8): the mean, nothing drawn."""
        network: Any = self.network
        unit = (pictures.to(self.device) + 1) / 2
        raw = network.encode(unit.to(next(network.parameters()).dtype)).latent_dist.mean.float()
        return raw * self._by_channel(self.scale, raw) + self._by_channel(self.bias, raw)

    def describe(self) -> dict[str, Any]:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        return {k: getattr(self, k) for k in ("name", "scale", "bias", "classes", "vae")}

    def to(self, device: torch.device) -> LatentPipeline:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        self.device = torch.device(device)
        if "network" in self.__dict__:
            self.network.to(self.device)
        return self


@pipeline("edm2-latents")
def open_latents(description: Mapping[str, Any], device: torch.device) -> LatentPipeline:
    """The latent space that :meth:`LatentPipeline.describe` described; ``source`` stands for a moved ``vae``."""
    fields = dict(description)
    vae = fields.pop("source", None) or fields.pop("vae")
    fields.pop("vae", None)
    return LatentPipeline(**fields, vae=vae, device=device)
