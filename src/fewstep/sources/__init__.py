"""Teachers in: one front door for everything that people have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.core.generator import CONFIG, Generator
from fewstep.errors import InputError, unknown

# Known to files from here on; nothing of diffusers is imported with it.
from fewstep.sources import diffusers_pipeline as diffusers_pipeline
from fewstep.sources import edm_latents as edm_latents

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
    found = kind or kind_of(source)
    if found not in OPENERS:
        raise unknown("kind of source", str(found), OPENERS)
    try:
        return OPENERS[found](source, device=device, **options)
    except TypeError as error:
        # Only a wrong keyword of ours is the caller's to mend; anything else is a fault and keeps its traceback.
        if "unexpected keyword argument" not in str(error) or not any(f"'{name}'" in str(error) for name in options):
            raise
        raise InputError(f"{source} is opened as {found!r}, which cannot take {sorted(options)}: {error}") from None


def kind_of(source: str | Path) -> Kind:
    """Which kind a source is, from its name and files.

    Raises:
        InputError: nothing is there, or nothing that is known.
    """
    path = Path(source)
    if path.is_dir():
        if (path / CONFIG).is_file() and not (path / "model_index.json").is_file():
            return "fewstep"
        if (path / "model_index.json").is_file():
            return "diffusers"
        raise InputError(
            f"{source} is not a fewstep generator (it has no {CONFIG}) nor a diffusers pipeline (no model_index.json): "
            f"it holds {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}"
        )
    if path.is_file():
        return _kind_of_file(path)
    words = str(source).split("/")
    if len(words) == 2 and all(words) and not path.suffix and not str(source).startswith((".", "~")):
        return "hub"
    raise InputError(
        f"{source} does not exist: pass a folder of fewstep or diffusers, a Hub id (owner/name), or a .pkl, .pt or "
        ".safetensors checkpoint"
    )


def _kind_of_file(path: Path) -> Kind:
    if path.suffix == ".pkl":
        return "edm"
    if path.suffix in (".pt", ".pth"):
        from fewstep.sources.openai import is_consistency

        return "consistency" if is_consistency(path) else "guided"
    if path.suffix == ".safetensors":
        from fewstep.sources.checkpoint import read_checkpoint
        from fewstep.sources.openai import is_consistency

        # OpenAI's names, in the other container.
        if "input_blocks.0.0.weight" in read_checkpoint(path):
            return "consistency" if is_consistency(path) else "guided"
        return "k-diffusion"
    raise InputError(
        f"{path} is not a fewstep generator, nor a checkpoint that is known: expected .pkl, .pt, .pth or .safetensors"
    )


def _fewstep(source: str | Path, **options: Any) -> Generator:
    return Generator.load(source, **options)


def _hub(source: str | Path, *, revision: str | None = None, token: str | None = None, **options: Any) -> Generator:
    """A repository of the Hub: a fewstep folder or a diffusers pipeline."""
    from fewstep.export.hub import download

    found = download(str(source), revision=revision, token=token, allow=["model_index.json", CONFIG])
    if (found / CONFIG).is_file() and not (found / "model_index.json").is_file():
        return Generator.load(download(str(source), revision=revision, token=token), **options)
    return _diffusers(source, revision=revision, token=token, **options)


def _diffusers(source: str | Path, **options: Any) -> Generator:
    from fewstep.sources.diffusers import load_diffusers

    return load_diffusers(source, **options)


def _edm(source: str | Path, **options: Any) -> Generator:
    from fewstep.sources.edm import load_edm

    return load_edm(source, **options)


def _guided(source: str | Path, **options: Any) -> Generator:
    from fewstep.sources.openai import load_guided

    return load_guided(source, **options)


def _consistency(source: str | Path, **options: Any) -> Generator:
    from fewstep.sources.openai import load_consistency

    return load_consistency(source, **options)


def _k_diffusion(source: str | Path, **options: Any) -> Generator:
    from fewstep.sources.kdiffusion import load_kdiffusion

    return load_kdiffusion(source, **options)


OPENERS: dict[str, Callable[..., Generator]] = {
    "fewstep": _fewstep,
    "hub": _hub,
    "diffusers": _diffusers,
    "edm": _edm,
    "guided": _guided,
    "consistency": _consistency,
    "k-diffusion": _k_diffusion,
}

__all__ = ["OPENERS", "kind_of", "load"]
