"""Inference checkpoints of k-diffusion: a safetensors file with its model's configuration beside it or within."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fewstep.core.denoiser import edm
from fewstep.core.generator import Generator, check_device
from fewstep.core.state import load_weights, read_json
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.models.k_unet import KUNet, KUNetConfig
from fewstep.solve.lms import lms
from fewstep.sources.checkpoint import check_dtype, read_checkpoint

TYPES = ("image_v1",)
STEPS = 50
# Of KarrasAugmentWrapper: what the model was told about each augmentation.
AUGMENTATIONS = 9


def load_kdiffusion(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Generator:
    """A teacher from a k-diffusion checkpoint of model type "image_v1", its convolutional U-Net (arXiv 2206.00364).

    ``config`` is the configuration that it was trained with, a mapping or a JSON file; newer checkpoints hold it in
    their metadata, under "config". The weights are float32 unless ``dtype`` says otherwise. The augmentation is told to
    be none, as in sampling. The sampler is the repository's: linear multistep of order 4 on 50 Karras steps.

    Raises:
        InputError: a bad file, no or a bad configuration, a model type or a condition that is not supported, weights
            of another architecture, or no such device.
    """
    path = Path(path)
    tensors = read_checkpoint(path)
    model = _model_config(path, config)
    kind = model.get("type")
    if kind not in TYPES:
        raise InputError(f"{path} is of model type {kind!r}, which is not supported: expected {', '.join(TYPES)}")
    try:
        size, wrapped = _unet_config(model), bool(model.get("augment_wrapper", True))
        sigma_data = float(model.get("sigma_data", 1.0))
        low, high = float(model["sigma_min"]), float(model["sigma_max"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"the configuration of {path} is incomplete or garbled at 'model': {error}") from None
    if not 0 < sigma_data < math.inf:
        raise InputError(f"the configuration of {path} has sigma_data={sigma_data!r}: expected a finite number > 0")
    inner = {k.removeprefix("inner_model.") if wrapped else k: v for k, v in tensors.items()}
    # Without memory at first, so that nothing is drawn for weights that come from the file.
    with torch.device("meta"):
        net = KUNet(size)
    load_weights(net.to_empty(device="cpu"), inner, path)
    denoiser = edm(net, size.shape, sigma_data=sigma_data, sigma_min=low, sigma_max=high)
    here, rates = check_device(device), net.timestep_embed.weight
    denoiser.to(here, check_dtype(dtype)).eval().requires_grad_(False)
    # The time's rates stay float32, because their phases are large.
    net.timestep_embed.weight = rates.to(here)
    facts = {"repository": "k-diffusion", "file": path.name, "model": dict(model)}
    return Generator(denoiser, lms(karras(STEPS, low, high)), None, None, {"source": facts})


def _model_config(path: Path, config: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The part "model" of the configuration given, or of the file's metadata."""
    if isinstance(config, str | Path):
        config = read_json(Path(config))
    elif config is None:
        config = _metadata(path)
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise InputError(
            f"the configuration of {path} has no 'model': pass config=, the .json that it was trained with"
        )
    return model


def _metadata(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("config")
    except (SafetensorError, OSError):
        text = None
    if text is None:
        raise InputError(f"{path} has no configuration in its metadata: pass config=, the .json it was trained with")
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the configuration in the metadata of {path} is not JSON: {error}") from None
    return body if isinstance(body, Mapping) else {}


def _unet_config(model: Mapping[str, Any]) -> KUNetConfig:
    """The network that a configuration describes."""
    for name in ("mapping_cond_dim", "unet_cond_dim", "cross_cond_dim", "skip_stages"):
        if model.get(name):
            raise InputError(f"{name}={model[name]} is not supported: only unconditional models at full resolution are")
    height, width = model["input_size"]
    return KUNetConfig(
        shape=(int(model["input_channels"]), int(height), int(width)),
        features=int(model["mapping_out"]),
        depths=tuple(int(d) for d in model["depths"]),
        channels=tuple(int(c) for c in model["channels"]),
        attention=tuple(bool(a) for a in model["self_attn_depths"]),
        patch=int(model.get("patch_size", 1)),
        mapping_cond=AUGMENTATIONS if model.get("augment_wrapper", True) else 0,
        variance=bool(model.get("has_variance", False)),
        dropout=float(model.get("dropout_rate", 0.0)),
    )
