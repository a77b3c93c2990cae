"""The components of a diffusers pipeline, checked when it is opened: nothing large is read for it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewstep.core.state import read_json
from fewstep.errors import InputError
from fewstep.models.libraries import diffusers_class
from fewstep.sources.diffusers_files import Component, compare, component_variant, read_headers, weight_files

# One of these is the vocabulary of a tokenizer.
_VOCABULARY = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
# Text parts that the stock pipelines read prompts without.
_SPARE = {
    "StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3"),
    "StableDiffusionXLPipeline": ("text_encoder", "tokenizer"),
}

Check = tuple[Callable[[Any], bool], str]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(check, value))


_WHOLE: Check = (_whole, "a whole number of at least 1")
_OR_NONE: Check = (lambda v: v is None or _whole(v), "a whole number of at least 1, or null")
_SIDES: Check = (
    lambda v: v is None or _whole(v) or (_list_of(_whole)(v) and len(v) == 2),
    "a whole number of at least 1, or two of them",
)
_WIDTHS: Check = (_list_of(_whole), "a list of whole numbers of at least 1")
_NAMES: Check = (_list_of(lambda v: isinstance(v, str)), "a list of names of blocks")
_ENTRIES: dict[str, Check] = {
    "in_channels": _WHOLE,
    "latent_channels": _WHOLE,
    "patch_size": _WHOLE,
    "out_channels": _OR_NONE,
    "norm_num_groups": _OR_NONE,
    "num_class_embeds": _OR_NONE,
    "num_embeds_ada_norm": _OR_NONE,
    "pos_embed_max_size": _OR_NONE,
    "sample_size": _SIDES,
    "block_out_channels": _WIDTHS,
    "encoder_block_out_channels": _WIDTHS,
    "axes_dims_rope": _WIDTHS,
    "down_block_types": _NAMES,
    "up_block_types": _NAMES,
    "scaling_factor": (lambda v: _number(v) and v > 0, "a number above 0"),
    "shift_factor": (lambda v: v is None or _number(v), "a number, or null"),
    "latents_mean": (lambda v: v is None or _list_of(_number)(v), "a list of numbers, or null"),
    "latents_std": (lambda v: v is None or _list_of(_number)(v), "a list of numbers, or null"),
}


def part_config(root: Path, name: str, part: Component) -> dict[str, Any]:
    """The configuration of a component of diffusers, as its file has it, filled up with its class's defaults.

    Raises:
        InputError: the file is missing, no JSON object, or an entry of it that is used here is of another type.
    """
    file = root / name / "config.json"
    config = _config(file, part)
    takes = inspect.signature(diffusers_class(part.class_name).__init__).parameters
    defaults = {k: p.default for k, p in takes.items() if p.default is not inspect.Parameter.empty}
    filled = {**defaults, **{k: v for k, v in config.items() if not k.startswith("_")}}
    for key, (fits, wanted) in _ENTRIES.items():
        if key in filled and not fits(filled[key]):
            raise InputError(f"{file} has {key}={filled[key]!r}, expected {wanted}: copy or download it again")
    if part.class_name.startswith(("UNet", "AutoencoderKL")) and filled.get("out_channels", 0) is None:
        raise InputError(f"{file} has out_channels=None, expected {_WHOLE[1]}: copy or download it again")
    return filled


def _config(file: Path, part: Component) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} does not exist, which describes the {part.class_name}: copy or download it again")
    return read_json(file)


def read_scheduler(root: Path, parts: Mapping[str, Component]) -> dict[str, Any]:
    """The scheduler's configuration, with its class as model_index.json names it.

    Raises:
        InputError: the pipeline has none, or its file is missing or no JSON object.
    """
    if "scheduler" not in parts:
        raise InputError(f"{root} names no scheduler in its model_index.json")
    file = root / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise InputError(
            f"{file} does not exist, which says how the network is trained: copy or download it again, or save one "
            "there with the scheduler's save_pretrained"
        )
    return {**read_json(file), "_class_name": parts["scheduler"].class_name}


def check_parts(root: Path, class_name: str, parts: Mapping[str, Component], network: str, variant: str | None) -> None:
    """Looks for what decoding and reading prompts will need: classes, configurations, weights by their headers.

    Raises:
        InputError: a class that diffusers does not have, a component that is missing or damaged.
    """
    takes = inspect.signature(diffusers_class(class_name).__init__).parameters
    kind = takes[network].annotation if network in takes else None
    if kind is None or (inspect.isclass(kind) and kind.__name__ != parts[network].class_name):
        wanted = f"a {kind.__name__}" if kind is not None else f"no {network}"
        raise InputError(
            f"{root / 'model_index.json'} contradicts itself: a {class_name} has {wanted}, and it names a "
            f"{parts[network].class_name} as its {network}"
        )
    if "vae" in takes and "vae" not in parts:
        raise InputError(
            f"{class_name} works on latents and {root / 'model_index.json'} names no vae: copy or download it again"
        )
    for name, part in parts.items():
        if name not in takes or name in (network, "scheduler") or not _is_used(name):
            continue
        if name.startswith("tokenizer"):
            _check_tokenizer(root / name, part)
            continue
        _config(root / name / "config.json", part)
        headers = read_headers(weight_files(root / name, component_variant(root / name, variant)))
        if part.library == "diffusers":
            compare(diffusers_class(part.class_name), root / name, headers)


def _is_used(name: str) -> bool:
    return name == "vae" or name.startswith(("text_encoder", "tokenizer"))


def _check_tokenizer(folder: Path, part: Component) -> None:
    file = folder / "tokenizer_config.json"
    config = _config(file, part)
    if not any((folder / name).is_file() for name in _VOCABULARY):
        raise InputError(f"{folder} has no vocabulary, one of {', '.join(_VOCABULARY)}: copy or download it again")
    # Its encoder has no more places than that; without it the length is taken to be endless.
    if part.class_name.startswith("CLIP") and not _whole(config.get("model_max_length")):
        said = config.get("model_max_length")
        raise InputError(f"{file} has model_max_length={said!r}, expected {_WHOLE[1]}: copy or download it again")


def missing_text_parts(class_name: str, parts: Mapping[str, Component]) -> list[str]:
    """The text encoders and tokenizers that a pipeline cannot read prompts without and that it does not name."""
    takes = inspect.signature(diffusers_class(class_name).__init__).parameters
    wanted = [name for name in takes if name.startswith(("text_encoder", "tokenizer"))]
    return [name for name in wanted if name not in parts and name not in _SPARE.get(class_name, ())]


def check_positions(class_name: str, config: Mapping[str, Any], shape: tuple[int, int, int], place: Path) -> None:
    """Raises InputError for a size with more patches along a side than an SD3 network has positions for."""
    most, patch = config.get("pos_embed_max_size"), int(config.get("patch_size", 1))
    if class_name != "SD3Transformer2DModel" or most is None:
        return
    if max(shape[1:]) // patch > most:
        raise InputError(
            f"{place} has positions for {most} patches along a side, and this size needs {max(shape[1:]) // patch}: "
            "pass a smaller size="
        )
