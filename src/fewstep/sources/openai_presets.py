"""The released checkpoints of improved and guided diffusion and of consistency models, with the published settings.

Sources: the README files and launch scripts of the three repositories (arXiv 2102.09672, 2105.05233, 2303.01469).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.models.guided import GuidedUNetConfig

Repository = Literal["guided-diffusion", "consistency-models"]


@dataclass(frozen=True)
class Preset:
    """What is published of one checkpoint.

    Attributes:
        repository: which of the two loaders it belongs to; improved diffusion counts as guided.
        net: the network, picture size included.
        run: the settings of its diffusion that the weights do not show.
        multistep: the published points of multistep sampling and of how many they count, such as ((0, 22, 39), 40).
    """

    repository: Repository
    net: GuidedUNetConfig
    run: Mapping[str, Any]
    multistep: tuple[tuple[int, ...], int] | None = None


def _guided(size: int, classes: int = 0, **net: Any) -> Preset:
    multipliers = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}[size]
    fields = {"channels": 256, "blocks": 2, "learn_variance": True, **net}
    cosine = size == 64
    run = {
        "diffusion_steps": 1000,
        "noise_schedule": "cosine" if cosine else "linear",
        "rescale_timesteps": False,
        "predict_xstart": False,
    }
    return Preset(
        "guided-diffusion", GuidedUNetConfig((3, size, size), classes, multipliers=multipliers, **fields), run
    )


def _improved(size: int, classes: int = 0, *, rescale: bool = True, **net: Any) -> Preset:
    multipliers = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}[size]
    fields = {"channels": 128, "blocks": 3, "heads": 4, "attention": (16, 8), **net}
    fields |= {"head_channels": 0, "updown": False, "learn_variance": True}
    run = {
        "diffusion_steps": 1000 if size == 256 else 4000,
        "noise_schedule": "linear" if size == 256 else "cosine",
        "rescale_timesteps": rescale,
        "predict_xstart": False,
    }
    return Preset(
        "guided-diffusion", GuidedUNetConfig((3, size, size), classes, multipliers=multipliers, **fields), run
    )


def _consistency(size: int, distilled: bool, multistep: tuple[tuple[int, ...], int] | None = None) -> Preset:
    fields: dict[str, Any] = {"channels": 192, "blocks": 3, "classes": 1000}
    if size == 256:
        fields = {"channels": 256, "blocks": 2, "multipliers": (1, 1, 2, 2, 4, 4), "scale_shift": False}
    net = GuidedUNetConfig((3, size, size), new_order=True, **fields)
    run = {"distillation": distilled, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    return Preset("consistency-models", net, run, multistep)


_LSUN = _guided(256)
_BEDROOM = _improved(256, rescale=False, blocks=2, heads=1, scale_shift=False, attention=(16,))

PRESETS: dict[str, Preset] = {
    "64x64_diffusion": _guided(64, 1000, channels=192, blocks=3, new_order=True),
    "128x128_diffusion": _guided(128, 1000, heads=4, head_channels=0),
    "256x256_diffusion": _guided(256, 1000),
    "256x256_diffusion_uncond": _LSUN,
    "512x512_diffusion": _guided(512, 1000),
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _LSUN,
    "imagenet64_uncond_100M_1500K": _improved(64),
    "imagenet64_uncond_vlb_100M_1500K": _improved(64),
    "imagenet64_cond_270M_250K": _improved(64, 1000, rescale=False, channels=192),
    "cifar10_uncond_50M_500K": _improved(32),
    "cifar10_uncond_vlb_50M_500K": _improved(32),
    "lsun_uncond_100M_1200K_bs128": _BEDROOM,
    "lsun_uncond_100M_2400K_bs64": _BEDROOM,
    "edm_imagenet64_ema": _consistency(64, False),
    "cd_imagenet64_l2": _consistency(64, True, ((0, 22, 39), 40)),
    "cd_imagenet64_lpips": _consistency(64, True, ((0, 22, 39), 40)),
    "ct_imagenet64": _consistency(64, True, ((0, 106, 200), 201)),
    "edm_bedroom256_ema": _consistency(256, False),
    "cd_bedroom256_l2": _consistency(256, True, ((0, 18, 39), 40)),
    "cd_bedroom256_lpips": _consistency(256, True, ((0, 17, 39), 40)),
    "ct_bedroom256": _consistency(256, True, ((0, 67, 150), 151)),
    "edm_cat256_ema": _consistency(256, False),
    "cd_cat256_l2": _consistency(256, True),
    "cd_cat256_lpips": _consistency(256, True),
    "ct_cat256": _consistency(256, True, ((0, 62, 150), 151)),
}
