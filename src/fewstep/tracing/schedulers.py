"""Schedulers of diffusers, driven as a pipeline drives them, in the coordinates ``x = x0 + sigma n``.

For each call the denoiser's output is turned into the network output that would mean the same to the scheduler, so
that what a table weighs is always the denoiser, whatever the network predicts.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.state import read_json
from fewstep.errors import InputError, unknown
from fewstep.tracing.coordinates import SCHEDULERS, Family, Spot
from fewstep.tracing.unit import Source, Tap

_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "thresholding": (bool, "rescales x0 by its own values: set thresholding=False"),
    "clip_sample": (bool, "clips x0: set clip_sample=False"),
    "clip_denoised": (bool, "clips x0: set clip_denoised=False"),
    "invert_sigmas": (bool, "runs from data to noise in a time of its own: set invert_sigmas=False"),
    "scale_factors": (bool, "changes the size of the state between steps: set scale_factors=None"),
    "solver_p": (lambda v: v is not None, "nests another scheduler: set solver_p=None"),
}


def looks_like_a_scheduler(value: object) -> bool:
    """Whether a value is an instance, a configuration, or the file, folder or class name of a scheduler."""
    if isinstance(value, str | Path | Mapping):
        return True
    return all(hasattr(value, name) for name in ("config", "set_timesteps", "step"))


def scheduler_config(value: Any, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of a scheduler, with ``_class_name``: from an instance, a mapping, a file, a folder or a name.

    ``changes`` replace entries of it.

    Raises:
        InputError: no such file, no configuration of a scheduler, a class that cannot be traced, diffusers is missing,
            or a change of an option that the class does not have.
    """
    if isinstance(value, str | Path):
        config = {"_class_name": str(value)} if str(value) in SCHEDULERS else read_json(_config_file(Path(value)))
    elif isinstance(value, Mapping):
        config = dict(value)
    else:
        config = {**value.config, "_class_name": type(value).__name__}
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise InputError(f"a scheduler's configuration names its class in _class_name, got the keys {sorted(config)}")
    if name not in SCHEDULERS:
        raise unknown("scheduler class", name, SCHEDULERS)
    if changes:
        takes = set(inspect.signature(_class(name).__init__).parameters) - {"self", "kwargs"}
        for key in changes:
            if key not in takes:
                raise unknown(f"option of {name}", key, takes)
    return {**config, **(changes or {})}


def _config_file(path: Path) -> Path:
    places = (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json", path)
    found = next((p for p in places if p.is_file()), None)
    if found is not None:
        return found
    if not path.exists() and path.suffix == "" and len(path.parts) == 1:
        raise InputError(f"{unknown('scheduler class', str(path), SCHEDULERS)}; or the path of a scheduler_config.json")
    raise InputError(f"{path} is no scheduler_config.json, nor a folder that holds one")


def scheduler_source(value: Any, steps: int | None, sigmas: Any, options: dict[str, Any]) -> Source:
    """A scheduler as a source.

    ``options`` go to ``set_timesteps`` or ``step``, whichever takes them; ``sigmas`` are in the scheduler's own time.

    Raises:
        InputError: diffusers is missing, an option makes the scheduler non-linear, or it refuses what it was given.
    """
    config = scheduler_config(value)
    name = config["_class_name"]
    if steps is None and sigmas is None and "timesteps" not in options:
        raise InputError(f"{name} needs its number of steps: trace(scheduler, steps=20)")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r}")
    kind = type(value) if hasattr(value, "step") else _class(name)
    schedule, stepping = _sort_options(kind, name, steps, sigmas, options)
    family = SCHEDULERS[name]

    with _complaints_of(name):
        made = kind.from_config({k: v for k, v in config.items() if k != "_class_name"})
        _refuse(made, name)
        made.set_timesteps(**schedule)
        first = copy.deepcopy(made)
        opening = _prepared(first, first.timesteps[0], family)
        start_scale, start = family.start(first) if family.start else (opening.scale, opening.sigma)
        end_scale, end = family.end(first)
        start_std = float(getattr(first, "init_noise_sigma", 1.0)) / start_scale

    def run(tap: Tap, x: Tensor) -> Tensor:
        with _complaints_of(name):
            # Copied, because a scheduler keeps its place and its history, and some are slow to make.
            scheduler = copy.deepcopy(made)
            if hasattr(scheduler, "noise_sampler"):
                scheduler.noise_sampler = tap.brownian
            sample = start_scale * x
            for t in scheduler.timesteps:
                spot = _prepared(scheduler, t, family, sample)
                x0 = tap.evaluate(sample / spot.scale, spot.sigma)
                output = spot.on_x * sample + spot.on_x0 * x0
                sample = scheduler.step(output, t, sample, return_dict=False, **stepping)[0]
        return sample / end_scale

    meta = {
        "form": "diffusers",
        "diffusers": import_module("diffusers").__version__,
        "scheduler": name,
        "config": _plain({k: v for k, v in first.config.items() if not k.startswith("_")}),
        "options": _plain({**schedule, **stepping}),
        "start_std": start_std,
    }
    return Source(f"{name}-{len(first.timesteps)}", start, end, run, 1e-4, meta)


def _prepared(scheduler: Any, t: Tensor, family: Family, sample: Tensor | None = None) -> Spot:
    """The spot of the coming call; a scheduler that scales the network's input finds its step on being asked to."""
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(torch.zeros(1, 1, 1, 1) if sample is None else sample, t)
    if hasattr(scheduler, "_init_step_index") and scheduler.step_index is None:
        scheduler._init_step_index(t)
    return family.spot(scheduler, t)


def _class(name: str) -> Any:
    try:
        diffusers = import_module("diffusers")
    except ModuleNotFoundError:
        raise InputError(f"{name} is a class of diffusers, which is not installed: pip install 'fewstep[hf]'") from None
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise InputError(f"diffusers {diffusers.__version__} has no {name}: install a version that does")
    missing = [b for b in getattr(kind, "_backends", ()) if b != "torch" and not _installed(b)]
    if missing:
        raise InputError(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return kind


def _installed(module: str) -> bool:
    try:
        import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def _sort_options(
    kind: Any, name: str, steps: int | None, sigmas: Any, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments of ``set_timesteps`` and of ``step``."""
    takes = inspect.signature(kind.set_timesteps).parameters
    steers = set(inspect.signature(kind.step).parameters) - {
        "self",
        "model_output",
        "timestep",
        "sample",
        "return_dict",
        "generator",
        "variance_noise",
        "per_token_timesteps",
        "pred_original_sample",
    }
    schedule: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    if sigmas is not None:
        values = [float(s) for s in sigmas]
        schedule["sigmas"] = torch.tensor(values) if name == "EDMEulerScheduler" else values
    stepping: dict[str, Any] = {}
    for key, option in options.items():
        if key in steers:
            stepping[key] = option
        else:
            schedule[key] = option
    for key in schedule:
        if key not in takes or key in ("device", "num_train_timesteps"):
            raise unknown(f"option of {name}", key, {*takes, *steers} - {"self", "device", "num_train_timesteps"})
    return schedule, stepping


def _refuse(scheduler: Any, name: str) -> None:
    """Raises InputError for an option of the configuration that no table can hold."""
    for option, (applies, why) in _REFUSED.items():
        if applies(scheduler.config.get(option)):
            raise InputError(f"{name} with {option}={scheduler.config[option]!r} {why}")
    learned = scheduler.config.get("variance_type")
    if name.startswith("DDPM") and learned in ("learned", "learned_range"):
        raise InputError(f"{name} with variance_type={learned!r} scales its noise by a network: set fixed_small")


@contextmanager
def _complaints_of(name: str) -> Iterator[None]:
    """Turns a scheduler's own complaint into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AssertionError, NotImplementedError, ArithmeticError) as error:
        raise InputError(f"{name} refuses this: {str(error) or type(error).__name__}") from error


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as JSON values; infinities as text, because JSON has none."""

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _plain(value)
        if isinstance(value, list | tuple):
            return [one(v) for v in value]
        if hasattr(value, "tolist"):
            return one(value.tolist())
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value if isinstance(value, str | int | float | None) else str(value)

    return {str(k): one(v) for k, v in values.items()}
