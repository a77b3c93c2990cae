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
    """One call of a pipeline that makes two pictures, or one for each prompt.

    Attributes:
        arguments: JSON-able keyword arguments of the pipeline, without generator and output type.
        show: keyword arguments that a model card shows; those of ``arguments`` that a user would write.
        prompts: those in ``arguments``; empty for other pipelines.
        labels: those in ``arguments``; empty for other pipelines.
        passes: how often the pipeline calls its network for one evaluation of the denoiser.
    """

    arguments: dict[str, Any]
    show: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    passes: int = 1

    @property
    def count(self) -> int:
        """How many pictures."""
        return len(self.prompts or self.labels) or 2

    def conditions(self, generator: Generator) -> dict[str, Tensor]:
        """What fewstep's denoiser is told for the same pictures."""
        if self.prompts:
            return generator.encode(list(self.prompts))
        return {"label": torch.tensor(self.labels)} if self.labels else {}


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
OWN = "FewstepPipeline"
CLASSES = frozenset({"DiTPipeline", OWN})


def check_call(pipeline: str, generator: Generator, plan: Plan, prompts: Sequence[str] = PROMPTS) -> None:
    """Refuses what a pipeline class cannot be called for; nothing is loaded and nothing is encoded.

    Raises:
        InputError: a class that nobody has taught the exporter to call, conditions that it does not pass on, a guidance
            that it does not apply, or a text pipeline without prompts.
    """
    if pipeline not in TEXT | PLAIN | CLASSES:
        raise unknown("pipeline class to export to", pipeline, TEXT | PLAIN | CLASSES)
    if pipeline in PLAIN and generator.conds is not None:
        raise InputError(
            f"a {pipeline} passes no labels to its network, and this generator needs them: no stock pipeline can run it"
        )
    if pipeline in TEXT and (isinstance(prompts, str) or not prompts or not all(map(str.strip, prompts))):
        raise InputError(f"a text pipeline is checked with prompts: pass a list of at least one, got {prompts!r}")
    if pipeline != OWN and plan.guidance < 1:
        raise InputError(f"pipelines of diffusers apply guidance above 1 only, got {plan.guidance:g}: use 1 for none")
    silent = pipeline == "LatentConsistencyModelPipeline" or (plan.embedded is not None and pipeline != "FluxPipeline")
    if silent and plan.guidance != 1:
        raise InputError(
            f"a {pipeline} whose network is told its guidance applies no other, got {plan.guidance:g}: take guidance "
            "off, or open the generator with embedded_guidance="
        )


def call_for(pipeline: str, generator: Generator, plan: Plan, prompts: Sequence[str] = PROMPTS) -> Call:
    """The call of a pipeline class that makes pictures of ``generator``.

    Raises:
        InputError: see :func:`check_call`.
    """
    check_call(pipeline, generator, plan, prompts)
    if pipeline in TEXT:
        return _text(pipeline, generator, plan, tuple(prompts))
    if pipeline in CLASSES and generator.conds is not None:
        return _classes(generator, plan)
    return Call({"batch_size": 2, "num_inference_steps": plan.steps}, {"num_inference_steps": plan.steps})


def _text(pipeline: str, generator: Generator, plan: Plan, prompts: tuple[str, ...]) -> Call:
    height, width = pixels(generator)
    shown: dict[str, Any] = {"num_inference_steps": plan.steps}
    # Flux takes the true scale by another name, because guidance_scale is what its network is told.
    twice = pipeline == "FluxPipeline" and plan.guidance != 1
    if pipeline != "FluxPipeline" or plan.embedded is not None:
        shown["guidance_scale"] = plan.guidance if plan.embedded is None else plan.embedded
    if twice:
        shown["true_cfg_scale"] = plan.guidance
    shown |= {"height": height, "width": width}
    arguments = {**shown, "prompt": list(prompts)}
    if plan.negative or twice:
        shown["negative_prompt"] = plan.negative
        arguments["negative_prompt"] = [plan.negative] * len(prompts)
    if pipeline == "SanaPipeline" or pipeline.startswith("PixArt"):
        # Otherwise the picture is resized from the nearest of the pipeline's own aspect ratios.
        arguments["use_resolution_binning"] = shown["use_resolution_binning"] = False
    return Call(arguments, {"prompt": prompts[0], **shown}, prompts, passes=2 if twice else 1)


def _classes(generator: Generator, plan: Plan) -> Call:
    shown: dict[str, Any] = {"num_inference_steps": plan.steps, "guidance_scale": plan.guidance}
    labels = (0, 1) if classes_of(generator) > 1 else (0, 0)
    arguments = {**shown, "class_labels": list(labels)}
    return Call(arguments, {"class_labels": [labels[-1]], **shown}, labels=labels)


def classes_of(generator: Generator) -> int:
    """How many classes a generator has; 0 for none."""
    frequencies: Mapping[int, float] | Sequence[float] = getattr(generator.conds, "frequencies", ())
    return len(frequencies)


def pixels(generator: Generator) -> tuple[int, int]:
    """Height and width of the pictures."""
    factor = int(getattr(generator.pipeline, "factor", 1))
    return int(generator.denoiser.shape[-2]) * factor, int(generator.denoiser.shape[-1]) * factor
