"""The search for a stock scheduler: what it finds is the table, and the traps of stock schedulers do not pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.grid import discrete, karras
from fewstep.solve import build, consistency, dpmpp2m, euler

diffusers = pytest.importorskip("diffusers")
from fewstep.export.stock import stock_scheduler  # noqa: E402

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LIKE = {"_class_name": "PNDMScheduler", "prediction_type": "epsilon", **BETAS}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
UNIT = math.hypot(1.0, 14.6146)


def at(*indices: int) -> Tensor:
    """Levels of the trained table, and 0."""
    kept = diffusers.DDPMScheduler(**BETAS).alphas_cumprod.double()[list(indices)]
    return torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.float64)])


def flow_levels(steps: int, shift: float) -> Tensor:
    t = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    t = shift * t / (1 + (shift - 1) * t)
    return torch.cat([t / (1 - t).clamp(min=1e-8), torch.zeros(1, dtype=torch.float64)])


def found(table: Tableau, like: Any = LIKE, **options: Any) -> tuple[str, dict[str, Any], int, Any]:
    """Name, config and steps, and the scheduler as the pipeline would set it."""
    answer = stock_scheduler(table, like, **options)
    assert answer is not None
    config, steps = answer
    made = getattr(diffusers, config["_class_name"]).from_config(config)
    pushed = options.get("pipeline_sigmas") == "linspace"
    if pushed:
        made.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        made.set_timesteps(steps)
    return config["_class_name"], config, steps, made


@pytest.mark.parametrize(("steps", "told"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_a_student_that_renoises(steps: int, told: list[int]) -> None:
    name, config, count, made = found(consistency(discrete(steps, 0.0292, 14.6146)), start_std=UNIT)
    assert (name, count, config["original_inference_steps"]) == ("LCMScheduler", steps, steps)
    assert made.timesteps.tolist() == told
    assert config["clip_sample"] is False and config["prediction_type"] == "epsilon" and config["beta_end"] == 0.012


def test_the_default_grid_of_the_consistency_scheduler_is_another() -> None:
    name, config, _, made = found(consistency(at(999, 759, 499, 259)), start_std=UNIT)
    assert name == "LCMScheduler" and config["original_inference_steps"] == 50
    assert made.timesteps.tolist() == [999, 759, 499, 259]


def test_a_student_at_a_level_that_no_stock_grid_starts_at() -> None:
    assert stock_scheduler(consistency(at(399)), LIKE, start_std=math.hypot(1, float(at(399)[0]))) is None


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_ode_students_start_at_the_top_and_never_at_0(steps: int) -> None:
    table = euler(discrete(steps, 0.0292, 14.6146))
    name, config, count, made = found(table, start_std=UNIT, scaling=False)
    assert made.timesteps[0] == 999 and count == steps
    if steps > 1:
        assert name == "DDIMScheduler" and config["timestep_spacing"] == "trailing" and config["set_alpha_to_one"]
    # The default spacing would feed pure noise at time 0.
    default = diffusers.DDIMScheduler(**BETAS)
    default.set_timesteps(1)
    assert default.timesteps.tolist() == [0]


def test_the_start_decides_between_schedulers() -> None:
    table = euler(discrete(4, 0.0292, 14.6146))
    assert found(table, start_std=UNIT)[0] == "DDIMScheduler"
    assert found(table)[0] == "EulerDiscreteScheduler"
    # Pipelines that neither scale their start nor the network's input cannot use the latter.
    assert stock_scheduler(table, LIKE, scaling=False, eta=None) is None
    assert stock_scheduler(consistency(discrete(4, 0.0292, 14.6146)), LIKE) is None


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("dpmpp2m", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("heun", "HeunDiscreteScheduler"),
    ],
)
def test_solvers(solver: str, name: str) -> None:
    std = None if solver == "heun" else UNIT
    kind, config, steps, _ = found(build(solver, discrete(6, 0.0292, 14.6146)), start_std=std)
    assert (kind, config["timestep_spacing"], steps) == (name, "trailing", 6)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1},
        {"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "fixed_large"},
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "timestep_spacing": "trailing"},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
    ],
)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_traced_tables_are_found_again(config: dict[str, Any], kind: str) -> None:
    given = {**config, **BETAS, "prediction_type": kind}
    table = fewstep.trace(given, steps=5)
    like = {**LIKE, "prediction_type": kind}
    name, again, steps, _ = found(table, like)
    assert steps == 5 and again["prediction_type"] == kind
    assert fewstep.trace(again, steps=5).rows == table.rows
    assert name == config["_class_name"] or config["_class_name"].startswith("Euler")
    # The scheduler itself, asked first.
    assert found(table, given)[0] == config["_class_name"]


def test_tcd_needs_the_eta_that_the_pipeline_passes() -> None:
    table = fewstep.trace({"_class_name": "TCDScheduler", **BETAS}, steps=4, eta=0.3)
    assert stock_scheduler(table, LIKE) is None
    assert found(table, eta=0.3)[0] == "TCDScheduler"
    assert found(table, eta=None)[0] == "TCDScheduler"


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_students_in_a_pipeline_that_passes_its_sigmas(steps: int, shift: float) -> None:
    levels = flow_levels(steps, shift)
    name, config, count, made = found(euler(levels), FLOW, pipeline_sigmas="linspace")
    assert name == "FlowMatchEulerDiscreteScheduler" and count == steps
    # Shifted once, and not a second time: the times are those of the table.
    wanted = (1000 * levels / (1 + levels))[:-1]
    assert torch.allclose(made.timesteps.double(), wanted, atol=1e-3)
    assert config["shift"] == (shift if steps > 1 else 1.0) and config["use_dynamic_shifting"] is False
    _, noisy, _, _ = found(consistency(levels), FLOW, pipeline_sigmas="linspace")
    assert noisy["stochastic_sampling"] is (steps > 1)


def test_flow_students_in_a_pipeline_that_passes_nothing() -> None:
    # The scheduler's own grid ends at a shifted 1/1000: no linspace(1, 1/N, N) is that grid.
    assert stock_scheduler(euler(flow_levels(4, 3.0)), FLOW) is None
    table = fewstep.trace({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, steps=4)
    assert found(table, FLOW)[1]["shift"] == 3.0
    assert stock_scheduler(table, FLOW, pipeline_sigmas="linspace") is None


def test_what_no_stock_scheduler_is() -> None:
    for table in (
        euler(torch.tensor([14.6, 5.0, 2.0, 0.7, 0.0])),
        build("ipndm", discrete(6, 0.0292, 14.6146)),
        dpmpp2m(karras(7, 0.05, 12.0)),
    ):
        assert stock_scheduler(table, LIKE, start_std=math.hypot(1, table.start)) is None


def test_a_silent_row_that_changes_nothing_is_no_difference() -> None:
    """The comparison is of what the rows do, not of how they are written."""
    levels = [14.6146, 1.0, 0.0]
    silent = Tableau([14.6146, math.nan], levels, [[0.06], [0.0]], [[0.94, 0.0], [0.0, 1.0]], [[0.0], [0.0]])
    assert found(silent, start_std=UNIT)[2] == 1


@pytest.mark.parametrize(
    ("table", "like", "options", "message"),
    [
        ("euler", LIKE, {}, "stock_scheduler takes a table, got a str"),
        (euler(karras(4, 0.002, 10.0)), LIKE, {}, "this model knows 0.029168 to 14.615"),
        (euler(at(999)), {"_class_name": "DDIMScheduler"}, {}, "has no betas"),
        (euler(at(999)), 3, {}, "like must be a scheduler of diffusers or its config, got int"),
        (euler(at(999)), {"_class_name": "EDMEulerScheduler"}, {}, "preconditions the network"),
        (euler(at(999)), LIKE, {"tolerance": 0.0}, "tolerance must be between 0 and 1, got 0.0"),
    ],
)
def test_bad_input(table: Any, like: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stock_scheduler(table, like, **options)
