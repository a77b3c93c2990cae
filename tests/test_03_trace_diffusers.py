"""Traced schedulers of diffusers against a loop that drives them as a pipeline does, and against our own solvers."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.cli import parse
from fewstep.cli.trace import Trace
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW
from fewstep.core.sample import sample
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.solve import build
from fewstep.tracing import SCHEDULERS, compare, dense, trace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()

FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
EXPLODING = ("EulerDiscrete", "EulerAncestral", "Heun", "KDPM2", "LMS", "DPMSolverSDE")
NEEDS_TORCHSDE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")


def case(kind: str, steps: int = 8, **config: Any) -> Any:
    """A scheduler, its configuration and, under ``step``, what its steps and timesteps are told."""
    options = config.pop("step", {})
    if kind.startswith(("DPMSolverMultistep", "DPMSolverSinglestep", "UniPC", "DEIS", "SASolver")):
        # Levels of a latent model: from 157, as by default, float32 alone would cost the schedulers 1e-5.
        config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **config}
    told = ",".join(
        f"{k}={v}" for k, v in {**config, **options}.items() if not k.startswith(("clip_", "beta_", "num_"))
    )
    return pytest.param(f"{kind}Scheduler", steps, config, options, id=f"{kind}({told})" if told else kind)


CASES = [
    case("DDIM", clip_sample=False),
    case("DDIM", clip_sample=False, step={"eta": 1.0}),
    case("DDIM", clip_sample=False, timestep_spacing="linspace", set_alpha_to_one=False),
    case(
        "DDIM",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    case("DDIM", clip_sample=False, prediction_type="sample", step={"eta": 0.5}),
    case("DDIMParallel", clip_sample=False, step={"eta": 0.3}),
    case("DDIMInverse", clip_sample=False),
    case("DDPM", clip_sample=False),
    case("DDPM", clip_sample=False, variance_type="fixed_large", prediction_type="v_prediction"),
    case("DDPMParallel", clip_sample=False, timestep_spacing="trailing"),
    case("PNDM", 5),
    case("PNDM", skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"),
    case("PNDM", skip_prk_steps=True, prediction_type="v_prediction"),
    case("LMSDiscrete", num_train_timesteps=200),
    case(
        "LMSDiscrete",
        num_train_timesteps=200,
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        step={"order": 2},
    ),
    case("EulerDiscrete"),
    case("EulerDiscrete", timestep_spacing="leading", use_karras_sigmas=True, final_sigmas_type="sigma_min"),
    case("EulerDiscrete", prediction_type="v_prediction", step={"s_churn": 2.0, "s_noise": 1.003}),
    case("EulerDiscrete", prediction_type="sample", use_exponential_sigmas=True),
    case("EulerAncestralDiscrete"),
    case("EulerAncestralDiscrete", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    case("HeunDiscrete"),
    case("HeunDiscrete", prediction_type="sample", use_karras_sigmas=True),
    case("KDPM2Discrete", num_train_timesteps=200),
    case("KDPM2Discrete", 5, num_train_timesteps=200, prediction_type="v_prediction", use_karras_sigmas=True),
    case("KDPM2AncestralDiscrete", num_train_timesteps=200),
    case("DPMSolverMultistep"),
    case("DPMSolverMultistep", solver_order=1),
    case("DPMSolverMultistep", solver_order=3, use_karras_sigmas=True),
    case("DPMSolverMultistep", 16, solver_order=3, use_lu_lambdas=True, euler_at_final=True),
    case("DPMSolverMultistep", solver_type="heun", use_exponential_sigmas=True, prediction_type="v_prediction"),
    case("DPMSolverMultistep", use_beta_sigmas=True, prediction_type="sample", lower_order_final=False),
    case("DPMSolverMultistep", algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    case("DPMSolverMultistep", algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=3),
    case("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
    case("DPMSolverMultistep", algorithm_type="sde-dpmsolver++", solver_order=3),
    case("DPMSolverMultistep", algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
    case("DPMSolverMultistep", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    case("DPMSolverMultistepInverse"),
    case("DPMSolverSinglestep"),
    case("DPMSolverSinglestep", 9, solver_order=3),
    case("DPMSolverSinglestep", algorithm_type="dpmsolver", final_sigmas_type="sigma_min", lower_order_final=True),
    case("DPMSolverSinglestep", algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
    case("DPMSolverSDE"),
    case("DEISMultistep"),
    case("DEISMultistep", 15, solver_order=3, prediction_type="v_prediction"),
    case("UniPCMultistep"),
    case("UniPCMultistep", solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min"),
    case("UniPCMultistep", predict_x0=False, final_sigmas_type="sigma_min", disable_corrector=[0, 2]),
    case("UniPCMultistep", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
    case("IPNDM"),
    case("SASolver"),
    case("SASolver", predictor_order=3, corrector_order=4, algorithm_type="data_prediction"),
    case("EDMEuler"),
    case("EDMEuler", prediction_type="v_prediction", sigma_schedule="exponential", final_sigmas_type="sigma_min"),
    case("EDMDPMSolverMultistep"),
    case("EDMDPMSolverMultistep", solver_order=3),
    case("EDMDPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
    case("CosineDPMSolverMultistep"),
    case("FlowMatchEulerDiscrete"),
    case("FlowMatchEulerDiscrete", shift=3.0, stochastic_sampling=True),
    case("FlowMatchEulerDiscrete", use_dynamic_shifting=True, shift_terminal=0.02, step={"mu": 0.8}),
    case("FlowMatchHeunDiscrete", shift=2.0),
    case("FlowMatchLCM", shift=1.5),
    case("LCM", 4),
    case("LCM", 3, prediction_type="v_prediction"),
    case("TCD", 4),
    case("TCD", 4, step={"eta": 0.0}),
    case("CMStochasticIterative", 2, clip_denoised=False),
    case("CMStochasticIterative", 1, clip_denoised=False),
]


def network(x: Tensor) -> Tensor:
    """What a network prints for its scaled input: any smooth function will do."""
    return 0.8 * x + 0.5 * torch.tanh(2.0 * x + 0.3) - 0.2 * torch.sin(3.0 * x)


@dataclass(frozen=True)
class Means:
    """What the network's output means, from the noise level alone: formulas of the papers, in float64."""

    kind: str
    config: dict[str, Any]
    shape: tuple[int, ...] = (3, 2, 2)
    sigma_min: float = 1e-3
    sigma_max: float = 1e8
    sigma_data: float = 0.5

    def scale(self, sigma: float) -> float:
        """a in x_u = a x, for the state that the scheduler holds."""
        if self.kind in FLOW_CLASSES or self.config.get("use_flow_sigmas"):
            return 1 / (1 + sigma)
        if self.kind.startswith(EXPLODING) or self.kind in EDM_CLASSES or self.kind.startswith("CM"):
            return 1.0
        return 1 / math.hypot(1.0, sigma)

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: object = None) -> Tensor:
        sigma = float(sigma)
        predicts = self.config.get("prediction_type", "epsilon")
        if self.kind in EDM_CLASSES or self.kind.startswith("CM"):
            data = {"Cosine": 1.0}.get(self.kind[:6], 0.5)
            out = network(x / math.hypot(sigma, data))
            low = 0.002 if self.kind.startswith("CM") else 0.0
            skip = data**2 / ((sigma - low) ** 2 + data**2)
            gain = (sigma - low) * data / math.hypot(sigma, data)
            if self.kind.startswith("Cosine"):
                predicts = "v_prediction"
            return skip * x + (-gain if predicts == "v_prediction" else gain) * out
        if self.kind in FLOW_CLASSES or predicts == "flow_prediction":
            x_u = x / (1 + sigma)
            return x_u - sigma / (1 + sigma) * network(x_u)
        size = math.hypot(1.0, sigma)
        out = network(x / size)
        if predicts == "sample":
            return out
        if predicts == "v_prediction" or self.kind.startswith("IPNDM"):
            return x / size**2 - sigma / size * out
        return x - sigma * out


@dataclass(frozen=True)
class Listed(Noise):
    """The draws of a list, mixed as a traced table says that its rows' noises are."""

    draws: Any = None

    def normal(self, shape: Any, *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        mix = self.draws[str(key[-1])]
        return sum((c * unit_noises(80)[int(m)] for m, c in mix.items()), torch.zeros(2, *shape, dtype=dtype))


@cache
def unit_noises(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    # Rounded to float32, because some schedulers draw in it.
    return tuple(torch.randn(2, 3, 2, 2, generator=generator).double() for _ in range(count))


class Walk:
    """k-diffusion's noise sampler on a walk whose increments are the draws of the list, from low levels to high."""

    def __init__(self, levels: list[float]) -> None:
        self.levels = sorted(levels)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        first, last = (
            min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - float(s))) for s in (sigma_next, sigma)
        )
        widths = [self.levels[i + 1] - self.levels[i] for i in range(first, last)]
        noises = [math.sqrt(w) * unit_noises(80)[i] for i, w in zip(range(first, last), widths, strict=True)]
        return torch.stack(noises).sum(0) / math.sqrt(sum(widths))


def drive(
    kind: str, steps: int, config: dict[str, Any], options: dict[str, Any], start: Tensor, walk: Walk
) -> tuple[Tensor, int]:
    """The loop of a pipeline; returns the sample and how often it called the network."""
    scheduler = getattr(diffusers, kind)(**config)
    timing = {k: v for k, v in options.items() if k == "mu"}
    stepping = {k: v for k, v in options.items() if k != "mu"}
    scheduler.set_timesteps(steps, **timing)
    if kind in NEEDS_TORCHSDE:
        scheduler.noise_sampler = walk
    x, calls = start * float(getattr(scheduler, "init_noise_sigma", 1.0)), 0
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x, calls = scheduler.step(network(scaled), t, x, **stepping).prev_sample, calls + 1
    return x, calls


@pytest.mark.parametrize(("kind", "steps", "config", "options"), CASES)
def test_a_traced_scheduler_is_the_scheduler(
    kind: str, steps: int, config: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in NEEDS_TORCHSDE:
        pytest.importorskip("torchsde")
    table = trace({"_class_name": kind, **config}, steps=steps, **options)
    left = list(unit_noises(80))

    def randn(*size: Any, dtype: torch.dtype = torch.float32, **ignored: Any) -> Tensor:
        return left.pop(0).to(dtype)

    start = unit_noises(81)[80]
    monkeypatch.setattr(torch, "randn", randn)
    called = table.sigmas[~table.sigmas.isnan()].tolist()
    # The last step of an SDE solver that ends at 0 asks for no noise, but a Cosine scheduler does.
    levels = called if kind == "DPMSolverSDEScheduler" else [*called, 0.0]
    wanted, calls = drive(kind, steps, config, options, start, Walk(levels))
    monkeypatch.undo()
    means = Means(kind, config)
    first = table.meta["traced"]["start_std"] * start
    noise = Listed(torch.zeros(2, dtype=torch.int64), table.meta["traced"].get("draws", {}))
    found = means.scale(float(table.levels[-1])) * sample(means, first, table, noise=noise)
    assert table.nfe == calls
    assert float((found - wanted).abs().max()) < 1e-6 * max(1.0, float(wanted.abs().max()))


def test_every_class_that_can_be_traced_is_tested() -> None:
    assert {param.values[0] for param in CASES} == set(SCHEDULERS)


def test_the_start_of_a_pipeline_is_kept() -> None:
    leading = trace("EulerDiscreteScheduler", steps=5, check=False)
    assert leading.meta["traced"]["start_std"] == pytest.approx(leading.start, rel=1e-6)
    leading = trace({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, steps=5, check=False)
    assert leading.meta["traced"]["start_std"] == pytest.approx(math.hypot(1.0, leading.start), rel=1e-6)
    assert trace("FlowMatchEulerDiscreteScheduler", steps=5).start == pytest.approx(1e8)
    assert "replay_error" not in leading.meta["traced"]


# ---- histories


@pytest.mark.parametrize(
    ("kind", "config", "history", "points"),
    [
        ("EulerDiscrete", {}, 1, 1),
        ("DDIM", {"clip_sample": False}, 1, 1),
        ("DPMSolverMultistep", {}, 2, 1),
        ("DPMSolverMultistep", {"solver_order": 3}, 3, 1),
        ("UniPCMultistep", {}, 3, 1),
        ("UniPCMultistep", {"solver_order": 3}, 4, 1),
        ("HeunDiscrete", {}, 2, 1),
        ("LMSDiscrete", {"num_train_timesteps": 200}, 4, 4),
        ("IPNDM", {}, 4, 4),
        ("PNDM", {"skip_prk_steps": True}, 4, 4),
        ("DEISMultistep", {}, 2, 2),
        ("DPMSolverMultistep", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, 2, 2),
    ],
)
def test_the_history_is_the_solvers_own(kind: str, config: dict[str, Any], history: int, points: int) -> None:
    table = trace({"_class_name": f"{kind}Scheduler", **config}, steps=10)
    assert table.P.shape[1] == history
    assert max(len(row.points) for row in table.plan) == points


# ---- the same samplers under other names


LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
HELD = {"lower_order_final": False, **SIGMA_MIN}
SAME: list[tuple[str, int, dict[str, Any], dict[str, Any], str, dict[str, Any], str]] = [
    # scheduler, steps, configuration, options, own solver, its options, which levels are its grid
    ("EulerDiscrete", 8, {"use_karras_sigmas": True}, {}, "euler", {}, "all"),
    ("DDIM", 8, {"clip_sample": False}, {}, "euler", {}, "all"),
    ("DDIM", 8, {"clip_sample": False}, {"eta": 1.0}, "ddim", {"eta": 1.0}, "all"),
    ("DDIM", 8, {"clip_sample": False}, {"eta": 0.4}, "ddim", {"eta": 0.4}, "all"),
    ("DDPM", 8, {"clip_sample": False}, {}, "ddim", {"eta": 1.0}, "all"),
    ("EDMEuler", 8, {}, {}, "euler", {}, "all"),
    ("FlowMatchEulerDiscrete", 8, {"shift": 3.0}, {}, "euler", {}, "all"),
    ("HeunDiscrete", 8, {}, {}, "heun", {}, "every other"),
    ("FlowMatchHeunDiscrete", 8, {}, {}, "heun", {"frame": FLOW}, "every other"),
    ("KDPM2Discrete", 8, {"num_train_timesteps": 200}, {}, "dpm2", {}, "every other"),
    ("KDPM2AncestralDiscrete", 8, {"num_train_timesteps": 200}, {}, "dpm2_ancestral", {}, "every other"),
    ("EulerAncestralDiscrete", 8, {}, {}, "euler_ancestral", {}, "all"),
    ("DPMSolverMultistep", 8, {}, {}, "dpmpp2m", {}, "all"),
    ("DPMSolverMultistep", 8, {"solver_type": "heun"}, {}, "dpmpp", {"exact": True}, "all"),
    ("DPMSolverMultistep", 8, {"solver_order": 3}, {}, "dpmpp3m", {"lower_order_final": True}, "all"),
    ("DPMSolverMultistep", 16, {"solver_order": 3, **SIGMA_MIN}, {}, "dpmpp3m", {}, "all"),
    ("DPMSolverMultistep", 16, {"algorithm_type": "dpmsolver", **SIGMA_MIN}, {}, "dpm_multistep", {}, "all"),
    ("DPMSolverMultistep", 8, {"algorithm_type": "sde-dpmsolver++"}, {}, "dpmpp2m_sde", {}, "all"),
    ("DPMSolverSinglestep", 9, {"use_exponential_sigmas": True}, {}, "dpmpp2s", {}, "every other"),
    ("EDMDPMSolverMultistep", 8, {}, {}, "dpmpp2m", {}, "all"),
    ("UniPCMultistep", 8, {}, {}, "unipc", {"lower_order_final": True}, "all"),
    ("UniPCMultistep", 8, {"solver_order": 3}, {}, "unipc", {"order": 3, "lower_order_final": True}, "all"),
    ("UniPCMultistep", 8, {"solver_type": "bh1", **HELD}, {}, "unipc", {"variant": "bh1"}, "all"),
    ("UniPCMultistep", 8, {"predict_x0": False, **HELD}, {}, "unipc", {"predict": "noise"}, "all"),
    ("DEISMultistep", 16, {"solver_order": 3}, {}, "deis", {"order": 3, "basis": "lambda"}, "all"),
    ("LMSDiscrete", 8, {"num_train_timesteps": 200}, {}, "lms", {}, "all"),
    ("FlowMatchLCM", 4, {}, {}, "consistency", {}, "all"),
    ("FlowMatchEulerDiscrete", 4, {"stochastic_sampling": True}, {}, "consistency", {}, "all"),
    ("CMStochasticIterative", 2, {"clip_denoised": False}, {}, "consistency", {"sigma_min": 0.002}, "all"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "steps", "config", "told", "name", "options", "levels"),
    SAME,
    ids=[f"{s[0]}-{s[4]}-{i}" for i, s in enumerate(SAME)],
)
def test_own_solvers_are_the_traced_schedulers(
    kind: str, steps: int, config: dict[str, Any], told: dict[str, Any], name: str, options: dict[str, Any], levels: str
) -> None:
    latent = LATENT if kind not in (*FLOW_NAMES, "EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative") else {}
    table = trace({"_class_name": f"{kind}Scheduler", **latent, **config}, steps=steps, **told)
    grid = table.levels if levels == "all" else own_grid(kind, table.levels)
    found = compare(table, build(name, grid, **options))
    # The schedulers' coefficients carry float32 errors, and those of DEIS are differences of far larger integrals.
    assert all(row.within(1e-4 if kind == "DEISMultistep" else 5e-6) for row in found), found


FLOW_NAMES = tuple(name.removesuffix("Scheduler") for name in FLOW_CLASSES)


def own_grid(kind: str, levels: Tensor) -> Tensor:
    """The grid of a solver of two evaluations a step: its first call's levels, and the end."""
    first = levels[:-1:2] if not kind.endswith("HeunDiscrete") else torch.cat([levels[:1], levels[1:-1:2]])
    return torch.cat([first, levels[-1:]])


def test_a_difference_to_a_scheduler_is_found() -> None:
    table = trace({"_class_name": "DPMSolverMultistepScheduler", **LATENT}, steps=8)
    found = compare(table, build("dpmpp", table.levels, exact=True))
    assert next(row.where for row in found if not row.within(1e-4)) == "call 2"


def test_the_first_output_of_ipndm_is_lost() -> None:
    """It starts at a = 0, where its state is its noise: the first evaluation has no weight in any point."""
    table = trace("IPNDMScheduler", steps=6)
    assert not dense(table).outputs[:, 0].any()
    assert dense(table).outputs[:, 1].any()


# ---- what is accepted and what is refused


def test_every_way_to_name_a_scheduler(tmp_path: Path) -> None:
    config = {"solver_order": 3, "use_karras_sigmas": True}
    scheduler = diffusers.DPMSolverMultistepScheduler(**config)
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    folder = tmp_path / "pipeline" / "scheduler"
    ways: list[Any] = [
        scheduler,
        {"_class_name": "DPMSolverMultistepScheduler", **config},
        folder / "scheduler_config.json",
        str(folder),
        tmp_path / "pipeline",
    ]
    tables = [trace(way, steps=6) for way in ways]
    for table in tables[1:]:
        assert torch.equal(table.W, tables[0].W) and torch.equal(table.P, tables[0].P)
        assert table.meta["traced"]["config"] == tables[0].meta["traced"]["config"]
    assert scheduler.num_inference_steps is None
    assert Tableau.from_json(tables[0].to_json()).meta == tables[0].meta


def test_sigmas_and_timesteps_take_the_place_of_steps() -> None:
    flow = trace("FlowMatchEulerDiscreteScheduler", [1.0, 0.75, 0.5, 0.25])
    assert flow.levels.tolist() == pytest.approx([1e8, 3.0, 1.0, 1 / 3, 0.0], rel=1e-6)
    ddpm = trace({"_class_name": "DDPMScheduler", "clip_sample": False}, timesteps=[900, 500, 100])
    assert ddpm.nfe == 3
    edm = trace("EDMEulerScheduler", torch.linspace(0, 1, 4))
    assert edm.levels[[0, -2]].tolist() == pytest.approx([80.0, 0.002], rel=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "given", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, {}, "DDIMScheduler with clip_sample=True clips x0: set clip_sample=False"),
        ({"_class_name": "DDPMScheduler"}, {}, "set clip_sample=False"),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, {}, "clip_sample=True clips x0"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, {}, "set clip_denoised=False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, {}, "set thresholding=False"),
        ({"_class_name": "UniPCMultistepScheduler", "thresholding": True}, {}, "rescales x0 by its own values"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, {}, "set invert_sigmas=False"),
        ({"_class_name": "FlowMatchLCMScheduler", "scale_factors": [2.0]}, {}, "changes the size of the state"),
        (
            {"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "learned_range"},
            {},
            "variance_type='learned_range' scales its noise by a network",
        ),
        (
            {"_class_name": "DDIMScheduler", "clip_sample": False, "rescale_betas_zero_snr": True,
             "timestep_spacing": "trailing"},
            {},
            "at pure noise a network that predicts noise says nothing",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, {}, "values that are not finite"),
        ({"_class_name": "KDPM2DiscreteScheduler", "prediction_type": "sample"}, {}, "refuses this: .*not implemented"),
        ({"_class_name": "PNDMScheduler"}, {"steps": 2}, "PNDMScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, {}, "refuses this: `mu`"),
        ({"_class_name": "CMStochasticIterativeScheduler", "clip_denoised": False}, {"steps": 40}, "the identity at"),
        ("DDIMScheduler", {"steps": 0}, "at least 1, got 0"),
        ("DDIMScheduler", {"steps": True}, "at least 1, got True"),
        ("DDIMScheduler", {"steps": None}, r"needs its number of steps: trace\(scheduler, steps=20\)"),
        ("EulerDiscreteScheduler", {"steps": 5, "eta": 1.0}, "unknown option of EulerDiscreteScheduler 'eta'"),
        ("DPMSolverMultistepScheduler", {"sigmas": [0.5]}, "unknown option of DPMSolverMultistepScheduler 'sigmas'"),
        ("DDIMSheduler", {}, "did you mean 'DDIMScheduler'.*or the path of a scheduler_config.json"),
        ({"beta_start": 0.1}, {}, "names its class in _class_name, got the keys .*beta_start"),
        ({"_class_name": "StableDiffusionPipeline"}, {}, "unknown scheduler class 'StableDiffusionPipeline'"),
        ("nowhere/scheduler_config.json", {}, "is no scheduler_config.json, nor a folder that holds one"),
    ],
)  # fmt: skip
def test_what_is_refused(scheduler: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(scheduler, **{"steps": 5, **given})


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_files_that_hold_no_configuration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scheduler_config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"scheduler_config.json (is not readable JSON|must hold a JSON object)"):
        trace(tmp_path, steps=5)


def test_a_scheduler_that_hides_its_clipping_is_found_out() -> None:
    class Hidden(diffusers.EulerDiscreteScheduler):  # type: ignore[misc,name-defined]
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **more: Any) -> Any:
            return super().step(model_output.clamp(-1, 1), timestep, sample, **more)

    Hidden.__name__ = "EulerDiscreteScheduler"
    with pytest.raises(InputError, match="It is not linear"):
        trace(Hidden(), steps=5)


def test_a_missing_package_is_named() -> None:
    if importlib.util.find_spec("torchsde") is not None:
        pytest.skip("torchsde is installed")
    with pytest.raises(InputError, match="DPMSolverSDEScheduler needs torchsde: pip install torchsde"):
        trace("DPMSolverSDEScheduler", steps=5)


# ---- the command


def command(*words: str) -> None:
    parse(Trace, "trace", list(words), None).run()


def test_the_command_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "t.json"
    command(
        "DDIMScheduler", "--steps", "6", "-o", str(out), "--set", "clip_sample=False", "--set",
        "beta_schedule=scaled_linear", "--option", "eta=1.0",
    )  # fmt: skip
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{out}: DDIMScheduler-6, 6 evaluations from sigma ") and said.err.count("\n") == 1
    table = Tableau.from_json(out.read_text())
    wanted = trace(
        {"_class_name": "DDIMScheduler", "clip_sample": False, "beta_schedule": "scaled_linear"}, steps=6, eta=1.0
    )
    assert torch.equal(table.Z, wanted.Z) and table.noisy
    with pytest.raises(InputError, match="exists: choose another --out, or pass --overwrite"):
        command("EulerDiscreteScheduler", "--out", str(out))
    command("EulerDiscreteScheduler", "--out", str(out), "--steps", "3", "--overwrite")
    assert Tableau.from_json(out.read_text()).nfe == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DDIMScheduler"], "clip_sample=False"),
        (
            ["DDIMScheduler", "--set", "clip_sampel=false"],
            "unknown option of DDIMScheduler 'clip_sampel': did you mean",
        ),
        (["EulerDiscreteScheduler", "--set", "sigma_max"], "--set takes KEY=VALUE, got 'sigma_max'"),
        (["EulerDiscreteScheduler", "--option", "=3"], "--option takes KEY=VALUE"),
        (["EulerDiscreteScheduler", "--option", "steps=3"], "--option does not take steps"),
        (["EulerDiscreteScheduler", "--steps", "0"], "at least 1, got 0"),
    ],
)
def test_the_command_refuses(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command(*words, "-o", str(tmp_path / "t.json"))
    assert not list(tmp_path.iterdir())
