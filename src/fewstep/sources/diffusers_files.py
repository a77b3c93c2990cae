"""The files of a diffusers pipeline: where its folder is, what it holds, and its network's weights, read strictly."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fewstep.core.state import read_json
from fewstep.errors import InputError
from fewstep.models.libraries import library_class, opening
from fewstep.models.libraries import quiet as quiet
from fewstep.sources.exported import OWN

INDEX = "model_index.json"
# Of these nothing is used here, so that a folder without them is whole.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "image_processor")
_SINGLE = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?\.safetensors")
_SHARDED = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.(\w+))?\.json")
_PIECE = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?-\d+-of-\d+(?:\.(\w+))?\.safetensors")


class Component(NamedTuple):
    """An entry of model_index.json."""

    library: str
    class_name: str


def is_hub_id(source: str | Path) -> bool:
    """Whether a source that is no folder here reads like ``owner/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)) is not None


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """The folder of a source: its own, or that of a snapshot of a Hub id in huggingface_hub's cache.

    A snapshot holds what is used only: no pickles, and of each component one variant of the weights.

    Raises:
        InputError: neither a folder nor a Hub id, huggingface_hub is missing, or the id cannot be had from network or
            cache.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise InputError(f"{source} does not exist: pass the folder of a diffusers pipeline or a Hub id (owner/name)")
    try:
        hub: Any = import_module("huggingface_hub")
        constants, errors = import_module("huggingface_hub.constants"), import_module("huggingface_hub.errors")
    except ModuleNotFoundError:
        raise InputError(
            f"huggingface_hub is not installed, which opens {source!r}: pip install 'fewstep[hf]'"
        ) from None
    offline = constants.HF_HUB_OFFLINE if local_files_only is None else local_files_only
    # Its bases hold the error of the HTTP library of that version, which for a failed connection is no OSError.
    failures = (OSError, ValueError, RuntimeError, *errors.HfHubHTTPError.__bases__)
    common = {"revision": revision, "token": token}
    try:
        if offline:
            return Path(hub.snapshot_download(str(source), local_files_only=True, **common))
        try:
            names = hub.HfApi().list_repo_files(str(source), **common)
        except failures:
            # What the cache has is used when nothing can be asked, as everywhere in huggingface_hub.
            return Path(hub.snapshot_download(str(source), local_files_only=True, **common))
        return Path(hub.snapshot_download(str(source), allow_patterns=_wanted(names, variant), **common))
    except failures as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{source!r} is neither a folder here nor a Hub id that can be had: the cache {constants.HF_HUB_CACHE} "
            f"was tried, HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE', 'not set')!r} ({reason}): check the id, "
            "the network and the token, or pass a folder"
        ) from None


def _wanted(names: list[str], variant: str | None) -> list[str]:
    """The files of a repository that are used."""
    kept = [n for n in names if n == INDEX or (n.count("/") == 1 and n.split("/")[0] not in UNUSED)]
    plain = [
        n for n in kept if not n.endswith((".bin", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx", ".xml", ".onnx_data"))
    ]
    wanted = [n for n in plain if _variant_of(n) is False]
    for part in sorted({n.split("/")[0] for n in plain if _variant_of(n) is not False}):
        weights = {n: _variant_of(n) for n in plain if n.startswith(f"{part}/") and _variant_of(n) is not False}
        own = set(weights.values())
        choice = variant if variant in own else (None if None in own else min(str(v) for v in own))
        wanted += [n for n, v in weights.items() if v == choice]
    return wanted


def _variant_of(name: str) -> str | bool | None:
    """The variant of a weight file, None for the plain one, False for what is no weight file."""
    base = name.rsplit("/", 1)[-1]
    for pattern in (_SINGLE, _SHARDED, _PIECE):
        found = pattern.fullmatch(base)
        if found:
            return next((g for g in found.groups() if g), None)
    return False


def read_index(root: Path) -> tuple[str, dict[str, Component], dict[str, Any]]:
    """The pipeline's class, its components, and the rest of model_index.json; each used component's folder is there.

    Raises:
        InputError: no such file, it names no pipeline, a component's folder is missing, or its class is custom code.
    """
    if not (root / INDEX).is_file():
        raise InputError(f"{root} is no diffusers pipeline: it has no {INDEX}")
    body = read_json(root / INDEX)
    kind = body.get("_class_name")
    if not isinstance(kind, str):
        raise InputError(f"{root / INDEX} names no pipeline class of diffusers: _class_name is {kind!r}")
    pairs = {k: v for k, v in body.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_")}
    parts = {k: Component(*v) for k, v in pairs.items() if all(isinstance(w, str) for w in v)}
    for name, part in parts.items():
        if name in UNUSED:
            continue
        # Fewstep's own scheduler is read as numbers, its code is not run.
        own = name == "scheduler" and part.class_name == OWN
        if part.library not in ("diffusers", "transformers") and not own:
            raise InputError(
                f"the component {name!r} of {root} is code of its own, {part.library}.{part.class_name}, which is not "
                "executed: only classes of diffusers and transformers are opened"
            )
        if not (root / name).is_dir():
            raise InputError(
                f"{root} lacks the component {name!r} ({part.class_name}) that its {INDEX} names: copy or download it "
                "again"
            )
    return kind, parts, {k: v for k, v in body.items() if k not in pairs and not k.startswith("_")}


def pick_variant(folder: Path, variant: str | None) -> tuple[str | None, list[str]]:
    """The variant of a network's weights that is read, and remarks where it is not the one that was asked for.

    Without a wish the plain files are read, or the only variant that there is.

    Raises:
        InputError: the variant is not there, there are no safetensors, or a shard is missing.
    """
    names = sorted(p.name for p in folder.iterdir())
    there = {_variant_of(n) for n in names if _SINGLE.fullmatch(n) or _SHARDED.fullmatch(n)}
    if not there:
        has = ", ".join(names[:5]) or "nothing"
        raise InputError(
            f"{folder} has no weights as safetensors (it has {has}): pickles are not opened, so convert them with "
            "save_pretrained(..., safe_serialization=True)"
        )
    known = ", ".join(sorted("none" if v is None else repr(v) for v in there))
    if variant is not None and variant not in there:
        raise InputError(f"{folder} has no variant {variant!r}: its variants are {known}")
    if variant is None and None not in there:
        if len(there) > 1:
            raise InputError(f"{folder} has only the variants {known}: choose one with variant=")
        (only,) = there
        _check_shards(folder, str(only))
        return str(only), [f"{folder.name} has no plain weights: its variant {only!r} was read"]
    _check_shards(folder, variant)
    return variant, []


def _check_shards(folder: Path, variant: str | None) -> None:
    for file in folder.glob("*.safetensors.index*.json"):
        if _variant_of(file.name) != variant:
            continue
        places = read_json(file).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise InputError(f"{file} is no index of shards: its weight_map must be names of tensors to names of files")
        shards = sorted(set(places.values()))
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            raise InputError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}: copy it again"
            )


def component_variant(folder: Path, wished: str | None) -> str | None:
    """The variant of a component beside the network that is read: the one wished for where it is there.

    Raises:
        InputError: see :func:`pick_variant`.
    """
    there = {_variant_of(p.name) for p in folder.iterdir()}
    return pick_variant(folder, wished if wished in there else None)[0]


def load_part(folder: Path, part: Component, *, dtype: torch.dtype, variant: str | None) -> nn.Module:
    """A network, autoencoder or text encoder with its weights, memory-mapped, each tensor accounted for.

    Raises:
        InputError: damaged files, or weights that lack tensors, have others or other shapes: all are named.
    """
    kind, files = library_class(part.library, part.class_name), weight_files(folder, variant)
    # Of transformers only so are the tensors of another shape listed; they are refused below.
    extra = {"low_cpu_mem_usage": True} if part.library == "diffusers" else {"ignore_mismatched_sizes": True}
    try:
        with quiet(), opening(folder, part.class_name):
            model, info = kind.from_pretrained(
                folder,
                torch_dtype=dtype,
                variant=variant,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                **extra,
            )
    except InputError:
        found = read_headers(files)
        if part.library == "diffusers":
            compare(kind, folder, found)
        raise
    lists = {key: [_named(k) for k in info.get(key) or ()] for _, key in _LISTS}
    lists["unexpected_keys"] = [k for k in lists["unexpected_keys"] if not _HARMLESS.search(k)]
    said = [f"{what} {', '.join(sorted(lists[key]))}" for what, key in _LISTS if lists[key]]
    if said:
        raise InputError(f"{folder} holds another architecture than its config.json: {'; '.join(said)}")
    made: nn.Module = model.eval().requires_grad_(False)
    return made


_LISTS = (("missing", "missing_keys"), ("unknown", "unexpected_keys"), ("shapes differ:", "mismatched_keys"))
# A buffer that older versions stored, a tied copy, and the head of the language model that an encoder was cut from.
_HARMLESS = re.compile(r"(?:^|\.)(?:position_ids|embed_tokens\.weight|lm_head\.weight)$")


def _named(key: Any) -> str:
    if isinstance(key, str):
        return key
    name, *shapes = key
    return f"{name} is " + ", expected ".join(str(tuple(s)) for s in shapes)


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors of one variant."""
    return sorted(p for p in folder.glob("*.safetensors") if _variant_of(p.name) == variant)


def read_headers(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, from the headers alone.

    Raises:
        InputError: a file that is cut short or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                found |= {k: tuple(tensors.get_slice(k).get_shape()) for k in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a whole safetensors file ({error}): copy it again") from None
    return found


# The names that attention had in older files, which diffusers still reads.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def compare(kind: Any, folder: Path, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError that lists how tensors differ from those of the network that config.json describes."""
    renamed = re.compile(rf"(attentions\.\d+)\.({'|'.join(_OLD)})\.")
    found = {renamed.sub(lambda m: f"{m[1]}.{_OLD[m[2]]}.", k): v for k, v in found.items()}
    config = read_json(folder / "config.json")
    with torch.device("meta"), quiet(), opening(folder / "config.json", kind.__name__):
        own = {k: tuple(v.shape) for k, v in kind.from_config(config).state_dict().items()}
    missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    shapes = [f"{k} is {found[k]}, expected {own[k]}" for k in sorted(own.keys() & found.keys()) if own[k] != found[k]]
    lists = (("missing", missing), ("unknown", extra), ("shapes differ:", shapes))
    said = [f"{what} {', '.join(names)}" for what, names in lists if names]
    if said:
        raise InputError(f"{folder} holds another architecture than its config.json: {'; '.join(said)}")


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON values, without what diffusers notes about itself."""
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    body: dict[str, Any] = json.loads(json.dumps(values))
    return body
