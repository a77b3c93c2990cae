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
from fewstep.guide import CFG, guided
from fewstep.models.diffusers import DiffusersNet, diffusers_class, family_of
from fewstep.sources.diffusers_files import UNUSED, pick_variant, quiet
from fewstep.sources.diffusers_files import _variant_of as variant_of
from fewstep.sources.diffusers_pipeline import DiffusersPipeline, open_diffusers
from fewstep.tracing import trace

INDEX = "model_index.json"
# These neither scale their latents by init_noise_sigma nor pass eta on.
BARE = frozenset({"DDPMPipeline", "DiTPipeline"})
# Weights that are not safetensors: pickles, which nobody should have to open, and other runtimes' copies.
FOREIGN = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".pb", ".onnx", ".onnx_data", ".xml", ".gguf"}
)


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
        dtype: of the network's weights as written; None for those of the generator.
        told_sigma: whether the network is told sigma itself, not the model's own time.
        left_out: components of the source that the folder lacks, because they hold pickles or were not there.
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
    left_out: tuple[str, ...] = ()

    @property
    def remote_code(self) -> bool:
        """Whether it opens only with ``trust_remote_code=True``."""
        return bool(self.code)

    def checked(self, generator: Generator) -> Generator:
        """The generator as it will be read: its weights rounded as they were written, all else too in float32."""
        return in_float32(generator, self.dtype)


def in_float32(generator: Generator, rounded: torch.dtype | None = None) -> Generator:
    """The generator with network, autoencoder and text encoders in float32, its network ``rounded`` to a dtype before.

    The one given is left as it is; it is returned where nothing has to change.
    """
    inner, around = module_of(generator.denoiser), generator.pipeline
    assert isinstance(inner, Precond)
    half = isinstance(around, DiffusersPipeline) and around.dtype != "float32"
    wide = all(p.dtype == torch.float32 for p in inner.parameters())
    if rounded in (None, torch.float32) and wide and not half:
        return generator
    network: Precond = copy.deepcopy(inner)
    with quiet():
        network.to(rounded).float() if rounded is not None else network.float()
    made, D = replace(generator, denoiser=network), generator.denoiser
    if half:
        assert isinstance(around, DiffusersPipeline)
        # From the files, which may hold more digits than were read.
        said = {**around.describe(), "source": str(around.root), "revision": None, "dtype": "float32"}
        whole = open_diffusers(said, around.device)
        made = replace(made, pipeline=whole, codec=whole.codec, conds=whole.conds)
    if not isinstance(D, CFG):
        return made
    if half:
        return guided(made, D.scale, str(getattr(D, "negative", "")))
    return replace(made, denoiser=CFG(network, D.scale, D.nulls, str(getattr(D, "negative", ""))))


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
    left_out = copy_components(around, place, index)
    network: Any = inner.net.model
    with quiet():
        network = network if dtype is None else copy.deepcopy(network).to(dtype)
        network.save_pretrained(place / part, safe_serialization=True)
    write_text(place / INDEX, json.dumps(index, indent=2) + "\n")
    code = () if made.stock else (f"scheduler/{CODE}.py",)
    told = embedded_guidance(generator)
    return Laid(pipeline, part, made.steps, made.name, made.table, code, around.source, told, dtype, left_out=left_out)


def embedded_guidance(generator: Generator) -> float | None:
    """The guidance that the network of a stock pipeline is told; None where it is told none."""
    inner, around = module_of(generator.denoiser), generator.pipeline
    known = isinstance(inner, Precond) and isinstance(inner.net, DiffusersNet) and "guidance" in inner.net.needs
    return around.embedded_guidance if known and isinstance(around, DiffusersPipeline) else None


def copy_components(around: DiffusersPipeline, place: Path, index: dict[str, Any]) -> tuple[str, ...]:
    """Copies all but network and scheduler, and takes out of ``index`` what could not be copied; returns its names.

    Raises:
        InputError: a component that the pipeline needs has no safetensors, or a place that cannot be written.
    """
    left_out, there = [], around.components()
    for name in around.parts:
        if name in (around.part, "scheduler"):
            continue
        # A safety checker is often there as a pickle alone, or was not downloaded: pipelines run without one.
        if name not in there or (name in UNUSED and _only_foreign(there[name])):
            left_out.append(name)
            index[name] = [None, None]
        else:
            copy_component(there[name], place / name, around.variant)
    if "safety_checker" in left_out:
        index["requires_safety_checker"] = False
    return tuple(left_out)


def _only_foreign(folder: Path) -> bool:
    names = [p.name for p in folder.iterdir()]
    return any(Path(n).suffix in FOREIGN for n in names) and all(variant_of(n) is False for n in names)


def copy_component(source: Path, target: Path, variant: str | None = None) -> None:
    """Copies one component: its small files, and one variant of its weights under the plain names.

    So the copy opens without ``variant=``, whatever the source needs. Links, as in the Hub's cache, become files;
    pickles and other runtimes' weights stay behind.

    Raises:
        InputError: no safetensors where there are other weights, a missing shard, or a place that cannot be written.
    """
    files = {p.name: p for p in sorted(source.iterdir()) if p.is_file() and not p.name.startswith(".")}
    kinds = {name: variant_of(name) for name in files}
    chosen = None
    if _only_foreign(source) or any(kind is not False for kind in kinds.values()):
        chosen, _ = pick_variant(source, variant if variant in kinds.values() else None)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            if (kinds[name] is False and Path(name).suffix in FOREIGN) or kinds[name] not in (False, chosen):
                continue
            if kinds[name] is False or chosen is None:
                shutil.copyfile(file, target / name)
            elif name.endswith(".json"):
                body = read_json(file)
                body["weight_map"] = {k: _plain_name(v, chosen) for k, v in body["weight_map"].items()}
                write_text(target / _plain_name(name, chosen), json.dumps(body, indent=2) + "\n")
            else:
                shutil.copyfile(file, target / _plain_name(name, chosen))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}: free some space") from None


def _plain_name(name: str, variant: str) -> str:
    return name.replace(f".{variant}", "", 1)


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
