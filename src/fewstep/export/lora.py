"""LoRA files: what stock diffusers and peft read, and back into a generator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.core.denoiser import Precond
from fewstep.core.generator import Generator
from fewstep.core.state import load_tensors, read_json, save_tensors, write_bytes, write_text
from fewstep.errors import InputError
from fewstep.models.lora import ADAPTER, Adapted, LoRA, adapter, merge

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
KOHYA_FILE = "kohya_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
# The loader mixins of diffusers by network; what they write is what pipelines of these networks read.
MIXINS = {
    "UNet2DConditionModel": ("StableDiffusionLoraLoaderMixin", "unet"),
    "SD3Transformer2DModel": ("SD3LoraLoaderMixin", "transformer"),
    "FluxTransformer2DModel": ("FluxLoraLoaderMixin", "transformer"),
    "SanaTransformer2DModel": ("SanaLoraLoaderMixin", "transformer"),
}
OTHERS = {"UNet2DModel": "unet"}


def save_lora(view: Adapted | Generator, folder: str | Path, *, kohya: bool = False) -> Path:
    """Writes ``pytorch_lora_weights.safetensors``, rank and alpha in its header; returns the folder.

    ``DiffusionPipeline.load_lora_weights(folder)`` reads it for the networks that diffusers loads LoRA into. For all
    others ``adapter_model.safetensors`` and ``adapter_config.json`` are written beside it, which
    ``peft.PeftModel.from_pretrained(network, folder)`` reads. ``kohya`` adds a file in the names of kohya's scripts,
    which ComfyUI and others read, for U-Nets of Stable Diffusion.

    Raises:
        InputError: no LoRA to save, diffusers missing, or a place that cannot be written.
    """
    found = view.denoiser if isinstance(view, Generator) else view
    if not isinstance(found, Adapted):
        raise InputError(
            f"a {type(found).__name__} holds no LoRA: train with lora=LoRA(...); a merged student keeps none apart"
        )
    folder, inner = Path(folder), _root(found.net)[0]
    stock, tensors, settings = found.net.get_submodule(inner), _layers(found, inner), _settings(found, inner)
    kind = type(stock).__name__
    if kohya and kind != "UNet2DConditionModel":
        raise InputError(f"names of kohya's scripts are for UNet2DConditionModel, not for a {kind}: leave kohya out")
    if kind in MIXINS and _is_stock(stock):
        _by_diffusers(*MIXINS[kind], folder, tensors, settings)
    else:
        part = _part(stock)
        named = {f"{part}.{name}": t for name, t in tensors.items()}
        header = {f"{part}.{name}": value for name, value in settings.items()}
        save_tensors(folder / FILE, named, {"format": "pt", HEADER: json.dumps(header, sort_keys=True)})
        save_tensors(folder / PEFT_FILE, {f"base_model.model.{n}": t for n, t in tensors.items()}, {"format": "pt"})
        write_text(folder / PEFT_CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if kohya:
        save_tensors(folder / KOHYA_FILE, to_kohya(tensors, found.lora.scale * found.lora.rank), {"format": "pt"})
    return folder


def to_kohya(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """LoRA tensors of a Stable Diffusion U-Net, by peft's names, in the names of kohya's scripts."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, side = name.removesuffix(".weight").rpartition(".")
        flat = "lora_unet_" + module.replace(".", "_")
        out[f"{flat}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        out[f"{flat}.alpha"] = torch.tensor(float(alpha))
    return out


def apply_lora(generator: Generator, source: str | Path, scale: float = 1.0) -> Generator:
    """The generator with a LoRA merged into its weights, ``scale`` times; the one given is left as it is.

    ``source`` is a file or folder that :func:`save_lora` wrote, or one of the same layout. The sampler stays: a
    student's LoRA on a sibling of its teacher needs the student's sampler too (``with_sampler``).

    Raises:
        InputError: nothing is there, it is damaged, or it belongs to another network: names and shapes that differ are
            listed.
    """
    if not isinstance(generator.denoiser, Precond):
        raise InputError(f"LoRA is merged into a plain denoiser, not into a {type(generator.denoiser).__name__}")
    tensors, settings = _read(Path(source))
    flags = [(p, p.requires_grad) for p in generator.denoiser.parameters()]
    view = _fill(generator.denoiser, tensors, settings, Path(source))
    for p, flag in flags:
        # Sharing froze them, and they are the caller's.
        p.requires_grad_(flag)
    for layer in view.layers().values():
        layer.scaling[ADAPTER] *= scale
    entry = {"source": str(source), "scale": scale}
    card = {**generator.card, "applied_lora": [*generator.card.get("applied_lora", []), entry]}
    return replace(generator, denoiser=merge(view), card=card)


def strip_lora(generator: Generator, source: str | Path, scale: float = 1.0) -> Generator:
    """The inverse of :func:`apply_lora` with the same arguments, up to the rounding of the weights."""
    made = apply_lora(generator, source, -scale)
    left = list(generator.card.get("applied_lora", []))
    entry = {"source": str(source), "scale": scale}
    left = [e for i, e in enumerate(left) if e != entry or entry in left[:i]]
    made.card = {k: v for k, v in generator.card.items() if k != "applied_lora"} | (
        {"applied_lora": left} if left else {}
    )
    return made


def _is_stock(module: nn.Module) -> bool:
    return any(c.__module__.startswith("diffusers.") for c in type(module).__mro__)


def _root(net: nn.Module) -> tuple[str, nn.Module]:
    """The network that others know: one of diffusers within the adapter, or the network itself."""
    return next(((name, m) for name, m in net.named_modules() if _is_stock(m)), ("", net))


def _part(stock: nn.Module) -> str:
    """What a pipeline calls this network."""
    if not _is_stock(stock):
        return "denoiser"
    return OTHERS.get(type(stock).__name__, "transformer")


def _layers(view: Adapted, inner: str) -> dict[str, Tensor]:
    """LoRA tensors by peft's names within the inner network."""
    start = f"{inner}." if inner else ""
    outside = [name for name in view.targets if not name.startswith(start)]
    if outside:
        raise InputError(f"LoRA on {outside[0]} lies outside of the network that others know: change the targets")
    return {
        name.removeprefix("net.").removeprefix(start).replace(f".{ADAPTER}.", "."): t.detach()
        for name, t in view.state_dict().items()
    }


def _settings(view: Adapted, inner: str) -> dict[str, Any]:
    """The LoraConfig of peft, with every layer named."""
    from peft import LoraConfig

    start = len(inner) + 1 if inner else 0
    rank = view.lora.rank
    config = LoraConfig(
        r=rank,
        lora_alpha=view.lora.scale * rank,  # type: ignore[arg-type]
        target_modules=[name[start:] for name in view.targets],
        lora_dropout=view.lora.dropout,
    ).to_dict()
    made = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return cast(dict[str, Any], json.loads(json.dumps(made, default=str)))


def _by_diffusers(mixin: str, part: str, folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    try:
        from diffusers import loaders
    except ImportError:
        raise InputError("diffusers is not installed: pip install 'fewstep[hf]'") from None
    ready = {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    # Written aside, because diffusers writes in place and a kill would leave half a file under the final name.
    with tempfile.TemporaryDirectory() as aside:
        options = {f"{part}_lora_layers": ready, f"{part}_lora_adapter_metadata": settings}
        getattr(loaders.lora_pipeline, mixin).save_lora_weights(aside, **options)
        write_bytes(folder / FILE, (Path(aside) / FILE).read_bytes())


def _read(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LoRA tensors by peft's names within the network, and peft's settings, from a file or folder."""
    if source.is_dir():
        found = [source / name for name in (FILE, PEFT_FILE) if (source / name).is_file()]
        if not found:
            raise InputError(f"{source} holds no LoRA: expected {FILE} or {PEFT_FILE}")
        source = found[0]
    tensors = load_tensors(source)
    if source.name == PEFT_FILE:
        return {k.removeprefix("base_model.model."): t for k, t in tensors.items()}, read_json(
            source.with_name(PEFT_CONFIG)
        )
    try:
        with safe_open(source, "pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{source} has a damaged header: {error}") from None
    parts = sorted({name.partition(".")[0] for name in tensors})
    if len(parts) != 1:
        raise InputError(f"{source} must hold the LoRA of one network, got those of {parts}")
    start = f"{parts[0]}."
    return {k.removeprefix(start): t for k, t in tensors.items()}, {k.removeprefix(start): v for k, v in header.items()}


def _fill(denoiser: Precond, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: Path) -> Adapted:
    """An adapter on the denoiser with these values."""
    wrong = [k for k in tensors if not k.endswith((".lora_A.weight", ".lora_B.weight"))]
    if wrong or not tensors:
        raise InputError(f"{source} is no LoRA in peft's names: it holds {_few(sorted(wrong)) or 'nothing'}")
    inner = _root(denoiser.net)[0]
    start = f"{inner}." if inner else ""
    ranks = {len(t) for k, t in tensors.items() if k.endswith(".lora_A.weight")}
    if len(ranks) != 1 or settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise InputError(f"{source} has layers of several ranks or alphas ({sorted(ranks)}): only one of each is read")
    names = sorted({start + k.rpartition(".lora_")[0] for k in tensors})
    here = {name for name, m in denoiser.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    missing = [name.removeprefix(start) for name in names if name not in here]
    if missing:
        raise InputError(f"{source} is for another network: this one lacks {_few(missing)}")
    rank = ranks.pop()
    alpha = float(settings.get("lora_alpha") or rank)
    # peft's other scale, alpha over the root of the rank.
    alpha *= rank**0.5 if settings.get("use_rslora") else 1
    # Whole names only, where a list of names would also match from the right.
    view = adapter(denoiser, LoRA(rank, alpha, "|".join(name.replace(".", r"\.") for name in names)))
    own = _layers(view, inner)
    shapes = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
        for k in sorted(own.keys() & tensors.keys())
        if own[k].shape != tensors[k].shape
    ]
    apart = sorted(own.keys() ^ tensors.keys())
    if shapes or apart:
        raise InputError(f"{source} is for another network: {_few(shapes + apart)}")
    given = {f"net.{start}{k.replace('.weight', f'.{ADAPTER}.weight')}": t for k, t in tensors.items()}
    view.load_state_dict(given)
    return view


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
