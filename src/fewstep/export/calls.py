"""How each pipeline class of diffusers is called: the arguments of a check and the lines of a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.generator import Generator
from fewstep.errors import InputError, unknown

PROMPTS = ("a photograph of a red fox in the snow", "a watercolour of a harbour at dawn")


@dataclass(frozen=True)
class Call:
    """One call of a pipeline and the same conditions for fewstep.

    Attributes:
        arguments: JSON-able keyword arguments of the pipeline, without generator and output type.
        cond: the conditions that fewstep's denoiser takes for the same pictures.
        count: how many pictures.
        show: keyword arguments that a model card shows; those of ``arguments`` that a user would write.
    """

    arguments: dict[str, Any]
    cond: dict[str, Tensor]
    count: int
    show: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What an export says about how it is meant to be used.

    Attributes:
        steps: ``num_inference_steps``.
        guidance: scale of classifier-free guidance; 1 is none.
        negative: the prompt that guidance moves away from.
        embedded: the guidance that the network is told, for distilled guidance; None where it is told none.
    """

    steps: int
    guidance: float = 1.0
    negative: str = ""
    embedded: float | None = None


TEXT = frozenset(
    {
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "SanaPipeline",
        "LatentConsistencyModelPipeline",
    }
)
PLAIN = frozenset({"DDPMPipeline"})
CLASSES = frozenset({"DiTPipeline", "FewstepPipeline"})


def call_for(pipeline: str, generator: Generator, plan: Plan, prompts: Sequence[str] = PROMPTS) -> Call:
    """The call of a pipeline class that makes two pictures of ``generator``.

    Raises:
        InputError: a class that nobody has taught the exporter to call.
    """
    if pipeline in TEXT:
        return _text(pipeline, generator, plan, prompts)
    if pipeline in PLAIN:
        arguments = {"batch_size": 2, "num_inference_steps": plan.steps}
        return Call(arguments, {}, 2, {"num_inference_steps": plan.steps})
    if pipeline in CLASSES:
        return _classes(pipeline, generator, plan)
    raise unknown("pipeline class to export to", pipeline, TEXT | PLAIN | CLASSES)


def _text(pipeline: str, generator: Generator, plan: Plan, prompts: Sequence[str]) -> Call:
    if not prompts:
        raise InputError("a text pipeline is checked with prompts: pass at least one")
    height, width = pixels(generator)
    scale = plan.guidance if plan.embedded is None else plan.embedded
    shown: dict[str, Any] = {
        "num_inference_steps": plan.steps,
        "guidance_scale": scale,
        "height": height,
        "width": width,
    }
    if plan.negative:
        shown["negative_prompt"] = plan.negative
    arguments = {**shown, "prompt": list(prompts)}
    if plan.negative:
        arguments["negative_prompt"] = [plan.negative] * len(prompts)
    if plan.embedded is not None and plan.guidance != 1:
        # Models that are told a guidance of their own take the true scale by another name.
        arguments["true_cfg_scale"] = shown["true_cfg_scale"] = plan.guidance
        arguments["negative_prompt"] = [plan.negative] * len(prompts)
        shown["negative_prompt"] = plan.negative
    if pipeline == "SanaPipeline" or pipeline.startswith("PixArt"):
        # Otherwise the picture is resized from the nearest of the pipeline's own aspect ratios.
        arguments["use_resolution_binning"] = shown["use_resolution_binning"] = False
    return Call(arguments, generator.encode(list(prompts)), len(prompts), {"prompt": prompts[0], **shown})


def _classes(pipeline: str, generator: Generator, plan: Plan) -> Call:
    shown: dict[str, Any] = {"num_inference_steps": plan.steps, "guidance_scale": plan.guidance}
    if pipeline == "FewstepPipeline" and generator.conds is None:
        return Call({"batch_size": 2, "num_inference_steps": plan.steps}, {}, 2, {"num_inference_steps": plan.steps})
    labels = [0, 1] if classes_of(generator) > 1 else [0, 0]
    arguments = {**shown, "class_labels": labels}
    return Call(arguments, {"label": torch.tensor(labels)}, 2, {"class_labels": labels[-1:], **shown})


def classes_of(generator: Generator) -> int:
    """How many classes a generator has; 0 for none."""
    frequencies: Mapping[int, float] | Sequence[float] = getattr(generator.conds, "frequencies", ())
    return len(frequencies)


def pixels(generator: Generator) -> tuple[int, int]:
    """Height and width of the pictures."""
    factor = int(getattr(generator.pipeline, "factor", 1))
    return int(generator.denoiser.shape[-2]) * factor, int(generator.denoiser.shape[-1]) * factor
