"""A generator as a diffusers folder that runs where fewstep is not installed, and the proof that it does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.core.denoiser import TIME_MAPS, Precond, Wrapper, module_of
from fewstep.core.generator import Generator
from fewstep.core.state import write_text
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.export.bundle import need_diffusers
from fewstep.export.calls import OWN, PROMPTS, Call, Plan, call_for, check_call
from fewstep.export.layout import Laid, embedded_guidance, lay_custom, lay_pipeline
from fewstep.export.place import FACTS, check_place, taking_place
from fewstep.export.verify import Opened, Verified, verify
from fewstep.guide import CFG

Scheduling = Literal["auto", "stock", "tableau"]
SCHEDULINGS = ("auto", "stock", "tableau")
FORMAT = "fewstep-export/1"


@dataclass(frozen=True)
class Check:
    """How an export is checked.

    Attributes:
        on: whether it is.
        prompts: for text pipelines.
        seed: of the pictures.
        tolerance: the largest difference of a pixel in [0, 1] that counts as none.
    """

    on: bool = True
    prompts: Sequence[str] = PROMPTS
    seed: int = 0
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must be between 0 and 1, got {self.tolerance!r}: 1e-4 is what float32 keeps")


def to_diffusers(
    generator: Generator,
    folder: str | Path,
    *,
    scheduler: Scheduling = "auto",
    dtype: torch.dtype | None = None,
    check: bool = True,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    title: str | None = None,
) -> Path:
    """Writes ``folder`` so that ``diffusers.DiffusionPipeline.from_pretrained(folder)`` makes the generator's pictures.

    The network goes to the stock class that it came from, with its codec and text encoders beside it; a network of
    fewstep's own goes along as one file of code. The sampler goes to a stock scheduler where one does exactly the
    same (``scheduler="stock"`` insists on it), otherwise to the self-contained ``TableauScheduler`` that is shipped in
    the folder; what holds code of its own needs ``trust_remote_code=True``, and a warning says so. ``dtype`` is that of
    the network's weights; what surrounds it is copied as it is.

    With ``check`` the folder is opened in a fresh process in which fewstep cannot be imported, and its pictures must
    be fewstep's own to ``tolerance`` (of 1) from the same random draws. The model card's snippet is executed there.
    An earlier export is replaced with ``overwrite``, once the new one is whole.

    Raises:
        InputError: something is in the way of writing, the sampler is no table, no stock scheduler does what it does
            (``scheduler="stock"``), the pipeline's class cannot be called for it, or the pictures differ; nothing is
            left behind then.
    """
    if scheduler not in SCHEDULINGS:
        raise unknown("kind of scheduler", str(scheduler), SCHEDULINGS)
    need_diffusers()
    how = Check(check, prompts, seed, tolerance)
    (scale, negative), table = guidance_of(generator), table_of(generator)
    target = check_place(folder, overwrite, generator)
    around = generator.pipeline
    stock = around is not None and around.kind == "diffusers"
    plan = Plan(table.nfe, scale, negative, embedded_guidance(generator))
    check_call(str(getattr(around, "class_name", "")) if stock else OWN, generator, plan, prompts)
    with taking_place(target) as place:
        lay = lay_pipeline if stock else lay_custom
        laid = lay(generator, table, place, scheduler, dtype)
        plan = Plan(laid.steps, scale, negative, laid.embedded)
        call = call_for(laid.pipeline, generator, plan, prompts)
        _finish(generator, place, target.name, laid, plan, call, how, title)
    if laid.remote_code:
        warnings.warn(
            f"{folder} holds code of its own ({', '.join(laid.code)}), because no stock class does the same: open it "
            "with DiffusionPipeline.from_pretrained(..., trust_remote_code=True)",
            stacklevel=2,
        )
    return Path(folder)


def _finish(
    generator: Generator, place: Path, name: str, laid: Laid, plan: Plan, call: Call, how: Check, title: str | None
) -> None:
    """Checks what lies in ``place`` and writes the facts and the card of what will be called ``name``."""
    from fewstep.export.card import model_card, shareable, snippet_for

    inner = module_of(generator.denoiser)
    assert inner is not None
    weights = str(laid.dtype or next(inner.parameters()).dtype).removeprefix("torch.")
    # A network of fewstep's own runs as its file has it; half precision is asked for where the reader would lose it.
    dtype = weights if weights in ("float16", "bfloat16") and not laid.told_sigma else None

    def snippet(at: str) -> str:
        return snippet_for(laid.pipeline, at, call.show, remote_code=laid.remote_code, seed=how.seed, dtype=dtype)

    found, table = None, table_of(generator)
    levels = table.sigmas[~table.sigmas.isnan()].tolist()
    times = levels if laid.told_sigma else network_times(generator, table)
    if how.on:
        found = verify(
            laid.checked(generator),
            Opened(place, laid.network, laid.remote_code),
            call,
            table=laid.table,
            expected=times,
            name=name,
            snippet=snippet(str(place)),
            keep=place / "sample.png",
            seed=how.seed,
            tolerance=how.tolerance,
        )
    facts = {
        "format": FORMAT,
        **facts_of(generator, plan, times, laid.scheduler, laid.remote_code, found),
        "dtype": None if laid.dtype is None else str(laid.dtype).removeprefix("torch."),
        "left_out": list(laid.left_out),
        "card": shareable(generator.card),
    }
    write_text(place / FACTS, json.dumps(facts, indent=2) + "\n")
    base = None if laid.base is None or Path(laid.base).is_absolute() else laid.base
    text = model_card(generator, title=title or name, base_model=base, snippet=snippet(name), extra=facts)
    write_text(place / "README.md", text)


def facts_of(
    generator: Generator,
    plan: Plan,
    times: Sequence[float],
    scheduler: str,
    remote_code: bool,
    found: Verified | None,
) -> dict[str, Any]:
    """What travels beside an export: evaluations, grid, guidance, and how it was checked."""
    table = table_of(generator)
    return {
        "nfe": table.nfe,
        "num_inference_steps": plan.steps,
        "guidance_scale": plan.guidance,
        "negative_prompt": plan.negative,
        "embedded_guidance": plan.embedded,
        "sigmas": [s for s in table.sigmas.tolist() if s == s],
        "timesteps": list(times),
        "scheduler": scheduler,
        "trust_remote_code": remote_code,
        "checked": None
        if found is None
        else {"largest_difference": found.difference, "asked": list(found.asked), "scheduler": found.scheduler},
    }


def network_times(generator: Generator, table: Tableau) -> list[float]:
    """What the network is told of the time at each evaluation of ``table``."""
    inner = module_of(generator.denoiser)
    assert isinstance(inner, Precond)
    sigma = table.sigmas[~table.sigmas.isnan()]
    return [float(t) for t in TIME_MAPS[inner.time](inner.path, inner.path.at(sigma), sigma)]


def table_of(generator: Generator) -> Tableau:
    """The generator's sampler, if a scheduler can hold it.

    Raises:
        InputError: it is no table, or it ends before the picture.
    """
    if not isinstance(generator.sampler, Tableau):
        raise InputError(
            f"a {type(generator.sampler).__name__} cannot be exported: its weights depend on the picture, and a "
            "scheduler holds a table; use with_sampler(...) with a tableau"
        )
    # Published samplers may stop at the smallest trained level; a part of a trajectory is no picture.
    if generator.sampler.end > 2 * generator.denoiser.sigma_min:
        raise InputError(f"sampler {generator.sampler.name!r} ends at sigma {generator.sampler.end:g}, expected 0")
    return generator.sampler


def guidance_of(generator: Generator) -> tuple[float, str]:
    """Scale and negative prompt; guidance is the only wrapper that pipelines have.

    Raises:
        InputError: another wrapper, or no denoiser with weights.
    """
    D = generator.denoiser
    if isinstance(D, Precond):
        return 1.0, ""
    if isinstance(D, CFG) and isinstance(D.denoiser, Precond):
        return D.scale, str(getattr(D, "negative", ""))
    what = type(D).__name__ if not isinstance(D, Wrapper) else f"{type(D).__name__} around {type(D.denoiser).__name__}"
    raise InputError(f"a {what} cannot be exported: expected a Precond, or CFG around one")


def exported_facts(folder: Path) -> Mapping[str, Any] | None:
    """What :func:`to_diffusers` left beside a pipeline, or None for a folder that it did not write.

    Raises:
        InputError: the file is damaged.
    """
    from fewstep.core.state import read_json

    body = read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    return body if body.get("format") == FORMAT else None
