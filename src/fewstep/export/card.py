"""Model cards: what the Hub shows of a generator, made of what the generator knows about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.core.denoiser import TIME_MAPS, Precond, Wrapper, module_of
from fewstep.core.generator import Generator
from fewstep.core.pipeline import TextConditions
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.export.snippet import fewstep_snippet, run_snippet, snippet_for
from fewstep.sources.diffusers_files import is_hub_id

__all__ = ["Score", "fewstep_snippet", "model_card", "run_snippet", "scores", "snippet_for"]

Relation = Literal["finetune", "adapter", "quantized"]
RELATIONS = ("finetune", "adapter", "quantized")


@dataclass(frozen=True)
class Score:
    """One measured number of a card.

    Attributes:
        name: metric and number of samples, such as "fd@50000", as :func:`fewstep.measure.evaluate` calls it.
        value: the number.
        nfe: evaluations of the denoiser per picture.
        reference: the data that it was measured against, such as "CIFAR-10 train".
        of: "student" or "teacher"; only the student's enter the card's metadata.

    Raises:
        InputError: a name without its sample count, a value that is not finite, nfe below 1 or no reference.
    """

    name: str
    value: float
    nfe: int
    reference: str
    of: Literal["student", "teacher"] = "student"

    def __post_init__(self) -> None:
        metric, _, count = self.name.partition("@")
        if not metric or not count.isdigit():
            raise InputError(f"score {self.name!r} lacks its number of samples: name it like 'fd@50000'")
        if not math.isfinite(self.value):
            raise InputError(f"score {self.name} is {self.value}, expected a finite number")
        if self.nfe < 1 or not self.reference:
            raise InputError(f"score {self.name} needs nfe >= 1 and a reference set, got {self.nfe} and no name for it")
        if self.of not in ("student", "teacher"):
            raise unknown("owner of a score", str(self.of), ("student", "teacher"))

    @property
    def metric(self) -> str:
        """The metric without the sample count."""
        return self.name.partition("@")[0]

    @property
    def said(self) -> str:
        """The name with all that a number means nothing without."""
        count = int(self.name.partition("@")[2])
        return f"{self.metric}, {count:,} samples, {self.nfe} NFE, against {self.reference}"


def scores(
    found: Mapping[str, float], *, nfe: int, reference: str, of: Literal["student", "teacher"] = "student"
) -> list[Score]:
    """The result of :func:`fewstep.measure.evaluate` as scores of a card; raises InputError as :class:`Score` does."""
    return [Score(name, float(value), nfe, reference, of) for name, value in found.items()]


def model_card(
    generator: Generator,
    *,
    title: str | None = None,
    base_model: str | None = None,
    base_license: str | None = None,
    snippet: str,
    metrics: Sequence[Score] = (),
    extra: Mapping[str, Any] | None = None,
    datasets: Sequence[str] = (),
    relation: Relation | None = None,
) -> str:
    """The text of a README.md: metadata for the Hub, and what a reader needs to use and to judge the model.

    Args:
        generator: method, settings and training facts come from its ``card``, grid and evaluations from its sampler.
        title: of the page; by default the method and the base model.
        base_model: the teacher's Hub id; by default that of the pipeline the generator came from, if it has one.
        base_license: the teacher's licence by the Hub's identifier, such as "apache-2.0". Without it the card says
            "other": nobody but the teacher's owner can say more.
        snippet: the code to copy; see :func:`run_snippet` for the proof that it runs.
        metrics: measured numbers.
        extra: facts of an export. ``checked`` with its ``largest_difference`` says how it was checked;
            ``guidance_scale``, ``num_inference_steps``, ``scheduler``, ``timesteps`` and ``trust_remote_code`` are
            shown in their places, and others that are numbers or text in a list.
        datasets: Hub ids of what it was trained on.
        relation: to the base model; by default "finetune" where the generator was trained, else none.

    Raises:
        InputError: no snippet, an unknown relation, or huggingface_hub is not installed.
    """
    if not snippet.strip():
        raise InputError("a model card needs a snippet: make one with snippet_for(...)")
    if relation is not None and relation not in RELATIONS:
        raise unknown("relation to a base model", relation, RELATIONS)
    try:
        from huggingface_hub import ModelCard
    except ImportError:
        raise InputError("huggingface_hub is not installed: pip install 'fewstep[hf]'") from None
    facts = dict(extra or {})
    base = base_model or _hub_id(generator)
    method = str(generator.card.get("method", "")) if isinstance(generator.card.get("method"), str) else ""
    name = title or f"{method or 'few-step'} " + (f"student of {base}" if base else "generator")
    data = _data(generator, name, method, base, base_license, snippet, metrics, datasets, relation)
    parts = [
        f"# {name}",
        _about(generator, method, base, facts),
        f"## How to use it\n\n```python\n{snippet.strip()}\n```\n\n{_needs(snippet, facts)}",
        _sampler(generator, facts),
        _training(generator, method),
        _numbers(metrics),
        _checked(facts),
        _limits(generator, facts),
        _licence(base, base_license, _distils(method)),
        _others(facts),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _data(
    generator: Generator,
    name: str,
    method: str,
    base: str | None,
    base_license: str | None,
    snippet: str,
    metrics: Sequence[Score],
    datasets: Sequence[str],
    relation: Relation | None,
) -> Any:
    """The card's metadata."""
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-to-image" if isinstance(generator.conds, TextConditions) else "unconditional-image-generation"
    own = [s for s in metrics if s.of == "student"]
    trained = "finetune" if method and generator.card.get("trained") else None
    fields: dict[str, Any] = {
        "license": base_license or "other",
        "library_name": "fewstep" if "import fewstep" in snippet else "diffusers",
        "pipeline_tag": task,
        "tags": ["few-step", *["distillation"] * _distils(method), *([method.lower()] if method else [])],
    }
    if base_license is None:
        fields |= {"license_name": "that-of-the-teacher" if base else "not-stated"}
    if base is not None:
        fields |= {"base_model": base} | ({"base_model_relation": relation or trained} if relation or trained else {})
    if datasets:
        fields["datasets"] = list(datasets)
    if own:
        fields |= {"metrics": list(dict.fromkeys(s.metric for s in own)), "model_name": name}
        fields["eval_results"] = [
            EvalResult(
                task_type=task,
                dataset_type=s.reference.lower().replace(" ", "-"),
                dataset_name=s.reference,
                metric_type=s.metric,
                metric_name=s.said,
                metric_value=s.value,
            )
            for s in own
        ]
    return ModelCardData(**fields)


def _distils(method: str) -> bool:
    """Whether it is a method that learns from a teacher, and not from data alone."""
    from fewstep.distill.front import METHODS

    return method in {cls.__name__ for cls in METHODS.values()}


def shareable(found: Any) -> Any:
    """JSON-able facts without this machine's folders: of an absolute path the last name is kept."""
    if isinstance(found, Mapping):
        return {k: shareable(v) for k, v in found.items()}
    if isinstance(found, list | tuple):
        return [shareable(v) for v in found]
    return Path(found).name if isinstance(found, str) and Path(found).is_absolute() else found


def _hub_id(generator: Generator) -> str | None:
    """The Hub id of the pipeline that the generator came from; None for a folder of this machine."""
    source = str(getattr(generator.pipeline, "source", "") or "")
    return source if is_hub_id(source) and not Path(source).exists() else None


def _about(generator: Generator, method: str, base: str | None, facts: Mapping[str, Any]) -> str:
    shape, factor = "x".join(map(str, generator.denoiser.shape)), getattr(generator.pipeline, "factor", None)
    space = "pictures" if generator.codec is None else "latents"
    if generator.codec is not None and factor:
        height, width = (factor * int(side) for side in generator.denoiser.shape[-2:])
        space += f" (pictures of {height}x{width})"
    nfe = facts.get("nfe", generator.sampler.nfe)
    made = f"{'distilled' if _distils(method) else 'trained'} with {method}" if method else "sampled in few steps"
    teacher = f" from [{base}](https://huggingface.co/{base})" if base else ""
    many = "1 evaluation" if nfe == 1 else f"{nfe} evaluations"
    return f"A generator of {shape} {space}, {made}{teacher}. A picture takes {many} of its network."


def _needs(snippet: str, facts: Mapping[str, Any]) -> str:
    end = 'The picture is in `image`; `image.save("picture.png")` writes it.'
    if "load_lora_weights" in snippet:
        return f"Needs torch, diffusers and peft, with which diffusers loads LoRA files. {end}"
    if "import fewstep" in snippet:
        return f"Needs fewstep (`pip install fewstep`). {end}"
    if facts.get("trust_remote_code") or "trust_remote_code" in snippet:
        return (
            "Needs torch and diffusers. This repository brings code of its own, because no stock class does the same; "
            f"read it before you pass `trust_remote_code=True`. {end}"
        )
    return f"Needs torch and diffusers only. {end}"


def _guidance(generator: Generator, facts: Mapping[str, Any]) -> str:
    scale = facts.get("guidance_scale")
    if scale is None and isinstance(generator.denoiser, Wrapper):
        scale = generator.denoiser.describe().get("scale")
    embedded = facts.get("embedded_guidance")
    if embedded is not None:
        return f"The network is told a guidance of {embedded:g}."
    if scale is None or scale == 1:
        return "No classifier-free guidance: each evaluation is one pass of the network."
    return f"Classifier-free guidance with scale {scale:g}, which evaluates the network twice."


def _sampler(generator: Generator, facts: Mapping[str, Any]) -> str:
    """Evaluations, guidance and grid."""
    use = generator.sampler
    name = getattr(use, "name", type(use).__name__)
    lines = [f"Sampler `{name}`, {use.nfe} NFE, from sigma {use.start:.6g} to {use.end:.6g} (`x = x0 + sigma n`)."]
    if "scheduler" in facts:
        steps = facts.get("num_inference_steps", use.nfe)
        lines.append(f"In diffusers: `{facts['scheduler']}` with `num_inference_steps={steps}`.")
    lines.append(_guidance(generator, facts))
    table = ""
    if isinstance(use, Tableau):
        called = [s for s in use.sigmas.tolist() if not math.isnan(s)]
        times = list(facts.get("timesteps") or _times(generator, called))
        rows = [f"| {i + 1} | {s:.6g} | {t:.6g} |" for i, (s, t) in enumerate(zip(called, times, strict=True))]
        table = "\n\n" + "\n".join(["| evaluation | sigma | time told to the network |", "|---|---|---|", *rows])
    return "## Sampler and grid\n\n" + " ".join(lines) + table


def _times(generator: Generator, sigmas: Sequence[float]) -> list[float]:
    """What the network is told at these levels; the levels themselves for a denoiser that hides it."""
    inner = module_of(generator.denoiser)
    if not isinstance(inner, Precond):
        return list(sigmas)
    levels = torch.tensor(list(sigmas), dtype=torch.float64)
    return [float(t) for t in TIME_MAPS[inner.time](inner.path, inner.path.at(levels), levels)]


def _training(generator: Generator, method: str) -> str:
    """Method, settings and the end of the run."""
    card = shareable(generator.card)
    lines: list[str] = []
    if method:
        lines.append(f"Method: {method}. {_pairs(card.get('settings', {}))}".strip())
    names = ["source", "class", "sha256"]
    source = {k: card[k] for k in names if k in card}
    if source:
        lines.append(f"Made from: {_pairs(source)}")
    trained, options = card.get("trained") or {}, card.get("options") or {}
    if trained:
        said = [
            f"{trained[k]:,} {k if k != 'step' else 'steps'}" for k in ("step", "images", "seconds") if k in trained
        ]
        lines.append(f"Training: {', '.join(said)}.")
    if options:
        lines.append(f"Options: {_pairs(options)}")
    calibration = getattr(generator.sampler, "meta", {}).get("calibration", {})
    if calibration:
        lines.append(f"Calibration of the sampler: {_pairs(calibration)}")
    notes = card.get("notes") or []
    lines += [notes] if isinstance(notes, str) else [str(note) for note in notes]
    return "## How it was made\n\n" + "\n\n".join(lines) if lines else ""


def _pairs(found: Mapping[str, Any]) -> str:
    """Plain values by name, in code marks."""
    plain = {k: v for k, v in found.items() if isinstance(v, str | int | float | bool)}
    told = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in plain.items()}
    return ", ".join(f"`{k}={v}`" for k, v in told.items()) + ("." if plain else "")


def _numbers(metrics: Sequence[Score]) -> str:
    """The table of student against teacher."""
    if not metrics:
        return ""
    rows = [f"| {s.of} | {s.nfe} | {s.name} | {s.value:.6g} | {s.reference} |" for s in metrics]
    head = ["| model | NFE | metric@samples | value | reference |", "|---|---|---|---|---|"]
    note = "Values with other sample counts or other references are not comparable."
    return "## Measurements\n\n" + "\n".join([*head, *rows]) + f"\n\n{note}"


def _checked(facts: Mapping[str, Any]) -> str:
    if "checked" not in facts:
        return ""
    found = facts["checked"]
    if isinstance(found, Mapping):
        text = (
            "It was opened in a process where fewstep cannot be imported, as the code above does, and its "
            f"pictures were compared with fewstep's own from the same noise: largest difference "
            f"{float(found['largest_difference']):.2g} of the range of a pixel."
        )
    else:
        text = str(found) if found else "This export was not checked: its pictures were not compared with fewstep's."
    return f"## How it was checked\n\n{text}"


def _limits(generator: Generator, facts: Mapping[str, Any]) -> str:
    steps = facts.get("num_inference_steps", generator.sampler.nfe)
    many = f"{steps} step{'' if steps == 1 else 's'}"
    return (
        "## Limits\n\n"
        f"* It is made for {many} on the grid above; another scheduler, grid or number of steps is another "
        "model.\n"
        "* It has what its teacher learnt, mistakes and biases included, and usually shows less variety.\n"
        "* Weights that were fine-tuned or adapted after this step may need the distillation again."
    )


def _licence(base: str | None, licence: str | None, distilled: bool) -> str:
    link = f"[{base}](https://huggingface.co/{base})"
    of = f"its teacher, {link}" if base and distilled else link if base else "the model that they were made from"
    if licence is not None:
        return f"## Licence\n\n{licence}: the licence of {of}, whose terms these weights inherit."
    return (
        f"## Licence\n\nThe weights are under the licence of {of}, or of the data. It was not known when this card was "
        "written, so the metadata say `other`: state it before you share the model."
    )


SHOWN = {"format", "nfe", "num_inference_steps", "guidance_scale", "embedded_guidance", "sigmas", "timesteps"} | {
    "scheduler",
    "trust_remote_code",
    "checked",
    "card",
    "left_out",
    "dtype",
    "base_model",
}


def _others(facts: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in facts.items() if k not in SHOWN and isinstance(v, str | int | float) and v != ""}
    return "## Further facts\n\n" + "\n".join(f"* {k.replace('_', ' ')}: {v}" for k, v in rest.items()) if rest else ""
