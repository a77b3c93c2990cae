"""Prompts become conditions as the stock pipeline makes them, through its own ``encode_prompt``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.core.cond import Cond, Nulls
from fewstep.core.noise import Noise
from fewstep.errors import InputError, unknown
from fewstep.models.conditions import check_conditions

if TYPE_CHECKING:
    from fewstep.sources.diffusers_pipeline import DiffusersPipeline

Prompts = Sequence[str] | str | Path
Found = dict[str, Tensor]
MOST_CACHED = 256
"""Prompts whose conditions are kept: an embedding of a large text encoder takes megabytes."""
AT_ONCE = 16
"""Prompts that are encoded in one batch."""


def _stable_diffusion(pipe: Any, prompts: list[str], negative: str | None, rest: dict[str, Any]) -> tuple[Found, Found]:
    against = [negative] * len(prompts) if negative else None
    own, away = pipe.encode_prompt(
        prompts,
        num_images_per_prompt=1,
        do_classifier_free_guidance=negative is not None,
        negative_prompt=against,
        **rest,
    )
    return {"prompt_embeds": own}, {"prompt_embeds": away}


def _sdxl(pipe: Any, prompts: list[str], negative: str | None, rest: dict[str, Any]) -> tuple[Found, Found]:
    # No negative prompt is None: only then are the pipelines that want zeros given them.
    own, away, pooled, pooled_away = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=negative is not None, negative_prompt=negative or None, **rest
    )
    first = {"prompt_embeds": own, "pooled_prompt_embeds": pooled}
    return first, {"prompt_embeds": away, "pooled_prompt_embeds": pooled_away}


def _masked(pipe: Any, prompts: list[str], negative: str | None, rest: dict[str, Any]) -> tuple[Found, Found]:
    own, mask, away, mask_away = pipe.encode_prompt(
        prompts, negative is not None, negative_prompt=negative or "", **rest
    )
    first = {"prompt_embeds": own, "prompt_attention_mask": mask}
    return first, {"prompt_embeds": away, "prompt_attention_mask": mask_away}


def _sd3(pipe: Any, prompts: list[str], negative: str | None, rest: dict[str, Any]) -> tuple[Found, Found]:
    own, away, pooled, pooled_away = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=negative is not None, negative_prompt=negative or None, **rest
    )
    first = {"prompt_embeds": own, "pooled_prompt_embeds": pooled}
    return first, {"prompt_embeds": away, "pooled_prompt_embeds": pooled_away}


def _flux(pipe: Any, prompts: list[str], negative: str | None, rest: dict[str, Any]) -> tuple[Found, Found]:
    def one(texts: list[str]) -> Found:
        embeds, pooled, _ = pipe.encode_prompt(texts, None, **rest)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    return one(prompts), {} if negative is None else one([negative] * len(prompts))


ENCODERS: dict[str, Callable[[Any, list[str], str | None, dict[str, Any]], tuple[Found, Found]]] = {
    "FluxPipeline": _flux,
    "LatentConsistencyModelPipeline": _stable_diffusion,
    "PixArtAlphaPipeline": _masked,
    "PixArtSigmaPipeline": _masked,
    "SanaPipeline": _masked,
    "StableDiffusion3Pipeline": _sd3,
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _sdxl,
}
"""The pipelines whose prompts can be read."""


class Text:
    """Where the conditions of a text pipeline come from: :class:`fewstep.core.pipeline.TextConditions`.

    Text encoders are loaded on first use and stay until ``pipeline.release()``; repeated prompts are encoded once.
    """

    def __init__(self, pipeline: DiffusersPipeline, prompts: Prompts | None = None) -> None:
        """``prompts`` is a list, or a text file with one prompt per line: what :meth:`draw` picks from.

        Raises:
            InputError: no such file, or no prompt in it.
        """
        self.pipeline, self.prompts = pipeline, read_prompts(prompts)
        self._cache: dict[tuple[str, str], Found] = {}

    def draw(self, noise: Noise) -> Found:
        """One of ``prompts`` per source, a function of its seed alone.

        Raises:
            InputError: there are no prompts.
        """
        if not self.prompts:
            raise InputError("a text pipeline needs prompts: pass cond=... or prompts=...")
        picked = noise.integers(0, len(self.prompts), (), "prompt").tolist()
        return {k: v.to(noise.seeds.device) for k, v in self.encode([self.prompts[i] for i in picked]).items()}

    def check(self, cond: Cond) -> None:
        """Raises InputError for a condition that is missing, unknown or of another shape than the network reads."""
        check_conditions(self.pipeline.needs, cond)

    def encode(self, prompts: Sequence[str]) -> Found:
        """The conditions of these prompts, each (B, ...), on the pipeline's device.

        Raises:
            InputError: no prompts, something that is no text, or a pipeline whose prompts cannot be read.
        """
        wrong = next((p for p in prompts if not isinstance(p, str)), None)
        if wrong is not None or isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts are a list of at least one text, got {prompts!r}")
        new = sorted({p for p in prompts if ("prompt", p) not in self._cache})
        fresh: dict[str, Found] = {}
        for i in range(0, len(new), AT_ONCE):
            own, _ = self._ask(new[i : i + AT_ONCE], None)
            fresh |= {p: {k: v[j] for k, v in own.items()} for j, p in enumerate(new[i : i + AT_ONCE])}
        each = [fresh[p] if p in fresh else self._cache["prompt", p] for p in prompts]
        for p, found in fresh.items():
            self._keep(("prompt", p), found)
        device = self.pipeline.device
        cond = {k: torch.stack([found[k].to(device) for found in each]) for k in each[0]}
        told = {k: v.to(device).expand(len(prompts), *v.shape) for k, v in self.pipeline.told().items()}
        return cond | {k: v.clone() for k, v in told.items()}

    def nulls(self, negative: str = "") -> Nulls:
        """What guidance moves away from: of the empty or a negative prompt, as the stock pipeline makes it.

        What the network is told of size and embedded guidance is None: kept as it is.
        """
        key = ("null", negative)
        if key not in self._cache:
            _, away = self._ask([""], negative)
            self._keep(key, {k: v[0] for k, v in away.items()})
        return {**self._cache[key], **dict.fromkeys(self.pipeline.told(), None)}

    def _keep(self, key: tuple[str, str], found: Found) -> None:
        if len(self._cache) >= MOST_CACHED:
            self._cache.pop(next(iter(self._cache)))
        # Copied, because a row of a batch would keep the whole batch alive.
        self._cache[key] = {k: v.clone() for k, v in found.items()}

    @torch.no_grad()
    def _ask(self, prompts: list[str], negative: str | None) -> tuple[Found, Found]:
        name = self.pipeline.class_name
        if name not in ENCODERS:
            raise unknown("pipeline class with prompts", name, ENCODERS)
        pipe = self.pipeline.text()
        takes, given = (
            inspect.signature(pipe.encode_prompt).parameters,
            inspect.signature(type(pipe).__call__).parameters,
        )
        # What the pipeline's own call passes on by default, such as Sana's instruction to its language model.
        rest = {
            k: given[k].default
            for k in ("max_sequence_length", "complex_human_instruction")
            if k in takes and k in given
        }
        return ENCODERS[name](pipe, prompts, negative, {"device": self.pipeline.device, **rest})


def read_prompts(prompts: Prompts | None) -> list[str]:
    """A list of prompts, from a list or from a text file with one per line; empty lines do not count.

    Raises:
        InputError: no such file, or nothing in it.
    """
    if prompts is None:
        return []
    if not isinstance(prompts, str | Path | list | tuple):
        raise InputError(f"prompts must be a list of texts or a text file with one per line, got {prompts!r}")
    if isinstance(prompts, str | Path):
        file = Path(prompts).expanduser()
        if not file.is_file():
            raise InputError(f"prompts={str(prompts)!r} is no text file: pass a file with a prompt per line, or a list")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{file} is no text in UTF-8: pass a file with a prompt per line") from None
        prompts = [line.strip() for line in lines if line.strip()]
    found = list(prompts)
    if not found or not all(isinstance(p, str) for p in found):
        raise InputError(f"prompts must be at least one text, got {found[:3]}")
    return found
