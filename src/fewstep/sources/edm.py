"""Networks of NVIDIA's EDM (arXiv 2206.00364) and EDM2 (arXiv 2312.02696) from their pickles."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.cond import Classes
from fewstep.core.denoiser import Precond, edm
from fewstep.core.generator import Generator, check_device
from fewstep.core.path import EDM, DDPMPath, VPPath
from fewstep.core.state import load_weights
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.models.adm import ADM, ADMConfig
from fewstep.models.edm2 import EDM2Config, EDM2UNet
from fewstep.models.song_unet import SongUNet, SongUNetConfig
from fewstep.solve.heun import heun
from fewstep.sources.checkpoint import check_dtype
from fewstep.sources.edm_latents import LatentPipeline
from fewstep.sources.unpickle import Persistent, read_pickle

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def load_edm(
    path: str | Path,
    *,
    key: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    vae: str | Path | None = None,
) -> Generator:
    """The generator in a network pickle of EDM or EDM2. Nothing in the file is executed.

    The sampler is EDM's: Heun on Karras' grid over the part of [0.002, 80] that the network knows, 18 steps up to
    32x32, 40 above, and 32 for EDM2 (sections 3 and 5 of the papers); for iDDPM at its trained levels. Classes
    are drawn with equal frequencies. Networks that were run in half precision run in float32 unless ``dtype`` says
    otherwise. EDM2 networks of 512x512 pictures work on the latents of an autoencoder that is not in the file.

    Args:
        path: the file.
        key: which of the file's networks; by default ``"ema"``.
        device: where the network shall live.
        dtype: of its weights, a floating type or its name, such as "bfloat16" or "bf16"; float32 by default.
        vae: folder or Hub id of the autoencoder whose latents the network makes, such as stabilityai/sd-vae-ft-mse.

    Raises:
        InputError: no pickle or a damaged one, a pickle that would execute anything, no such key, a network or
            preconditioning that is not EDM's, weights that do not belong, or no such device.
    """
    place, kind, path = check_device(device), check_dtype(dtype), Path(path)
    data = read_pickle(path)
    name, outer = _choose(path, data, key)
    if outer.class_name not in _MAKERS:
        raise unknown(f"preconditioning in {path}", outer.class_name, _MAKERS)
    try:
        denoiser = _MAKERS[outer.class_name](_File(path, outer))
        latents = _latents(data.get("encoder")) if isinstance(data, Mapping) else None
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its {outer.class_name} is not laid out as EDM's are: {error}") from None
    # Buffers hold random frequencies, which half precision would move: only weights are converted.
    for weight in denoiser.parameters():
        weight.data = weight.data.to(kind)
    denoiser.to(place).eval().requires_grad_(False)
    classes = int(denoiser.net.config.classes)  # type: ignore[union-attr, arg-type]
    card = {"source": path.name, "class": outer.class_name, "key": name, "sha256": _sha256(path)}
    sampler, conds = _sampler(denoiser, outer.class_name), Classes((1.0,) * classes) if classes else None
    if latents is None:
        if vae is not None:
            raise InputError(f"{path} holds a network of pictures: it cannot take vae={str(vae)!r}")
        return Generator(denoiser, sampler, None, conds, card)
    around = LatentPipeline(**latents, classes=classes, vae=vae, device=place)
    return Generator(denoiser, sampler, around.codec, conds, card, around)


def _choose(path: Path, data: Any, key: str | None) -> tuple[str, Persistent]:
    """The name and record of the network to load."""
    if isinstance(data, Persistent) and key is None:
        return "", data
    if not isinstance(data, Mapping):
        raise InputError(f"{path} holds a {type(data).__name__}: expected a dictionary with a network under 'ema'")
    found = {k: v for k, v in data.items() if isinstance(v, Persistent) and "_modules" in v.state}
    wanted = "ema" if key is None else key
    if wanted not in found:
        hint = f"pass key= one of {sorted(map(str, found))}" if found else "it holds no networks"
        raise InputError(f"{path} has no network under {wanted!r}: {hint}")
    return wanted, found[wanted]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _latents(encoder: Any) -> dict[str, Any] | None:
    """How the pictures were encoded: ``latent = raw * scale + bias`` by channel, from the VAE of that name."""
    if not isinstance(encoder, Persistent) or "vae_name" not in encoder.state:
        return None
    rows = {k: tuple(float(v) for v in encoder.state[k]) for k in ("scale", "bias")}
    return {"name": str(encoder.state["vae_name"]), **rows}


def _sampler(denoiser: Precond, kind: str) -> Tableau:
    low, high = max(SIGMA_MIN, denoiser.sigma_min), min(SIGMA_MAX, denoiser.sigma_max)
    steps = 32 if kind == "Precond" else 18 if denoiser.shape[1] <= 32 else 40
    grid = karras(steps, low, high)
    if isinstance(denoiser.path, DDPMPath):
        levels = denoiser.path.levels
        nearest = levels[(grid[:-1, None] - levels).abs().argmin(1)]
        # Two that fall on one trained level are one.
        grid = torch.cat([torch.unique_consecutive(nearest), grid[-1:]])
    return heun(grid)


@dataclass(frozen=True)
class _File:
    """A preconditioned network in a file, and what its fields say."""

    path: Path
    outer: Persistent

    def number(self, name: str) -> float:
        """A field of the preconditioning."""
        value = self.outer.state.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.path}: {self.outer.class_name}.{name} is {value!r}, expected a number")
        return float(value)

    def inner(self, name: str) -> Persistent:
        """The network itself."""
        found = self.outer.state["_modules"].get(name)
        if not isinstance(found, Persistent):
            raise InputError(f"{self.path}: its {self.outer.class_name} has no network {name!r}")
        return found

    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        side = int(self.number("img_resolution"))
        return int(self.number("img_channels")), side, side

    def buffer(self, name: str) -> Tensor:
        """A tensor of the preconditioning."""
        value = self.outer.state["_buffers"].get(name)
        if not isinstance(value, Tensor):
            raise InputError(f"{self.path}: its {self.outer.class_name} has no tensor {name!r}")
        return value


def _vp(file: _File) -> Precond:
    if file.number("M") != 1000:
        raise InputError(f"{file.path}: a VPPrecond with M = {file.number('M'):g} is not known, expected 1000")
    return Precond(
        _network(file),
        file.shape(),
        path=VPPath(file.number("beta_d"), file.number("beta_min")),
        predicts="noise",
        time="vp*999 in float32",
        sigma_min=file.number("sigma_min"),
        sigma_max=file.number("sigma_max"),
    )


def _ve(file: _File) -> Precond:
    # It predicts the noise with its sign turned, (D - x) / sigma.
    return Precond(
        _network(file),
        file.shape(),
        path=EDM,
        predicts="noise",
        time="log(sigma/2)",
        scale_out=-1.0,
        sigma_min=file.number("sigma_min"),
        sigma_max=file.number("sigma_max"),
    )


def _iddpm(file: _File) -> Precond:
    # From the highest level down to 0, which is no level of the network.
    levels = file.buffer("u").double()[:-1].flip(0)
    if levels.ndim != 1 or len(levels) < 2 or not (levels.diff() > 0).all() or not levels[0] > 0:
        raise InputError(f"{file.path}: the levels u of its iDDPMPrecond must fall to 0")
    squares = torch.cat([levels.new_zeros(1), levels**2])
    betas = squares.diff() / (1 + squares[1:])
    return Precond(
        _network(file),
        file.shape(),
        path=DDPMPath(tuple(betas.tolist())),
        predicts="noise",
        time="nearest",
        sigma_min=float(levels[0]),
        sigma_max=float(levels[-1]),
    )


def _edm(file: _File) -> Precond:
    # The file's own range is usually 0 to infinity; EDM trained and sampled within 0.002 to 80.
    low, high = max(SIGMA_MIN, file.number("sigma_min")), min(SIGMA_MAX, file.number("sigma_max"))
    options = {"sigma_data": file.number("sigma_data"), "sigma_min": low, "sigma_max": high}
    return edm(_network(file), file.shape(), **options)


def _edm2(file: _File) -> Precond:
    head = file.outer.state["_modules"].get("logvar_linear")
    weights = head.state["_parameters"] if isinstance(head, Persistent) else {}
    channels = weights["weight"].shape[1] if isinstance(weights.get("weight"), Tensor) else 0
    given = _given(file, file.inner("unet"), _EDM2, {"img_resolution", "img_channels"})
    net = EDM2UNet(EDM2Config(shape=file.shape(), logvar_channels=channels, **given))
    found = _tensors(file.outer)
    _fill(net, {_renamed(k, _EDM2_NAMES): v for k, v in found}, file.path)
    return edm(net, file.shape(), sigma_data=file.number("sigma_data"), sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)


_MAKERS: dict[str, Callable[[_File], Precond]] = {
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
    "EDMPrecond": _edm,
    "Precond": _edm2,
}

# The options of the files' networks and what they are called here.
_ADM = {
    "label_dim": "classes",
    "augment_dim": "augment",
    "model_channels": "channels",
    "channel_mult": "multipliers",
    "channel_mult_emb": "embedding_width",
    "num_blocks": "blocks",
    "attn_resolutions": "attention",
    "dropout": "dropout",
    "label_dropout": "label_dropout",
}
_SONG = _ADM | {
    "embedding_type": "embedding",
    "channel_mult_noise": "noise_width",
    "encoder_type": "encoder",
    "decoder_type": "decoder",
    "resample_filter": "filter",
}
_EDM2 = {
    "label_dim": "classes",
    "model_channels": "channels",
    "channel_mult": "multipliers",
    "channel_mult_noise": "noise_width",
    "channel_mult_emb": "embedding_width",
    "num_blocks": "blocks",
    "attn_resolutions": "attention",
    "label_balance": "label_balance",
    "concat_balance": "concat_balance",
    "resample_filter": "filter",
    "channels_per_head": "head_channels",
    "dropout": "dropout",
    "res_balance": "residual_balance",
    "attn_balance": "attention_balance",
    "clip_act": "clip",
}
# Names of tensors, part by part.
_PLACES = [(r"^enc\.(\d+)x\1_", r"encoder.\1_"), (r"^dec\.(\d+)x\1_", r"decoder.\1_")]
_EDM_NAMES = [
    *_PLACES,
    (r"^map_noise\.freqs$", "noise.frequencies"),
    (r"^map_layer0\.", "layer1."),
    (r"^map_layer1\.", "layer2."),
    (r"^map_(label|augment)\.", r"\1."),
    (r"^out_norm\.", "norm."),
    (r"^out_conv\.", "leave."),
    (r"\.norm2\.", ".attention.norm."),
    (r"\.(norm|conv)1\.", r".\g<1>2."),
    (r"\.(norm|conv)0\.", r".\g<1>1."),
    (r"\.affine\.", ".modulate."),
    (r"\.qkv\.", ".attention.qkv."),
    (r"\.proj\.", ".attention.leave."),
]
_EDM2_NAMES = [
    (r"^unet\.", ""),
    *_PLACES,
    (r"^emb_fourier\.freqs$", "noise.frequencies"),
    (r"^emb_fourier\.phases$", "noise.phases"),
    (r"^emb_noise\.", "layer."),
    (r"^emb_label\.", "label."),
    (r"^out_conv\.", "leave."),
    (r"^logvar_fourier\.freqs$", "logvar_noise.frequencies"),
    (r"^logvar_fourier\.phases$", "logvar_noise.phases"),
    (r"^logvar_linear\.", "logvar."),
    (r"\.emb_gain$", ".gain"),
    (r"\.emb_linear\.", ".modulate."),
    (r"\.conv_res1\.", ".conv2."),
    (r"\.conv_res0\.", ".conv1."),
    (r"\.conv_skip\.", ".skip."),
    (r"\.attn_qkv\.", ".qkv."),
    (r"\.attn_proj\.", ".leave."),
]


def _network(file: _File) -> nn.Module:
    """The network of an EDM file with its weights."""
    record = file.inner("model")
    shape = file.shape()
    apart = {"img_resolution", "in_channels", "out_channels"}
    # Of 2 C outputs the second half is a variance, which nothing here uses.
    twice = file.outer.class_name == "iDDPMPrecond"
    net: nn.Module
    if record.class_name == "SongUNet":
        options = _given(file, record, _SONG, apart)
        net = SongUNet(SongUNetConfig(shape=shape, learned_variance=twice, **options))
        filter = net.config.filter
    elif record.class_name == "DhariwalUNet":
        net = ADM(ADMConfig(shape=shape, learned_variance=twice, **_given(file, record, _ADM, apart)))
        filter = (1, 1)
    else:
        raise unknown(f"network in {file.path}", record.class_name, ("SongUNet", "DhariwalUNet"))
    kernel = torch.outer(*[torch.tensor(filter, dtype=torch.float32)] * 2) / sum(filter) ** 2
    tensors = {}
    for name, tensor in _tensors(record):
        if name.endswith(".resample_filter"):
            if tensor.shape[2:] != kernel.shape or (tensor.float() - kernel).abs().max() > 1e-6:
                raise InputError(f"{file.path}: {name} is another filter than {filter}")
            continue
        tensors[_renamed(name, _EDM_NAMES)] = tensor
    _fill(net, tensors, file.path)
    return net


def _given(file: _File, record: Persistent, known: Mapping[str, str], apart: set[str]) -> dict[str, Any]:
    """The network's options under our names.

    Raises:
        InputError: options that are not known, or that were not recorded.
    """
    if record.init_args or not record.init_kwargs:
        raise InputError(f"{file.path}: its {record.class_name} does not say which options it was made with")
    extra = sorted(record.init_kwargs.keys() - known.keys() - apart)
    if extra:
        raise unknown(f"option of the {record.class_name} in {file.path}", extra[0], known)
    return {known[k]: v for k, v in record.init_kwargs.items() if k in known}


def _tensors(record: Persistent, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All weights and lasting buffers with their dotted names."""
    skipped = record.state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, tensor in record.state.get(kind, {}).items():
            if isinstance(tensor, Tensor) and name not in skipped:
                yield prefix + name, tensor
    for name, module in record.state.get("_modules", {}).items():
        if isinstance(module, Persistent):
            yield from _tensors(module, f"{prefix}{name}.")


def _renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, own in table:
        name = re.sub(pattern, own, name)
    return name


def _fill(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Strictly, in float32; a weight that is not finite would spoil every picture."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: its weight {name} is not finite: the file is damaged")
    load_weights(net, {k: v.float() for k, v in tensors.items()}, path)
