"""Teachers in: one front door for everything that people have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.core.generator import CONFIG, PIPELINE_INDEX, Generator, local
from fewstep.core.state import read_json
from fewstep.errors import InputError, unknown

# Known to files from here on; nothing of diffusers is imported with it.
from fewstep.sources import diffusers_pipeline as diffusers_pipeline
from fewstep.sources import edm_latents as edm_latents
from fewstep.sources.diffusers_files import is_hub_id

CHECKPOINTS = (".pkl", ".pt", ".pth", ".safetensors")
Kind = Literal["fewstep", "hub", "diffusers", "edm", "guided", "consistency", "k-diffusion"]


def load(
    source: str | Path, *, kind: str | None = None, device: str | torch.device = "cpu", **options: Any
) -> Generator:
    """A generator from whatever holds one; nothing in a file is executed.

    * a fewstep folder (``kind="fewstep"``);
    * a diffusers folder ("diffusers": :func:`fewstep.sources.diffusers.load_diffusers`);
    * a Hub id, owner/name, of either ("hub");
    * a pickle of NVIDIA's EDM or EDM2 ("edm", ``.pkl``: :func:`fewstep.sources.edm.load_edm`);
    * a checkpoint of OpenAI's guided-diffusion or consistency-models ("guided", "consistency", ``.pt``:
      :mod:`fewstep.sources.openai`);
    * a k-diffusion checkpoint ("k-diffusion", ``.safetensors``: :mod:`fewstep.sources.kdiffusion`).

    ``kind`` is recognised from the source where it is not given. ``options`` are those of the kind, such as ``dtype``,
    ``steps``, ``prompts``, ``variant`` or ``preset``.

    Raises:
        InputError: nothing is there, it holds no generator, or an option does not belong to its kind.
    """
    place = local(source)
    # A Hub id is no path, and only what begins with the home folder reads otherwise than it was written.
    source = place if str(source).startswith("~") else source
    found = kind_of(source) if kind is None else kind
    if not isinstance(found, str) or found not in OPENERS:
        raise unknown("kind of source", str(found), OPENERS)
    if found == "hub" and place.exists():
        raise InputError(f"{source} is a file or folder here, no Hub id: leave out kind='hub'")
    return _open(found, source, device=device, **options)


def options_of(kind: str) -> tuple[str, ...]:
    """The names of the options that :func:`load` passes on for a kind of source, sorted.

    Raises:
        InputError: an unknown kind, or the library that opens it is not installed.
    """
    if kind not in OPENERS:
        raise unknown("kind of source", kind, OPENERS)
    takes = inspect.signature(OPENERS[kind]()).parameters.values()
    own = {p.name for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if kind == "hub":
        # Which of the two a repository holds is known once it is read.
        own |= {*options_of("fewstep"), *options_of("diffusers")}
    return tuple(sorted(own - {"source", "path", "folder", "device"}))


def _open(kind: str, source: str | Path, **options: Any) -> Generator:
    """Runs a kind's opener with options that it has."""
    known = options_of(kind)
    wrong = sorted(options.keys() - {*known, "device"})
    if wrong:
        raise InputError(
            f"{source} is opened as {kind!r}, which cannot take {', '.join(wrong)}: it takes {', '.join(known)}"
        )
    made: Generator = OPENERS[kind]()(source, **options)
    return made


def kind_of(source: str | Path) -> Kind:
    """Which kind a source is, from its name and files.

    Raises:
        InputError: nothing is there, or nothing that is known.
    """
    path = local(source)
    if path.is_dir():
        if (path / CONFIG).is_file() and not (path / PIPELINE_INDEX).is_file():
            return "fewstep"
        if (path / PIPELINE_INDEX).is_file():
            return "diffusers"
        if (path.parent / PIPELINE_INDEX).is_file():
            raise InputError(f"{source} is a part of a diffusers pipeline: pass the pipeline's folder, {path.parent}")
        raise InputError(
            f"{source} is not a fewstep generator (it has no {CONFIG}) nor a diffusers pipeline (no model_index.json): "
            f"it holds {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}"
        )
    if path.is_file():
        return _kind_of_file(path)
    # A file that is not there is no repository, though its path may read like one.
    if is_hub_id(source) and path.suffix not in CHECKPOINTS:
        return "hub"
    raise InputError(
        f"{source} does not exist: pass a folder of fewstep or diffusers, a Hub id (owner/name), or a .pkl, .pt or "
        ".safetensors checkpoint"
    )


def _refuse_component(path: Path) -> None:
    """Raises InputError for weights that are a part of a diffusers pipeline: they are no generator alone."""
    whole = next((p for p in (path.parent, path.parent.parent) if (p / PIPELINE_INDEX).is_file()), None)
    if whole is not None:
        raise InputError(f"{path} is a part of a diffusers pipeline: pass the pipeline's folder, {whole}")
    config = path.parent / "config.json"
    if config.is_file() and "_class_name" in read_json(config):
        raise InputError(
            f"{path} is a network of diffusers without its pipeline: pass the folder of a whole pipeline, or "
            f"load({str(path.parent)!r}, kind='diffusers', base=PIPELINE)"
        )


def _kind_of_file(path: Path) -> Kind:
    if path.suffix == ".pkl":
        return "edm"
    if path.suffix in (".pt", ".pth"):
        from fewstep.sources.openai import is_consistency

        return "consistency" if is_consistency(path) else "guided"
    if path.suffix == ".safetensors":
        _refuse_component(path)
        from fewstep.sources.checkpoint import read_checkpoint
        from fewstep.sources.openai import is_consistency

        # OpenAI's names, in the other container.
        if "input_blocks.0.0.weight" in read_checkpoint(path):
            return "consistency" if is_consistency(path) else "guided"
        return "k-diffusion"
    raise InputError(
        f"{path} is not a fewstep generator, nor a checkpoint that is known: expected .pkl, .pt, .pth or .safetensors"
    )


def _hub(source: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any) -> Generator:
    """A repository of the Hub: a fewstep folder or a diffusers pipeline."""
    from fewstep.export.hub import download

    found = download(str(source), revision=revision, token=token, allow=[PIPELINE_INDEX, CONFIG])
    if (found / CONFIG).is_file() and not (found / PIPELINE_INDEX).is_file():
        return _open("fewstep", download(str(source), revision=revision, token=token), **options)
    return _open("diffusers", source, revision=revision, token=token, **options)


def _found(module: str, name: str) -> Callable[[], Callable[..., Generator]]:
    """Imports an opener when it is needed: each has libraries of its own."""
    return lambda: getattr(import_module(f"fewstep.sources.{module}"), name)


OPENERS: dict[str, Callable[[], Callable[..., Generator]]] = {
    "fewstep": lambda: Generator.load,
    "hub": lambda: _hub,
    "diffusers": _found("diffusers", "load_diffusers"),
    "edm": _found("edm", "load_edm"),
    "guided": _found("openai", "load_guided"),
    "consistency": _found("openai", "load_consistency"),
    "k-diffusion": _found("kdiffusion", "load_kdiffusion"),
}
"""What returns the function that opens a kind of source."""

__all__ = ["OPENERS", "kind_of", "load", "options_of"]
