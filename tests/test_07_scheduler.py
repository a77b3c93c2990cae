"""A table as a scheduler of diffusers: the same numbers as the library's own loop, alone and inside real pipelines."""

from __future__ import annotations

import ast
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.core.denoiser import Precond
from fewstep.core.noise import Noise
from fewstep.core.path import DDPM, EDM, FLOW
from fewstep.core.sample import sample
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError
from fewstep.grid import discrete, karras
from fewstep.solve import build, euler

diffusers = pytest.importorskip("diffusers")
from fewstep.export.scheduler import TableauScheduler, model_of, save_scheduler  # noqa: E402

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LIKE = {"_class_name": "DDIMScheduler", **BETAS}
FLOW_LIKE = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SHAPE, BATCH = (3, 4, 4), 2
KINDS = ("epsilon", "v_prediction", "sample", "flow", "edm")
SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {},
    "heun": {},
    "dpmpp2m": {},
    "dpmpp3m": {},
    "dpmpp2s": {},
    "dpmpp_sde": {},
    "dpmpp2m_sde": {},
    "unipc": {},
    "ipndm": {},
    "deis": {},
    "euler_ancestral": {},
    "consistency": {},
    "lms": {},
    "edm_stochastic": {"churn": 2.0, "s_max": 10.0},
}


class Net(nn.Module):
    """Non-linear in the state, and different at every time."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        t = time.reshape(-1, 1, 1, 1).to(x.dtype)
        return torch.tanh(1.3 * x + torch.sin(t / 300)) + 0.3 * x.roll(1, -1) * torch.cos(t / 500)


class Drawn(Noise):
    """The noises that a torch generator hands out, in the order in which a run asks for them."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.zeros(BATCH, dtype=torch.int64))
        object.__setattr__(self, "generator", torch.Generator().manual_seed(seed))

    def normal(self, shape: Any, *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn((BATCH, *shape), generator=self.__dict__["generator"], dtype=dtype)


def denoiser(kind: str) -> Precond:
    if kind == "flow":
        return Precond(Net(), SHAPE, path=FLOW, predicts="velocity", time="native*1000", sigma_max=1e8)
    if kind == "edm":
        return Precond(Net(), SHAPE, path=EDM, predicts="x0", time="sigma")
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    predicts: Any = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}[kind]
    return Precond(Net(), SHAPE, path=DDPM(tuple((roots**2).tolist())), predicts=predicts)


def scheduler(table: Tableau, kind: str) -> TableauScheduler:
    if kind == "edm":
        return TableauScheduler.from_tableau(table, path="edm")
    return TableauScheduler.from_tableau(table, FLOW_LIKE if kind == "flow" else {**LIKE, "prediction_type": kind})


def grid(kind: str) -> Tensor:
    if kind == "flow":
        return torch.tensor([1e8, 3.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    return karras(5, 0.002, 80.0) if kind == "edm" else discrete(5, 0.0292, 14.614)


def piped(made: Any, x: Tensor, seed: int = 3) -> Tensor:
    """What a pipeline does."""
    net, generator = Net(), torch.Generator().manual_seed(seed)
    made.set_timesteps(made.num_inference_steps)
    for t in made.timesteps:
        shown = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
        out = net(shown, t.expand(len(x)))
        x = made.step(out, t, x, generator=generator, return_dict=False)[0]
    return x


def start(seed: int = 0) -> Tensor:
    return torch.randn((BATCH, *SHAPE), generator=torch.Generator().manual_seed(seed))


def agree(table: Tableau, kind: str, tolerance: float = 1e-5) -> None:
    made = scheduler(table, kind)
    std = made.config["start_std"] or table.start
    wanted = sample(denoiser(kind), std * start(), table, noise=Drawn(3))
    for _repeat in range(2):
        got = piped(made, made.init_noise_sigma * start())
        assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_scheduler_is_its_table(name: str, kind: str) -> None:
    agree(build(name, grid(kind), **SOLVERS[name]), kind)


def test_a_fitted_table_with_all_outputs_and_a_silent_row() -> None:
    rng = np.random.default_rng(0)
    levels = [14.6, 4.0, 4.2, 1.1, 0.0]
    table = Builder(levels[0])
    table.row(14.6, 4.0, {0: 4 / 14.6}, {0: 1 - 4 / 14.6})
    # A silent row that rescales the point which the network is shown; the result leans on the point before it.
    table.row(None, 4.2, {1: 1.04}, {0: 0.02})
    table.row(4.1, 1.1, {1: 0.3}, {0: float(rng.normal()), 2: 0.7})
    table.row(1.1, 0.0, {3: 0.1}, {0: 0.05, 2: float(rng.normal()), 3: 0.9})
    for kind in ("epsilon", "v_prediction", "sample"):
        agree(table.build("fitted"), kind)


def test_silent_rows_before_the_first_call_change_the_start() -> None:
    table = Builder(14.0)
    table.row(None, 12.0, {0: 12.0 / 14.0}, {})
    table.row(12.0, 2.0, {1: 2 / 12.0}, {1: 1 - 2 / 12.0})
    table.row(2.0, 0.0, {0: 0.01}, {1: -0.2, 2: 1.2})
    agree(table.build("shown"), "epsilon")
    made = scheduler(table.build("shown"), "epsilon")
    assert made.init_noise_sigma == pytest.approx(12 / math.hypot(1, 12))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "trailing", **BETAS}, "epsilon"),
        ({"_class_name": "DDPMScheduler", "clip_sample": False, "prediction_type": "v_prediction"}, "v_prediction"),
        ({"_class_name": "LCMScheduler", **BETAS, "prediction_type": "sample"}, "sample"),
        ({"_class_name": "DPMSolverMultistepScheduler", **BETAS, "timestep_spacing": "trailing"}, "epsilon"),
        ({"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "trailing"}, "epsilon"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "flow"),
        (
            {
                "_class_name": "DDIMScheduler",
                **BETAS,
                "clip_sample": False,
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": True,
                "prediction_type": "v_prediction",
            },
            "v_prediction",
        ),
    ],
)
def test_a_traced_scheduler_and_its_table_give_the_same_picture(config: dict[str, Any], kind: str) -> None:
    stock = getattr(diffusers, config["_class_name"]).from_config(config)
    made = TableauScheduler.from_tableau(fewstep.trace(config, steps=5))
    stock.set_timesteps(5)
    assert made.timesteps.tolist() == pytest.approx(stock.timesteps.tolist(), abs=1e-3)
    assert (made.timesteps.dtype == torch.int64) == (kind != "flow")
    stock.num_inference_steps = 5
    wanted = piped(stock, getattr(stock, "init_noise_sigma", 1.0) * start())
    got = piped(made, made.init_noise_sigma * start())
    assert float((got - wanted).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
@pytest.mark.parametrize("begin", [1, 3])
def test_starting_in_the_middle(kind: str, begin: int) -> None:
    """A run from the middle is the sampler of the remaining levels."""
    levels = grid(kind)
    for name in ("euler", "dpmpp2m", "heun"):
        table = build(name, levels)
        made = scheduler(table, kind)
        call = next(i for i, s in enumerate(made._called) if s == float(levels[begin]))
        made.set_timesteps(made.num_inference_steps)
        made.set_begin_index(call)
        clean, noise = start(1), start(2)
        adding = made.scale_noise if kind == "flow" else made.add_noise
        t = made.timesteps[call : call + 1]
        x = adding(clean, t, noise) if kind == "flow" else adding(clean, noise, t)
        a = 1 / (1 + levels[begin]) if kind == "flow" else 1 / (1 + levels[begin] ** 2).sqrt()
        assert torch.allclose(x, (a * (clean + levels[begin] * noise)).float(), atol=1e-6)
        for now in made.timesteps[call:]:
            x = made.step(Net()(x, now.expand(BATCH)), now, x, return_dict=False)[0]
        # These solvers start at first order; Heun's trial point of the start's level is taken for the start itself.
        wanted = build(name, levels[begin:])(denoiser(kind), clean + float(levels[begin]) * noise)
        assert float((x - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_noisy_table_from_the_middle_keeps_its_noise() -> None:
    table = build("dpmpp2m_sde", grid("epsilon"))
    made = scheduler(table, "epsilon")
    made.set_begin_index(2)
    generator = torch.Generator().manual_seed(0)
    t = made.timesteps[2]
    # x0 = 0 at every call: what is left is noise alone, and the step must land on its level.
    level = float(table.levels[2])
    x = torch.randn(4000, 1, 1, 1, generator=generator) * level / math.hypot(1, level)
    x = made.step(x / (level / math.hypot(1, level)), t, x, generator=generator).prev_sample
    wanted = float(table.levels[3]) / math.hypot(1, float(table.levels[3]))
    assert float(x.std()) == pytest.approx(wanted, rel=0.04)


def test_half_precision_channels_and_batches() -> None:
    made = scheduler(build("dpmpp2m", grid("epsilon")), "epsilon")
    wanted = piped(made, made.init_noise_sigma * start())
    for dtype, allowed in ((torch.float16, 3e-3), (torch.bfloat16, 3e-2)):
        got = piped(made, (made.init_noise_sigma * start()).to(dtype))
        assert got.dtype == dtype
        assert float((got.float() - wanted).abs().max()) <= allowed * float(wanted.abs().max())
    made.set_timesteps(5)
    x = start()
    learned = torch.cat([x, 100 * torch.ones_like(x)], 1)
    plain = made.step(x, made.timesteps[0], x).prev_sample
    made.set_timesteps(5)
    assert torch.equal(made.step(learned, made.timesteps[0], x).prev_sample, plain)
    made.set_timesteps(5)
    one = made.step(x[:1], made.timesteps[0], x[:1]).prev_sample
    assert torch.equal(one, plain[:1])


def test_noises_that_no_row_weighs_are_not_drawn() -> None:
    made, generator = scheduler(build("consistency", grid("epsilon")), "epsilon"), torch.Generator().manual_seed(0)
    drawn = torch.Generator().manual_seed(0)
    x = made.init_noise_sigma * start()
    for t in made.timesteps:
        x = made.step(x, t, x, generator=generator).prev_sample
    for _ in range(len(made.timesteps) - 1):
        torch.randn((BATCH, *SHAPE), generator=drawn)
    assert torch.equal(generator.get_state(), drawn.get_state())


def test_adding_noise_at_any_time() -> None:
    made = scheduler(euler(grid("epsilon")), "epsilon")
    stock = diffusers.DDIMScheduler(**BETAS)
    times = torch.tensor([999, 7])
    assert torch.allclose(
        made.add_noise(start(), start(1), times), stock.add_noise(start(), start(1), times), atol=1e-5
    )
    flow = scheduler(euler(grid("flow")), "flow")
    wanted = 0.7 * start() + 0.3 * start(1)
    assert torch.allclose(flow.scale_noise(start(), torch.tensor([300.0, 300.0]), start(1)), wanted, atol=1e-6)


def test_round_trips(tmp_path: Path) -> None:
    made = scheduler(build("dpmpp3m", grid("v_prediction")), "v_prediction")
    wanted = piped(made, made.init_noise_sigma * start())
    made.save_pretrained(tmp_path / "a")
    again = TableauScheduler.from_pretrained(tmp_path / "a")
    for other in (again, TableauScheduler.from_config(made.config), TableauScheduler.from_config(again.config)):
        assert torch.equal(piped(other, other.init_noise_sigma * start()), wanted)
        assert other.timesteps.tolist() == made.timesteps.tolist()
    assert len(made) == 1000 and made.order == 1
    # A pipeline's user can go back to a stock scheduler.
    stock = diffusers.DDIMScheduler.from_config(made.config)
    assert stock.config.prediction_type == "v_prediction" and stock.config.beta_schedule == "scaled_linear"
    like = TableauScheduler.from_tableau(build("euler", grid("epsilon")), like=made)
    assert like.config["prediction_type"] == "v_prediction"


def test_the_file_runs_where_this_library_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = build("unipc", grid("epsilon"))
    save_scheduler(table, tmp_path, like=LIKE)
    made = scheduler(table, "epsilon")
    wanted = piped(made, made.init_noise_sigma * start())
    tree = ast.parse((tmp_path / "scheduling_fewstep.py").read_text())
    named = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    named += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert {name.partition(".")[0] for name in named} == {
        "math",
        "collections",
        "typing",
        "numpy",
        "torch",
        "diffusers",
    }
    for name in [m for m in sys.modules if m.partition(".")[0] == "fewstep"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fewstep", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    alone = importlib.import_module("scheduling_fewstep")
    other = alone.TableauScheduler.from_pretrained(tmp_path)
    assert torch.equal(piped(other, other.init_noise_sigma * start()), wanted)
    monkeypatch.delitem(sys.modules, "scheduling_fewstep")


def test_what_pipelines_may_pass() -> None:
    made = scheduler(euler(grid("epsilon")), "epsilon")
    made.set_timesteps(None)
    made.set_timesteps(timesteps=[999, 799, 599, 399, 199])
    made.set_timesteps(sigmas=[round(float(s), 3) for s in grid("epsilon")])
    flow = scheduler(euler(grid("flow")), "flow")
    flow.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5), mu=1.15)
    assert flow.config["use_flow_sigmas"] is True
    assert flow.timesteps.tolist() == pytest.approx([1000.0, 750.0, 500.0, 1000 / 3, 1000 / 6])


def bad_tables() -> list[tuple[Any, str]]:
    table, flow = euler(grid("epsilon")), euler(grid("flow"))
    of = TableauScheduler.from_tableau
    made = of(table, LIKE)
    low = euler(karras(5, 0.002, 10.0))
    noisy = Builder(14.0)
    noisy.row(None, 14.5, {0: 1.0}, {}, {0: 3.0})
    noisy.row(14.5, 0.0, {}, {1: 1.0})
    return [
        (lambda: of(table), "which model is the table for"),
        (lambda: of(table, "DDIM"), "like must be a scheduler"),
        (lambda: of(low, LIKE), "calls the model at sigma 0.002, and this model knows 0.029168 to 14.615"),
        (lambda: of(euler(karras(5, 0.03, 80.0)), LIKE), "at sigma 80"),
        (lambda: of(flow, LIKE), "pure noise, a network that predicts noise says nothing"),
        (lambda: of(table, {"_class_name": "EDMEulerScheduler"}), "EDMEulerScheduler preconditions the network"),
        (lambda: of(table, {"_class_name": "DDIMScheduler"}), "has no betas"),
        (lambda: of(table, LIKE, "x0"), "prediction_type 'x0'"),
        (lambda: of(table, path="vpsde"), "path 'vpsde'"),
        (lambda: of(table, LIKE, model_timesteps=[999.0]), "model_timesteps has 1 numbers for 5 model calls"),
        (lambda: of(noisy.build("n"), LIKE), "adds noise, or forgets the start, before the first model call"),
        (lambda: TableauScheduler(), "needs a table"),
        (lambda: TableauScheduler(sigmas=[1.0], levels=[1.0], P=[[1]], W=[[1]], Z=[[0]]), "one level more"),
        (lambda: TableauScheduler([1.0], [1.0, 0.0], [[0, 1]], [[1, 0]], [[0, 0]]), "from before its start"),
        (lambda: made.set_timesteps(20), "num_inference_steps=20, but this scheduler runs the table"),
        (lambda: made.set_timesteps(timesteps=[900, 700, 500, 300, 100]), "pass num_inference_steps=5"),
        (lambda: made.set_timesteps(sigmas=[14.6, 3.0, 0.0]), r"sigmas=\[14.6, 3.0, 0.0\]"),
        (lambda: made.set_begin_index(5), r"in 0 .. 4, got 5: with strength 0\.2 or more a step is left"),
        (lambda: made.set_begin_index(-1), r"begin_index must be in 0 .. 4, got -1$"),
        (lambda: made.step(start(), 123, start()), "timestep 123 is none"),
        (lambda: made.step(start()[:, :2], made.timesteps[0], start()), "output is"),
        (lambda: piped(made, start()) is None or made.step(start(), 999, start()), "all 5 steps are done"),
        (lambda: save_scheduler(Net(), "nowhere"), "a Net is no table"),
        (lambda: model_of({"_class_name": "IPNDMScheduler"}), "IPNDMScheduler preconditions"),
    ]


@pytest.mark.parametrize("case", range(24))
def test_bad_input(case: int) -> None:
    cases = bad_tables()
    assert len(cases) == 24
    act, message = cases[case]
    with pytest.raises(ValueError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_a_generators_scheduler_starts_from_its_own_noise(tmp_path: Path) -> None:
    path = DDPM(tuple(diffusers.DDIMScheduler(**BETAS).betas.tolist()))
    high = float(path.levels[-1])
    net = Precond(Net(), SHAPE, path=path, predicts="noise", sigma_max=high, unit_start=True)
    made = fewstep.Generator(net, euler(discrete(4, 0.1, high)))
    save_scheduler(made, tmp_path / "own", like=LIKE)
    assert abs(TableauScheduler.from_pretrained(tmp_path / "own").init_noise_sigma - 1) < 1e-6
    save_scheduler(made, tmp_path / "told", like=LIKE, start_std=high)
    assert TableauScheduler.from_pretrained(tmp_path / "told").init_noise_sigma < 0.999


def test_errors_before_any_work_are_ours() -> None:
    with pytest.raises(InputError, match="this model knows"):
        TableauScheduler.from_tableau(euler(karras(5, 0.002, 10.0)), LIKE)


def test_a_flow_table_that_does_not_start_at_pure_noise_warns() -> None:
    with pytest.warns(UserWarning, match="start at unit noise whatever"):
        TableauScheduler.from_tableau(euler(torch.tensor([20.0, 1.0, 0.0])), FLOW_LIKE)
