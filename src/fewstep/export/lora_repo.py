"""A student that is a LoRA of its teacher, as a repository: the LoRA, the scheduler that belongs to it, the card."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from fewstep.core.denoiser import Precond, module_of
from fewstep.core.generator import Generator
from fewstep.core.state import read_json, write_bytes, write_text
from fewstep.errors import InputError, unknown
from fewstep.export.calls import PROMPTS, Call, Plan, call_for, check_call
from fewstep.export.layout import Scheduled, embedded_guidance, in_float32, lay_scheduler
from fewstep.export.lora import FILE, MIXINS, apply_lora
from fewstep.export.pipeline import SCHEDULINGS, Check, Scheduling, facts_of, guidance_of, network_times, table_of
from fewstep.export.place import FACTS, check_place, taking_place
from fewstep.export.scheduler import CODE
from fewstep.export.verify import Opened, verify
from fewstep.models.diffusers import DiffusersNet
from fewstep.sources.diffusers import load_diffusers
from fewstep.sources.diffusers_files import UNUSED, is_hub_id
from fewstep.sources.diffusers_pipeline import DiffusersPipeline

FORMAT = "fewstep-lora/1"


def export_lora(
    run: str | Path,
    folder: str | Path,
    *,
    generator: Generator | None = None,
    scheduler: Scheduling = "auto",
    base_model: str | None = None,
    check: bool = True,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    title: str | None = None,
) -> Path:
    """Writes a repository of a student that was trained as LoRA layers (``distill(..., lora=LoRA(...))``).

    It holds ``pytorch_lora_weights.safetensors``, which ``pipe.load_lora_weights`` reads, ``scheduler/`` with a stock
    scheduler or the self-contained ``TableauScheduler``, because a LoRA file cannot carry its sampler, ``fewstep.json``
    and a model card whose code puts both into the base pipeline.

    Args:
        run: the folder of the run; the LoRA lies in ``run/lora``.
        folder: the repository's.
        generator: the run's student as it is meant to be used, with another sampler or under guidance; by default as
            the run left it.
        scheduler: "auto", "stock" or "tableau", see :func:`fewstep.export.pipeline.to_diffusers`.
        base_model: what the card calls the base; by default where the teacher came from, a Hub id or a folder.
        check: opens the base in a process without fewstep, loads LoRA and scheduler, and compares the pictures with the
            merged student's, to ``tolerance`` (of 1), for ``prompts`` and ``seed``.
        overwrite: replaces an earlier export once the new one is whole.
        title: of the card.

    Raises:
        InputError: the run trained no LoRA, its teacher is no pipeline that diffusers loads LoRA into, something is in
            the way of writing, no stock scheduler does what the sampler does, or the pictures differ; nothing is left
            behind then.
    """
    if scheduler not in SCHEDULINGS:
        raise unknown("kind of scheduler", str(scheduler), SCHEDULINGS)
    if base_model is not None and not is_hub_id(base_model):
        raise InputError(f"base_model is what the card calls the base, owner/name on the Hub, got {base_model!r}")
    how, file = Check(check, prompts, seed, tolerance), lora_file(run)
    student = Generator.load(run) if generator is None else generator
    around = _base(student)
    (scale, negative), table = guidance_of(student), table_of(student)
    target = check_place(folder, overwrite, student)
    told = embedded_guidance(student)
    check_call(around.class_name, student, Plan(table.nfe, scale, negative, told), prompts)
    with taking_place(target) as place:
        write_bytes(place / FILE, file.read_bytes())
        config = around.scheduler_config
        made = lay_scheduler(student, table, config, place / "scheduler", scheduler, around.class_name)
        plan = Plan(made.steps, scale, negative, told)
        call = call_for(around.class_name, student, plan, prompts)
        _finish(student, around, place, target.name, made, plan, call, how, base_model, title)
    if not made.stock:
        warnings.warn(
            f"{folder} holds code of its own (scheduler/{CODE}.py), because no stock scheduler does the same: its card "
            "loads it with trust_remote_code=True",
            stacklevel=2,
        )
    return Path(folder)


def lora_file(run: str | Path) -> Path:
    """The LoRA of a run.

    Raises:
        InputError: the folder is no run, or its student is no LoRA.
    """
    file = Path(run) / "lora" / FILE
    if not file.is_file():
        raise InputError(
            f"{run} has no LoRA (lora/{FILE}): it must be the folder of a run that was distilled with lora=, or --lora"
        )
    return file


def _base(student: Generator) -> DiffusersPipeline:
    """The pipeline that the LoRA is loaded into."""
    around, inner = student.pipeline, module_of(student.denoiser)
    if not isinstance(around, DiffusersPipeline):
        raise InputError("the teacher of this run is no pipeline of diffusers, into which a LoRA could be loaded")
    if not (isinstance(inner, Precond) and isinstance(inner.net, DiffusersNet)):
        raise InputError(f"a {type(inner).__name__} around the network is no student of a diffusers pipeline")
    kind = around.network_class
    if kind not in MIXINS:
        raise InputError(
            f"diffusers loads no LoRA into a {kind}, only into {', '.join(MIXINS)}: export the merged student instead"
        )
    return around


def _finish(
    student: Generator,
    around: DiffusersPipeline,
    place: Path,
    name: str,
    made: Scheduled,
    plan: Plan,
    call: Call,
    how: Check,
    base_model: str | None,
    title: str | None,
) -> None:
    """Checks what lies in ``place`` and writes facts and card."""
    from fewstep.export.card import model_card, shareable, snippet_for

    def snippet(base: str, at: str) -> str:
        return snippet_for(around.class_name, at, call.show, seed=how.seed, base=base, scheduler=made.name)

    found, times = None, network_times(student, table_of(student))
    if how.on:
        found = verify(
            _compared(student, around, place),
            Opened(around.root, around.part, lora=(place, made.name), options=_options(around)),
            call,
            table=made.table,
            expected=times,
            name=f"{name} on {around.source}",
            snippet=snippet(str(around.root), str(place)) if _whole(around) else None,
            keep=place / "sample.png",
            seed=how.seed,
            tolerance=how.tolerance,
        )
    base = base_model or around.source
    facts = {
        "format": FORMAT,
        "base_model": base,
        **facts_of(student, plan, times, made.name, not made.stock, found),
        "card": shareable(student.card),
    }
    write_text(place / FACTS, json.dumps(facts, indent=2) + "\n")
    # The Hub takes a name for a link; a folder of this machine would be a dead one.
    linked = None if Path(base).is_absolute() else base
    text = model_card(
        student, title=title or name, base_model=linked, relation="adapter", snippet=snippet(base, name), extra=facts
    )
    write_text(place / "README.md", text)


def _compared(student: Generator, around: DiffusersPipeline, place: Path) -> Generator:
    """The merged student in float32. One of half precision was rounded when it was merged: it is merged anew."""
    if around.dtype == "float32":
        return student
    base = load_diffusers(around.root, size=_size(around), variant=around.variant)
    whole = in_float32(student)
    inner, merged = module_of(whole.denoiser), module_of(apply_lora(base, place).denoiser)
    assert inner is not None and merged is not None
    inner.load_state_dict(merged.state_dict())
    return whole


def _size(around: DiffusersPipeline) -> tuple[int, int]:
    return around.shape[1] * around.factor, around.shape[2] * around.factor


def _options(around: DiffusersPipeline) -> dict[str, str | None]:
    """How the base opens for a check: without parts that only look at pictures, which may be pickles or not there."""
    named = read_json(around.root / "model_index.json")
    options: dict[str, str | None] = {name: None for name in UNUSED if name in named}
    return options if around.variant is None else {**options, "variant": around.variant}


def _whole(around: DiffusersPipeline) -> bool:
    """Whether the base opens as the card's code does, by its name alone."""
    return around.variant is None and all((around.root / name).is_dir() for name in around.parts)
