"""Opening a diffusers pipeline, from a folder or the Hub, as a generator."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.core.denoiser import Precond
from fewstep.core.generator import Generator, check_device
from fewstep.core.path import FLOW, PURE_NOISE, TRIG, DDPMPath
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.models.diffusers import DTYPES, DiffusersConfig, DiffusersNet, diffusers_class
from fewstep.models.libraries import opening, quiet
from fewstep.sources.checkpoint import check_dtype
from fewstep.sources.diffusers_files import load_part, pick_variant, plain, read_json
from fewstep.sources.diffusers_parts import part_config
from fewstep.sources.diffusers_pipeline import DiffusersPipeline
from fewstep.sources.exported import carried, exported_steps
from fewstep.sources.text import Prompts
from fewstep.tracing import SCHEDULERS, scheduler_config, trace

SCHEDULER = "scheduler/scheduler_config.json"
PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
_PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_UNSUPPORTED = ("CMStochasticIterativeScheduler", "CosineDPMSolverMultistepScheduler", "IPNDMScheduler")
# What no table can hold, and what it is set to instead.
_OFF: dict[str, Any] = {"clip_sample": False, "thresholding": False}


def load_diffusers(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    steps: int | None = None,
    size: int | tuple[int, int] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    prompts: Prompts | None = None,
    embedded_guidance: float = 3.5,
    tiled: bool = False,
    token: str | bool | None = None,
    base: str | Path | None = None,
    local_files_only: bool | None = None,
) -> Generator:
    """A diffusers pipeline as a generator: its network as a denoiser, its scheduler as a table, the rest on demand.

    Args:
        source: a folder with model_index.json, or a Hub id; with ``base``, also the folder of a network alone.
        device: where everything goes.
        dtype: of all weights; None is float32, as in diffusers.
        steps: of the default sampler; None is the pipeline's own default.
        size: of the pictures in pixels, or (height, width); None is what the network was made for.
        variant: of the weight files, such as "fp16"; components without it have their plain files read.
        revision: a branch, tag or commit of the Hub id.
        prompts: what conditions are drawn from when none are given: a list, or a text file with one per line.
        embedded_guidance: the scale told to networks that take guidance as an input.
        tiled: decode in tiles, one picture at a time, for large pictures.
        token: for private Hub ids.
        base: a pipeline, folder or Hub id, that everything but the network is taken from.
        local_files_only: never ask the network; None follows HF_HUB_OFFLINE.

    Raises:
        InputError: there is no such pipeline, it is not whole, a class in it is not supported, its scheduler
            contradicts itself, or its weights are not those of its configuration.
    """
    here, name = check_device(device), _dtype_name(dtype)
    around = DiffusersPipeline(
        source if base is None else base,
        revision=revision,
        variant=variant,
        dtype=name,
        size=size,
        prompts=prompts,
        embedded_guidance=embedded_guidance,
        tiled=tiled,
        device=here,
        token=token,
        local_files_only=local_files_only,
    )
    scheduler, table = carried(around.scheduler_config)
    facts = _facts(around, scheduler)
    folder = around.root / around.part if base is None else _network_folder(source, around)
    found, notes = pick_variant(folder, variant)
    if table is not None and steps not in (None, table.nfe):
        raise InputError(f"{source} carries a sampler of {table.nfe} evaluations: it cannot take steps={steps}")
    own = exported_steps(around.root) if steps is None else steps
    sampler, more = (table, []) if table is not None else default_sampler(around, facts, own)
    model: Any = load_part(folder, around.parts[around.part], dtype=DTYPES[name], variant=found)
    net = DiffusersNet(DiffusersConfig(around.network_class, plain(model.config), name), model)
    sigma_data: dict[str, Any] = (
        {} if "sigma_data" in facts else {"sigma_data": 1.0 if around.codec is not None else 0.5}
    )
    denoiser = Precond(net, around.shape, **facts, **sigma_data).to(here).eval().requires_grad_(False)
    card = {
        "source": around.source if base is None else f"{source} on {around.source}",
        "pipeline": around.class_name,
        "network": around.network_class,
        "scheduler": around.parts["scheduler"].class_name,
        "notes": notes + more,
    }
    return Generator(denoiser, sampler, around.codec, around.conds, card, around)


def _facts(around: DiffusersPipeline, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`native` for a network of this family, told the time as its pipeline tells it."""
    facts = native(scheduler, around.root / SCHEDULER)
    if facts["path"] is FLOW:
        return {**facts, "time": around.family.flow_time}
    if around.family.flow:
        raise InputError(
            f"{around.network_class} is a flow model, its scheduler {scheduler['_class_name']} is not: put a "
            "FlowMatchEulerDiscreteScheduler in its place, or set use_flow_sigmas and prediction_type='flow_prediction'"
        )
    return facts


def _dtype_name(dtype: torch.dtype | str | None) -> str:
    name = str(check_dtype(dtype)).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype of a pipeline", name, DTYPES)
    return name


def _network_folder(source: str | Path, around: DiffusersPipeline) -> Path:
    """The folder of a network that takes the place of a base's own."""
    root = Path(source).expanduser()
    folder = next((p for p in (root / around.part, root) if (p / "config.json").is_file()), None)
    if folder is None:
        raise InputError(
            f"{source} holds no network for {around.source}: expected a folder with config.json and weights"
        )
    body = read_json(folder / "config.json")
    said = body.get("_class_name", around.network_class)
    wrong = []
    if said == around.network_class:
        config = part_config(folder.parent, folder.name, around.parts[around.part])
        same = ("in_channels", "out_channels", "cross_attention_dim")
        wrong = [k for k in same if config.get(k) != around.network_config.get(k)]
        wrong += [] if around.family.needs(config) == around.needs else ["conditions"]
    if said != around.network_class or wrong:
        raise InputError(
            f"{folder} does not fit the pipeline {around.source}: it is a {said}"
            + (f" with another {', '.join(wrong)}" if wrong else f", expected a {around.network_class}")
        )
    return folder


def native(config: Mapping[str, Any], place: str | Path = "this configuration") -> dict[str, Any]:
    """From a scheduler's configuration to what :class:`fewstep.core.denoiser.Precond` needs: path, prediction, levels.

    A variance-preserving model gets the scheduler's own table, where pure noise is the level 1e8 (some schedulers put a
    large finite level in its place, which is kept); a flow model the levels from its smallest trained time to 1e8.
    ``place`` is its file, for messages.

    Raises:
        InputError: an unknown scheduler, one without a Gaussian path, or a prediction type that contradicts it.
    """
    name = scheduler_config(config)["_class_name"]
    if name in _UNSUPPORTED:
        good = ", ".join(sorted(set(SCHEDULERS) - set(_UNSUPPORTED)))
        raise InputError(f"{name} does not say how its network is trained: choose one of {good}")
    made = _made(config, place)
    said = config.get("prediction_type", made.config.get("prediction_type"))
    if name.startswith("FlowMatch") or made.config.get("use_flow_sigmas") or said == "flow_prediction":
        return _flow(name, made, said)
    if said not in PREDICTIONS:
        raise unknown(f"prediction_type of {name}", str(said), [*PREDICTIONS, "flow_prediction"])
    if name in _PRECONDITIONED:
        return _preconditioned(made, str(said))
    path, levels = _table(made, place)
    return {"path": path, "predicts": PREDICTIONS[said], "time": "native", **levels}


def _made(config: Mapping[str, Any], place: str | Path) -> Any:
    """The scheduler itself, whose numbers of steps and betas make sense."""
    name = config["_class_name"]
    kind, count = diffusers_class(name), config.get("num_train_timesteps", 1000)
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise InputError(f"{place} has num_train_timesteps={count!r}, expected a whole number of at least 2")
    for key in ("beta_start", "beta_end"):
        value = config.get(key, 0.5)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(f"{place} has {key}={value!r}, expected a number between 0 and 1")
    betas = config.get("trained_betas")
    if betas is not None and (not isinstance(betas, list | tuple) or len(betas) != count):
        raise InputError(f"{place} has trained_betas={str(betas)[:40]!r}, expected {count} numbers between 0 and 1")
    with quiet(), opening(place, name):
        return kind.from_config({k: v for k, v in config.items() if k != "_class_name"})


def _table(made: Any, place: str | Path) -> tuple[DDPMPath, dict[str, Any]]:
    """The path of a table of betas, and the levels of its first and last step."""
    kept = made.alphas_cumprod.double().clamp(min=1 / (1 + PURE_NOISE**2))
    ratios = torch.cat([kept[:1], kept[1:] / kept[:-1]])
    try:
        path = DDPMPath(tuple((1 - ratios).tolist()))
    except InputError as error:
        raise InputError(f"{place} has no usable betas: {error}") from None
    low, high = float(path.levels[0]), float(path.levels[-1])
    # The last ratio of a table that ends in pure noise is so small that its level loses digits.
    high = PURE_NOISE if high > 0.99 * PURE_NOISE else high
    return path, {"sigma_min": low, "sigma_max": high, "unit_start": True}


def _flow(name: str, made: Any, said: str | None) -> dict[str, Any]:
    if said not in (None, "flow_prediction"):
        raise InputError(f"{name} is a flow with prediction_type={said!r}: it contradicts itself, set flow_prediction")
    if not name.startswith("FlowMatch") and not made.config.get("use_flow_sigmas"):
        raise InputError(f"{name} has prediction_type='flow_prediction' without flow levels: set use_flow_sigmas=True")
    smallest = 1 / int(made.config.num_train_timesteps)
    levels = {"sigma_min": smallest / (1 - smallest), "sigma_max": PURE_NOISE}
    return {"path": FLOW, "predicts": "velocity", "time": "native*1000", **levels}


def _preconditioned(made: Any, said: str) -> dict[str, Any]:
    """EDM's preconditioning (arXiv 2206.00364, table 1), with the sign of the output that v-prediction turns."""
    if said == "sample":
        raise InputError(f"{type(made).__name__} takes prediction_type 'epsilon' or 'v_prediction', got 'sample'")
    data = float(made.config.sigma_data)
    levels = {"sigma_min": float(made.config.sigma_min), "sigma_max": float(made.config.sigma_max)}
    scales = {"scale_in": 1 / data, "scale_out": data if said == "v_prediction" else -data, "sigma_data": data}
    return {"path": TRIG(data), "predicts": "velocity", "time": "log-sigma/4", **levels, **scales}


def default_sampler(
    around: DiffusersPipeline, facts: Mapping[str, Any], steps: int | None
) -> tuple[Tableau, list[str]]:
    """The pipeline's scheduler as a table, with the levels that the pipeline gives it, and remarks on what was changed.

    Raises:
        InputError: the scheduler refuses the number of steps, or an option of it is unknown.
    """
    config, notes = around.scheduler_config, []
    name = config["_class_name"]
    kind = diffusers_class(name)
    own = _made(config, around.root / SCHEDULER).config
    changes = {k: v for k, v in _OFF.items() if own.get(k)}
    if name.startswith("DDPM") and str(own.get("variance_type")).startswith("learned"):
        changes["variance_type"] = "fixed_small"
    notes += [
        f"{name}: {k}={own[k]!r} cannot be part of a table and is {v!r} in the sampler" for k, v in changes.items()
    ]
    count = pipeline_steps(around) if steps is None else steps
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {count!r}")
    takes = inspect.signature(kind.set_timesteps).parameters
    options: dict[str, Any] = {}
    if "mu" in takes and (around.family.passes_sigmas or own.get("use_dynamic_shifting")):
        options["mu"] = _mu(around, own)
    if around.family.passes_sigmas and "sigmas" in takes and not own.get("use_flow_sigmas"):
        options["sigmas"] = [1 - k * (1 - 1 / count) / max(1, count - 1) for k in range(count)]
    else:
        options["steps"] = count
    with quiet():
        try:
            table = trace({**config, **changes}, **options)
        except InputError as error:
            substitute = _substitute(own, facts)
            notes.append(f"{name} cannot be traced ({error}): {substitute['_class_name']} takes its place")
            try:
                return trace(substitute, steps=count), notes
            except InputError:
                where = around.root / SCHEDULER
                raise InputError(f"{where} gives no sampler of {count} steps: {error}") from None
        return table, notes + _rounded_times(kind.from_config({**config, **changes}), options, table, facts)


def _rounded_times(made: Any, options: Mapping[str, Any], table: Tableau, facts: Mapping[str, Any]) -> list[str]:
    """A remark if the scheduler tells the network other times than those of its levels, as whole numbers are."""
    schedule = {("num_inference_steps" if k == "steps" else k): v for k, v in options.items()}
    made.set_timesteps(**schedule)
    told, levels = made.timesteps.double(), table.sigmas[~table.sigmas.isnan()]
    path = facts["path"]
    if len(told) != len(levels) or not (path is FLOW or isinstance(path, DDPMPath)):
        return []
    exact = path.at(levels) * (1000 if path is FLOW else 1)
    gap = float((exact - told).abs().max())
    if gap < 0.01:
        return []
    return [
        f"{type(made).__name__} tells its network times that are up to {gap:.2g} (of 1000) away from those of its "
        "levels; here the network is told those of the levels"
    ]


def pipeline_steps(around: DiffusersPipeline) -> int:
    """The number of steps that the pipeline takes by default; 50 for a class that names none."""
    kind = diffusers_class(around.class_name)
    found = inspect.signature(kind.__call__).parameters.get("num_inference_steps")
    return found.default if found is not None and isinstance(found.default, int) else 50


def _mu(around: DiffusersPipeline, own: Mapping[str, Any]) -> float:
    """The shift of the time by the number of tokens, linear between two sizes (arXiv 2403.03206, section 5.3.2)."""
    patch = around.family.patch(around.network_config)
    tokens = (around.shape[1] // patch) * (around.shape[2] // patch)
    low, high = own.get("base_image_seq_len", 256), own.get("max_image_seq_len", 4096)
    first, last = own.get("base_shift", 0.5), own.get("max_shift", 1.15 if around.family.passes_sigmas else 1.16)
    wrong = [v for v in (low, high, first, last) if isinstance(v, bool) or not isinstance(v, int | float)]
    if wrong or low == high:
        raise InputError(
            f"{around.root / SCHEDULER} has base_image_seq_len={low!r}, max_image_seq_len={high!r}, "
            f"base_shift={first!r}, max_shift={last!r}: expected numbers, the first two not equal"
        )
    slope = (last - first) / (high - low)
    return float(tokens * slope + (first - slope * low))


def _substitute(own: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Euler or DDIM for a model whose own scheduler has no table."""
    path = facts["path"]
    if path is FLOW:
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": own.get("shift", own.get("flow_shift", 1.0))}
    if not isinstance(path, DDPMPath):
        levels = {"sigma_min": facts["sigma_min"], "sigma_max": facts["sigma_max"], "sigma_data": facts["sigma_data"]}
        return {"_class_name": "EDMEulerScheduler", **levels, "prediction_type": own["prediction_type"]}
    same = {k: own[k] for k in ("prediction_type", "timestep_spacing", "steps_offset") if k in own}
    count = {"num_train_timesteps": len(path.betas), "trained_betas": list(path.betas)}
    return {"_class_name": "DDIMScheduler", **count, **same, "clip_sample": False}
