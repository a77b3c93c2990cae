"""A generator as a diffusers folder that runs where fewstep is not installed, and the proof that it does."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.core.denoiser import TIME_MAPS, Precond, Wrapper, module_of
from fewstep.core.generator import Generator
from fewstep.core.state import write_text
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.export.calls import PROMPTS, Call, Plan, call_for
from fewstep.export.layout import Laid, lay_custom, lay_pipeline
from fewstep.export.verify import Verified, verify
from fewstep.guide import CFG

Scheduling = Literal["auto", "stock", "tableau"]
FACTS = "fewstep.json"
FORMAT = "fewstep-export/1"


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
    the folder; what holds code of its own needs ``trust_remote_code=True``, and a warning says so.

    With ``check`` the folder is opened in a fresh process in which fewstep cannot be imported, and its pictures must
    be fewstep's own to ``tolerance`` (of 1) from the same random draws. The model card's snippet is executed there.

    Raises:
        InputError: something is in the way of writing, the sampler is no table, no stock scheduler does what it does
            (``scheduler="stock"``), or the pictures differ; nothing is left behind then.
    """
    folder = Path(folder)
    if scheduler not in ("auto", "stock", "tableau"):
        raise unknown("kind of scheduler", str(scheduler), ("auto", "stock", "tableau"))
    table = _table(generator)
    _check_place(folder, overwrite)
    plan_guidance, negative = _guidance(generator)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        around = generator.pipeline
        if around is not None and around.kind == "diffusers":
            laid = lay_pipeline(generator, table, temporary, scheduler, dtype)
        else:
            laid = lay_custom(generator, table, temporary, scheduler, dtype)
        plan = Plan(laid.steps, plan_guidance, negative, laid.embedded)
        call = call_for(laid.pipeline, generator, plan, prompts)
        _finish(generator, table, temporary, folder, laid, plan, call, check, seed, tolerance, title)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if laid.remote_code:
        warnings.warn(
            f"{folder} holds code of its own ({', '.join(laid.code)}), because no stock class does the same: open it "
            "with DiffusionPipeline.from_pretrained(..., trust_remote_code=True)",
            stacklevel=2,
        )
    return folder


def _finish(
    generator: Generator,
    table: Tableau,
    place: Path,
    folder: Path,
    laid: Laid,
    plan: Plan,
    call: Call,
    check: bool,
    seed: int,
    tolerance: float,
    title: str | None,
) -> None:
    """Checks what lies in ``place`` and writes the facts and the card of what will be ``folder``."""
    from fewstep.export.card import model_card, snippet_for

    def snippet(at: str) -> str:
        return snippet_for(laid.pipeline, at, call.show, remote_code=laid.remote_code, seed=seed)

    found = None
    levels = table.sigmas[~table.sigmas.isnan()].tolist()
    times = levels if laid.told_sigma else network_times(generator, table)
    if check:
        found = verify(
            laid.checked(generator),
            place,
            call,
            network=laid.network,
            remote_code=laid.remote_code,
            table=laid.table,
            expected=times,
            snippet=snippet(str(place)),
            keep=place / "sample.png",
            seed=seed,
            tolerance=tolerance,
        )
    facts = _facts(generator, table, laid, plan, times, found)
    write_text(place / FACTS, json.dumps(facts, indent=2) + "\n")
    base = None if laid.base is None or Path(laid.base).is_absolute() else laid.base
    text = model_card(generator, title=title or folder.name, base_model=base, snippet=snippet(folder.name), extra=facts)
    write_text(place / "README.md", text)


def _facts(
    generator: Generator,
    table: Tableau,
    laid: Laid,
    plan: Plan,
    times: Sequence[float],
    found: Verified | None,
) -> dict[str, Any]:
    """What travels beside the folder: evaluations, grid, guidance, and how it was checked."""
    return {
        "format": FORMAT,
        "nfe": table.nfe,
        "num_inference_steps": plan.steps,
        "guidance_scale": plan.guidance,
        "negative_prompt": plan.negative,
        "embedded_guidance": plan.embedded,
        "sigmas": [s for s in table.sigmas.tolist() if s == s],
        "timesteps": list(times),
        "scheduler": laid.scheduler,
        "trust_remote_code": laid.remote_code,
        "checked": None
        if found is None
        else {"largest_difference": found.difference, "asked": list(found.asked), "scheduler": found.scheduler},
        "card": generator.card,
    }


def network_times(generator: Generator, table: Tableau) -> list[float]:
    """What the network is told of the time at each evaluation of ``table``."""
    inner = module_of(generator.denoiser)
    assert isinstance(inner, Precond)
    sigma = table.sigmas[~table.sigmas.isnan()]
    return [float(t) for t in TIME_MAPS[inner.time](inner.path, inner.path.at(sigma), sigma)]


def _table(generator: Generator) -> Tableau:
    if not isinstance(generator.sampler, Tableau):
        raise InputError(
            f"a {type(generator.sampler).__name__} cannot be exported: its weights depend on the picture, and a "
            "scheduler holds a table; use with_sampler(...) with a tableau"
        )
    # Published samplers may stop at the smallest trained level; a part of a trajectory is no picture.
    if generator.sampler.end > 2 * generator.denoiser.sigma_min:
        raise InputError(f"sampler {generator.sampler.name!r} ends at sigma {generator.sampler.end:g}, expected 0")
    return generator.sampler


def _guidance(generator: Generator) -> tuple[float, str]:
    """Scale and negative prompt; guidance is the only wrapper that pipelines have."""
    D = generator.denoiser
    if isinstance(D, Precond):
        return 1.0, ""
    if isinstance(D, CFG) and isinstance(D.denoiser, Precond):
        return D.scale, str(getattr(D, "negative", ""))
    what = type(D).__name__ if not isinstance(D, Wrapper) else f"{type(D).__name__} around {type(D.denoiser).__name__}"
    raise InputError(f"a {what} cannot be exported: expected a Precond, or CFG around one")


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: export to a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise InputError(f"{folder} already holds files: choose another folder, or --overwrite")
        if not (folder / "model_index.json").is_file():
            raise InputError(f"{folder} is no exported pipeline (no model_index.json): --overwrite will not delete it")


def exported_facts(folder: Path) -> Mapping[str, Any] | None:
    """What :func:`to_diffusers` left beside a pipeline, or None for a folder that it did not write."""
    place = folder / FACTS
    if not place.is_file():
        return None
    body = json.loads(place.read_text())
    return body if isinstance(body, dict) and body.get("format") == FORMAT else None
