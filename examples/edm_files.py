"""Writes tiny networks in the wire format of EDM's and EDM2's pickles, their weights from a formula."""

from __future__ import annotations

import math
import pickle
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Spec = list[tuple[str, tuple[int, ...]]]
Block = tuple[str, int, int, bool]

FILTER = [1, 3, 3, 1]
SONG = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 2}
NCSN = {**SONG, "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
OPTIONS: dict[str, dict[str, Any]] = {
    "ddpmpp": SONG,
    "ncsnpp": {**NCSN, "resample_filter": FILTER},
    "skip": {**SONG, "encoder_type": "skip", "decoder_type": "skip", "channel_mult_emb": 2},
    "adm": {**SONG, "model_channels": 32},
    "edm2": {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
}
OPTIONS["edm2 options"] = {
    **OPTIONS["edm2"],
    "resample_filter": FILTER,
    "channel_mult_emb": 3,
    "label_balance": 0.4,
    "concat_balance": 0.6,
    "res_balance": 0.2,
    "attn_balance": 0.4,
    "clip_act": 1.0,
    "channels_per_head": 16,
}
BETAS = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}
FIELDS: dict[str, dict[str, Any]] = {
    "VPPrecond": {**BETAS, "sigma_min": 1e-3, "sigma_max": 152.1},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000, "sigma_min": 0.0064, "sigma_max": 20291.0},
    "EDMPrecond": {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5},
    "Precond": {"sigma_data": 0.5},
}


def blocks(first: int, second: int) -> tuple[list[Block], list[Block]]:
    """Encoder and decoder of two resolutions: name, channels in and out, attention."""
    encoder = [
        ("8x8_block0", first, first, False),
        ("4x4_down", first, first, False),
        ("4x4_block0", first, second, True),
    ]
    decoder = [
        ("4x4_in0", second, second, True),
        ("4x4_in1", second, second, False),
        ("4x4_block0", 2 * second, second, False),
        ("4x4_block1", first + second, second, True),
        ("8x8_up", second, second, False),
        ("8x8_block0", first + second, first, False),
        ("8x8_block1", 2 * first, first, False),
    ]
    return encoder, decoder


def layer(name: str, *shape: int) -> Spec:
    return [(f"{name}.weight", shape), (f"{name}.bias", (shape[0],))]


def edm_block(name: str, enter: int, leave: int, attends: bool, told: int, song: bool, taps: int) -> Spec:
    found = [*layer(f"{name}.norm0", enter), *layer(f"{name}.conv0", leave, enter, 3, 3)]
    found += [*layer(f"{name}.affine", leave * (1 if song else 2), told), *layer(f"{name}.norm1", leave)]
    found += layer(f"{name}.conv1", leave, leave, 3, 3)
    scaled = name.endswith(("up", "down"))
    if enter != leave or (song and scaled):
        found += layer(f"{name}.skip", leave, enter, 1, 1)
    if scaled:
        found += [(f"{name}.{part}.resample_filter", (1, 1, taps, taps)) for part in ("conv0", "skip")]
    if attends:
        found += [*layer(f"{name}.norm2", leave), *layer(f"{name}.qkv", 3 * leave, leave, 1, 1)]
        found += layer(f"{name}.proj", leave, leave, 1, 1)
    return found


def edm_tensors(kind: str, colours: int) -> Spec:
    """Names and shapes of the tensors of a network with 3 classes and 2 augmentations for 3x8x8 pictures."""
    options, song = OPTIONS[kind], kind != "adm"
    first = options["model_channels"]
    told, noise = first * options.get("channel_mult_emb", 4), first * options.get("channel_mult_noise", 1)
    taps = len(options.get("resample_filter", [1, 1]))
    found = [*layer("map_layer0", told, noise), *layer("map_layer1", told, told), ("map_augment.weight", (noise, 2))]
    found += [("map_label.weight", (noise if song else told, 3))] + ([("map_label.bias", (noise,))] if song else [])
    found += [("map_noise.freqs", (noise // 2,))] if kind == "ncsnpp" else []
    encoder, decoder = blocks(first, 2 * first)
    found += layer("enc.8x8_conv", first, 3, 3, 3)
    for side, members in (("enc", encoder), ("dec", decoder)):
        for name, enter, leave, attends in members:
            # ADM also attends in all decoder blocks at the listed heights.
            attends = attends or (not song and side == "dec" and name == "4x4_block0")
            found += edm_block(f"{side}.{name}", enter, leave, attends, told, song, taps)
    if kind == "ncsnpp":
        found += layer("enc.4x4_aux_residual", first, 3, 3, 3)
        found += [("enc.4x4_aux_residual.resample_filter", (1, 1, taps, taps))]
    if kind == "skip":
        found += [*layer("enc.4x4_aux_skip", first, 3, 1, 1), ("enc.4x4_aux_down.resample_filter", (1, 1, taps, taps))]
        found += [*layer("dec.4x4_aux_norm", 2 * first), *layer("dec.4x4_aux_conv", colours, 2 * first, 3, 3)]
        found += [("dec.8x8_aux_up.resample_filter", (1, 1, taps, taps))]
    if song:
        return found + layer("dec.8x8_aux_norm", first) + layer("dec.8x8_aux_conv", colours, first, 3, 3)
    return found + layer("out_norm", first) + layer("out_conv", colours, first, 3, 3)


def edm2_tensors(kind: str) -> Spec:
    """Those of an EDM2 network with 3 classes for 3x8x8 pictures, and of its head for the loss."""
    told = 32 * OPTIONS[kind].get("channel_mult_emb", 2)
    found: Spec = [("emb_fourier.freqs", (32,)), ("emb_fourier.phases", (32,)), ("emb_noise.weight", (told, 32))]
    found += [("emb_label.weight", (told, 3)), ("enc.8x8_conv.weight", (32, 4, 3, 3)), ("out_gain", ())]
    for side, members in zip(("enc", "dec"), blocks(32, 64), strict=True):
        for name, enter, leave, attends in members:
            at = f"{side}.{name}"
            found += [(f"{at}.emb_gain", ()), (f"{at}.conv_res1.weight", (leave, leave, 3, 3))]
            found += [(f"{at}.conv_res0.weight", (leave, leave if side == "enc" else enter, 3, 3))]
            found += [(f"{at}.emb_linear.weight", (leave, told))]
            found += [(f"{at}.conv_skip.weight", (leave, enter, 1, 1))] if enter != leave else []
            if attends or at == "dec.4x4_block0":
                found += [(f"{at}.attn_qkv.weight", (3 * leave, leave, 1, 1))]
                found += [(f"{at}.attn_proj.weight", (leave, leave, 1, 1))]
    found = [(f"unet.{name}", shape) for name, shape in [*found, ("out_conv.weight", (3, 32, 3, 3))]]
    head: Spec = [("logvar_fourier.freqs", (8,)), ("logvar_fourier.phases", (8,)), ("logvar_linear.weight", (1, 8))]
    return found + head


def weights(spec: Spec, taps: list[int]) -> dict[str, Tensor]:
    """From a formula, so that they need no file."""
    kernel = torch.outer(*[torch.tensor(taps, dtype=torch.float32)] * 2) / sum(taps) ** 2
    made, i = {}, 0
    for name, shape in sorted(spec):
        if name.endswith("resample_filter"):
            made[name] = kernel[None, None]
            continue
        n = torch.arange(math.prod(shape), dtype=torch.float64)
        scale = 1.0 if len(shape) < 2 else math.sqrt(2 / math.prod(shape[1:]))
        made[name], i = (torch.sin(0.37 * n * n + i) * scale).reshape(shape).float(), i + 1
    return made


class Stands:
    """Stands for a persistent object: pickled as a call, with a source that must never run."""

    source = ""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({**meta, "state": self.state},)


def tree(class_name: str, tensors: dict[str, Tensor], **fields: Any) -> Stands:
    """A module and its sub-modules; names that begin with map_noise.freqs and the like are buffers."""
    state: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}, "_non_persistent_buffers_set": set()}
    inside: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            inside.setdefault(first, {})[rest] = tensor
        elif first in ("freqs", "phases", "resample_filter", "u"):
            state["_buffers"][first] = tensor
        else:
            state["_parameters"][first] = nn.Parameter(tensor)
    for name, own in inside.items():
        made: Any = tree("Layer", own)
        if name in ("enc", "dec"):
            made, state_of = nn.ModuleDict(), made.state
            made._modules.update(state_of["_modules"])
        state["_modules"][name] = made
    return Stands(class_name, {**state, "training": False, **fields})


@cache
def levels() -> Tensor:
    """The levels of iDDPM, highest first, then 0 (arXiv 2206.00364, table 1)."""
    u = torch.zeros(1001)

    def kept(j: int) -> Tensor:
        return (0.5 * math.pi * torch.tensor(j) / 1000 / 1.008).sin() ** 2

    for j in range(1000, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (kept(j - 1) / kept(j)).clip(min=0.001) - 1).sqrt()
    return u


def network_file(precond: str, kind: str) -> Stands:
    size = {"img_resolution": 8, "img_channels": 3, "label_dim": 3}
    options = OPTIONS[kind]
    taps = options.get("resample_filter", [1, 1])
    if precond == "Precond":
        outer = tree(precond, weights(edm2_tensors(kind), taps), **size, **FIELDS[precond], use_fp16=True)
        net = outer.state["_modules"]["unet"]
        net.class_name = "UNet"
        net.state |= {"_init_args": (), "_init_kwargs": {**size, **options}}
        return outer
    colours = 6 if precond == "iDDPMPrecond" else 3
    found = {f"model.{k}": v for k, v in weights(edm_tensors(kind, colours), taps).items()}
    outer = tree(precond, found, **size, **FIELDS[precond], use_fp16=True)
    if precond == "iDDPMPrecond":
        outer.state["_buffers"]["u"] = levels()
    net = outer.state["_modules"]["model"]
    net.class_name = "DhariwalUNet" if kind == "adm" else "SongUNet"
    given = {"img_resolution": 8, "in_channels": 3, "out_channels": colours, "label_dim": 3, **options}
    net.state |= {"_init_args": (), "_init_kwargs": given}
    return outer


def dump(path: Path, content: Any) -> Path:
    """Writes with a stand-in for the library of the files, which is gone when they are read."""
    library = types.ModuleType("torch_utils.persistence")

    def rebuild(meta: Any) -> None:
        raise AssertionError("a file's own code ran")

    rebuild.__module__, rebuild.__qualname__ = library.__name__, "_reconstruct_persistent_obj"
    library._reconstruct_persistent_obj = rebuild  # type: ignore[attr-defined]
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), library.__name__: library}
    Stands.source = f"open({str(path.with_suffix('.ran'))!r}, 'w').write('ran')"
    try:
        path.write_bytes(pickle.dumps(content))
    finally:
        del sys.modules["torch_utils"], sys.modules[library.__name__]
    return path


def tiny_edm(path: Path, precond: str = "EDMPrecond", kind: str = "ddpmpp") -> Path:
    """A pickle of a random network for 3x8x8 pictures of 3 classes, laid out as NVIDIA's published ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return dump(path, {"ema": network_file(precond, kind), "loss_fn": Stands("EDMLoss", {"P_mean": -1.2})})
