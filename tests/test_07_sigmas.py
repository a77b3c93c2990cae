"""Lists of levels for other tools: what they hold, how they are interpolated, and what the command says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.cli.export_sampler import ExportSampler
from fewstep.core.path import FLOW
from fewstep.core.solver import SOLVERS
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.export.sigmas import as_text, plain_sampler, rounded_times, sigma_list, step_levels
from fewstep.grid import ays, discrete, karras
from fewstep.solve import build, consistency, dpmpp2m, euler

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PURE = torch.tensor([1e8, 3.0, 1.0, 0.25, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_list_of_a_solver_is_its_grid(name: str) -> None:
    grid = karras(6, 0.03, 14.6)
    assert torch.equal(sigma_list(build(name, grid)), grid)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_the_list_of_a_traced_scheduler_of_two_calls(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {"_class_name": name, **BETAS, "timestep_spacing": "trailing"}
    levels = step_levels(fewstep.trace(config, steps=5))
    stock = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    stock.set_timesteps(5)
    assert torch.allclose(levels, stock.sigmas.double(), rtol=1e-5)


def test_steps_are_interpolated_as_published() -> None:
    published = euler(ays(10, 0.029, 14.615, to_zero=False))
    for steps in (5, 7, 10, 20):
        assert torch.allclose(sigma_list(published, steps=steps), ays(steps, 0.029, 14.615), rtol=1e-12)
    table = euler(karras(8, 0.03, 14.6))
    for steps in (1, 2, 5, 30):
        made = sigma_list(table, steps=steps)
        assert len(made) == steps + 1 and made[0] == 14.6 and made[-1] == 0
        assert steps == 1 or float(made[-2]) == pytest.approx(0.03)
        assert bool((made.diff() < 0).all())


def test_flow_times() -> None:
    t = sigma_list(euler(PURE), path=FLOW)
    assert t.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.2, 0.0], abs=1e-7)
    raw = sigma_list(euler(PURE), path=FLOW(shift=3.0))[:-1]
    # What a tool that shifts by 3 makes of them are the times again.
    assert torch.allclose(3 * raw / (1 + 2 * raw), t[:-1])


def test_texts() -> None:
    table = euler(karras(3, 0.03, 14.6))
    values = [float(f"{v:.6g}") for v in sigma_list(table).tolist()]
    assert [float(v) for v in as_text(table, "text").split()] == values
    line = as_text(table, "comfyui")
    assert line.count("\n") == 1 and [float(v) for v in line.split(",")] == values
    body = json.loads(as_text(table, "json"))
    assert body["sigmas"] == values and body["steps"] == 3 and body["kind"] == "sigma"
    assert body["nearest"] == {"comfyui": "euler", "diffusers": "EulerDiscreteScheduler"}
    assert as_text(table, "diffusers", times=[999.0, 400.2, 10.0]).startswith("timesteps=[999, 400, 10]\nsigmas=[14.6,")
    flow = json.loads(as_text(euler(PURE), "json", path=FLOW(shift=3.0)))
    assert flow["kind"] == "flow time" and flow["shift"] == 3.0 and flow["sigmas"][0] == 1.0
    assert as_text(euler(PURE), "diffusers", path=FLOW) == "sigmas=[1.0, 0.75, 0.5, 0.2]\n"


def test_rounded_times_stay_distinct() -> None:
    assert rounded_times([999.0, 500.4, 500.3, 499.6, 2.0]) == ([999, 500, 499, 498, 2], [499, 498])
    with pytest.raises(InputError, match="do not fit on different whole numbers"):
        rounded_times([1.0, 0.6, 0.2])


@pytest.mark.parametrize("name", ["euler", "dpmpp2m", "unipc", "heun", "consistency", "dpmpp2m_sde", "euler_ancestral"])
def test_a_solver_is_its_own_nearest(name: str) -> None:
    told = plain_sampler(build(name, karras(6, 0.03, 14.6)))
    assert told.name == name and told.apart < 1e-9
    assert told.best_error <= told.table_error or build(name, karras(6, 0.03, 14.6)).noisy


def test_a_list_loses_the_weights_of_a_fitted_table() -> None:
    table = dpmpp2m(karras(6, 0.03, 14.6))
    changed = Tableau(
        table.sigmas, table.levels, 0.9 * table.P, table.W + 0.05 * (table.W != 0), table.Z, name="fitted"
    )
    told = plain_sampler(changed)
    assert told.apart > 0.01 and told.table_error > 0.01 and told.best_error > 0


def write(tmp_path: Path, table: Tableau) -> Path:
    file = tmp_path / "table.json"
    file.write_text(table.to_json())
    return file


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = write(tmp_path, dpmpp2m(discrete(6, 0.0292, 14.6146)))
    like = tmp_path / "scheduler_config.json"
    like.write_text(json.dumps({"_class_name": "DDIMScheduler", **BETAS}))
    ExportSampler(place, "comfyui", steps=4).run()
    out, told = capsys.readouterr()
    assert out.startswith("14.6146, ") and out.endswith(", 0\n") and out.count(",") == 4
    told = " ".join(told.split())
    assert "the nearest sampler is dpmpp2m (ComfyUI: dpmpp_2m" in told and "results differ by 0;" in told
    assert "interpolated to 4 steps" in told
    pytest.importorskip("diffusers")
    ExportSampler(place, "diffusers", like=like, out=tmp_path / "out.txt").run()
    assert (tmp_path / "out.txt").read_text().startswith("timesteps=[999, 832, 666, 499, 332, 166]\nsigmas=[14.6146,")
    close = write(tmp_path, euler(torch.tensor([14.6, 14.59, 1.0, 0.0])))
    ExportSampler(close, "diffusers", like=like, out=tmp_path / "close.txt").run()
    assert (tmp_path / "close.txt").read_text().startswith("timesteps=[999, 998, ")
    assert "were moved down" in " ".join(capsys.readouterr().err.split())
    ExportSampler(write(tmp_path, consistency(PURE)), "text", flow=True).run()
    out, told = capsys.readouterr()
    assert out.split() == ["1", "0.75", "0.5", "0.2", "0"] and "the table adds noise" in " ".join(told.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow_shift": 3.0}, "--flow-shift 3 is for flow models"),
        ({"flow": True, "flow_shift": -1.0}, "--flow-shift must be positive, got -1"),
        ({"format": "diffusers"}, "pass --like with the pipeline's scheduler_config.json"),
        ({"like": Path("c.json")}, "--like is for --format diffusers"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"out": Path(__file__)}, "exists: choose another --out"),
        ({"sampler": Path("nowhere.json")}, "nowhere.json does not exist"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given = {"sampler": write(tmp_path, euler(karras(4, 0.03, 14.6))), **options}
    with pytest.raises(InputError, match=message):
        ExportSampler(**given).run()


def test_more_bad_input() -> None:
    with pytest.raises(InputError, match="unknown format 'yaml'"):
        as_text(euler(PURE), "yaml")
    with pytest.raises(InputError, match="a list of sigmas is made of a table, got a str"):
        sigma_list("euler")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="too few to make 3 different ones"):
        sigma_list(euler(torch.tensor([14.6, 0.0])), steps=3)
