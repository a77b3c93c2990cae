"""What lies in an exported folder: network, scheduler, and what surrounds them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.core.denoiser import Precond, module_of
from fewstep.core.generator import Generator
from fewstep.core.state import read_json, write_text
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.export.bundle import write_custom_pipeline
from fewstep.export.calls import classes_of
from fewstep.export.scheduler import CODE, TableauScheduler, save_scheduler
from fewstep.export.stock import stock_scheduler
from fewstep.guide import CFG
from fewstep.models.diffusers import DiffusersNet, diffusers_class, family_of
from fewstep.sources.diffusers_pipeline import DiffusersPipeline
from fewstep.tracing import trace

INDEX = "model_index.json"
# These neither scale their latents by init_noise_sigma nor pass eta on.
BARE = frozenset({"DDPMPipeline", "DiTPipeline"})


@dataclass(frozen=True)
class Laid:
    """What was laid out.

    Attributes:
        pipeline: the pipeline's class.
        network: its component that is the network.
        steps: the ``num_inference_steps`` to call it with.
        scheduler: the scheduler's class.
        table: what that scheduler does, as fewstep runs it.
        code: files of code that the folder carries.
        base: the folder or Hub id that it was made from; None for a network of fewstep's own.
        embedded: the guidance that the network is told; None for none.
        dtype: of the weights as written; None for those of the generator.
        told: whether the network is told sigma itself, not the model's own time.
    """

    pipeline: str
    network: str
    steps: int
    scheduler: str
    table: Tableau
    code: tuple[str, ...]
    base: str | None
    embedded: float | None
    dtype: torch.dtype | None
    told_sigma: bool = False

    @property
    def remote_code(self) -> bool:
        """Whether it opens only with ``trust_remote_code=True``."""
        return bool(self.code)

    def checked(self, generator: Generator) -> Generator:
        """The generator with its weights rounded as they were written, in float32, for the comparison."""
        inner = module_of(generator.denoiser)
        assert isinstance(inner, Precond)
        if self.dtype in (None, torch.float32) and next(inner.parameters()).dtype == torch.float32:
            return generator
        rounded: Precond = copy.deepcopy(inner)
        rounded.to(self.dtype or next(inner.parameters()).dtype).float()
        D = generator.denoiser
        return replace(generator, denoiser=CFG(rounded, D.scale, D.nulls) if isinstance(D, CFG) else rounded)


def lay_pipeline(generator: Generator, table: Tableau, place: Path, scheduler: str, dtype: torch.dtype | None) -> Laid:
    """A generator whose network is a stock class: its own pipeline with the network and the scheduler replaced.

    Raises:
        InputError: a network of another kind, or no stock scheduler is the table and one was insisted on.
    """
    inner, around = module_of(generator.denoiser), generator.pipeline
    assert isinstance(inner, Precond) and around is not None
    if not isinstance(inner.net, DiffusersNet):
        raise InputError(f"the network is a {type(inner.net).__name__}, expected the stock class of its pipeline")
    assert isinstance(around, DiffusersPipeline)
    index, pipeline, part = read_json(around.root / INDEX), around.class_name, around.part
    made = lay_scheduler(generator, table, around.scheduler_config, place / "scheduler", scheduler, pipeline)
    index["scheduler"] = ["diffusers", made.name] if made.stock else [CODE, made.name]
    index["_diffusers_version"] = diffusers_version()
    for name, folder in around.components().items():
        if name not in (part, "scheduler"):
            shutil.copytree(folder, place / name)
    network: Any = inner.net.model if dtype is None else copy.deepcopy(inner.net.model).to(dtype)
    network.save_pretrained(place / part, safe_serialization=True)
    write_text(place / INDEX, json.dumps(index, indent=2) + "\n")
    told = inner.net.needs.get("guidance")
    embedded = None if told is None else around.embedded_guidance
    code = () if made.stock else (f"scheduler/{CODE}.py",)
    return Laid(pipeline, part, made.steps, made.name, made.table, code, around.source, embedded, dtype)


def lay_custom(generator: Generator, table: Tableau, place: Path, scheduler: str, dtype: torch.dtype | None) -> Laid:
    """A generator with a network of fewstep's own: one file of code for the network, and one for the scheduler.

    Raises:
        InputError: it has a codec, a network that cannot be bundled, or a stock scheduler was insisted on.
    """
    inner = module_of(generator.denoiser)
    assert isinstance(inner, Precond)
    if generator.codec is not None:
        raise InputError("a network of fewstep's own with a latent space cannot be exported: only pixel models can")
    if scheduler == "stock":
        raise InputError(
            f"a {type(inner.net).__name__} is no class of diffusers, so that its pipeline brings code of its own: "
            "leave --scheduler at auto"
        )
    written = inner if dtype is None else copy.deepcopy(inner).to(dtype)
    made = TableauScheduler.from_tableau(
        table, path="edm", prediction_type="sample", start_std=generator.start_std(table)
    )
    write_custom_pipeline(written, made, place, classes=classes_of(generator))
    code = tuple(sorted(str(p.relative_to(place)) for p in place.rglob("*.py")))
    steps = len(made.timesteps)
    name = type(made).__name__
    return Laid("FewstepPipeline", "denoiser", steps, name, table, code, None, None, dtype, told_sigma=True)


@dataclass(frozen=True)
class Scheduled:
    """A scheduler as written: its class, its number of steps, what it does, and whether it is a stock one."""

    name: str
    steps: int
    table: Tableau
    stock: bool


def lay_scheduler(
    generator: Generator, table: Tableau, like: Mapping[str, Any], place: Path, wanted: str, pipeline: str
) -> Scheduled:
    """The stock scheduler that is the table, where there is one; the self-contained one otherwise.

    Raises:
        InputError: ``wanted`` is "stock" and there is none, or the table does not suit the model.
    """
    inner = module_of(generator.denoiser)
    assert isinstance(inner, Precond) and isinstance(inner.net, DiffusersNet)
    bare = pipeline in BARE
    std = generator.start_std(table)
    if pipeline.startswith("PixArt") and table.nfe == 1:
        # These pipelines then take the second of what step returns, which not every class has.
        like = {k: v for k, v in like.items() if k != "_class_name"}
    found = None
    if wanted != "tableau":
        found = stock_scheduler(
            table,
            like,
            start_std=std,
            pipeline_sigmas="linspace" if family_of(inner.net.config.class_name).passes_sigmas else None,
            eta=None if bare else 0.0,
            scaling=not bare,
        )
    if found is None and wanted == "stock":
        raise InputError(
            f"no stock scheduler of diffusers does what {table.name!r} does: leave --scheduler at auto, which ships one"
        )
    if found is None:
        made = TableauScheduler.from_tableau(table, like, start_std=std)
        save_scheduler(made, place)
        return Scheduled("TableauScheduler", len(made.timesteps), table, stock=False)
    config, steps = found
    kind = diffusers_class(config["_class_name"])
    kind.from_config({k: v for k, v in config.items() if k != "_class_name"}).save_pretrained(place)
    return Scheduled(config["_class_name"], steps, _as_run(config, steps, table), stock=True)


def _as_run(config: Mapping[str, Any], steps: int, table: Tableau) -> Tableau:
    """The stock scheduler's own table, whose noises are mixed of its draws as it mixes them."""
    return table if not table.noisy else trace(dict(config), steps=steps)


def diffusers_version() -> str:
    """Of the installed one."""
    import diffusers

    return str(diffusers.__version__)
