"""The conversion table, the paths and the preconditioned denoiser, against an exact mixture in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep import COSINE, DDPM, EDM, FLOW, TRIG, VP, InputError, Mixture, Path, Precond, edm, sample, to_x0
from fewstep.core.denoiser import CountingDenoiser, build_precond
from fewstep.core.path import PATHS, path_config, path_from_config, x0_weights
from fewstep.data import load_data
from fewstep.solve import euler
from fewstep.train import untrained

PATH = {
    "edm": EDM,
    "vp": VP,
    "vp-other": VP(12.0, beta_min=0.3),
    "cosine": COSINE,
    "flow": FLOW,
    "flow-shift-3": FLOW(shift=3.0),
    "trig": TRIG,
    "trig-half": TRIG(0.5),
    "ddpm": DDPM,
}
PREDICTS = ("x0", "noise", "velocity", "v")
SHAPE = (2, 3)

every_path = pytest.mark.parametrize("path", PATH.values(), ids=PATH.keys())
every_target = pytest.mark.parametrize("predicts", PREDICTS)
levels = st.floats(math.log(0.02), math.log(80.0)).map(math.exp)


def mixture() -> Mixture:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64)
    variances = 0.05 + torch.rand(4, *SHAPE, generator=generator, dtype=torch.float64)
    return Mixture(means, variances, [0.1, 0.2, 0.3, 0.4])


def prediction(path: Path, predicts: str, x0: Tensor, noise: Tensor, u: Tensor | float) -> Tensor:
    """What a perfect network prints: the definitions of the four targets, on posterior means."""
    a, b, da, db = (c.reshape(-1, 1, 1) for c in path.coeffs(u))
    return {"x0": x0, "noise": noise, "velocity": da * x0 + db * noise, "v": a * noise - b * x0}[predicts]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def noisy(problem: Mixture, sigma: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(len(sigma), *SHAPE, generator=generator, dtype=torch.float64)
    return problem.draw(len(sigma), seed) + sigma.reshape(-1, 1, 1) * unit


class Oracle(nn.Module):
    """A network that knows the mixture and prints what it was asked to predict, from what it is shown alone."""

    def __init__(self, problem: Mixture, path: Path, predicts: str, time: str, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.problem, self.path, self.predicts, self.time, self.scale = problem, path, predicts, time, scale

    def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        assert time.shape == (len(x),)
        assert time.dtype == torch.float32
        t = time.double()
        rate = {"native": 1, "native*1000": 1000, "native*999": 999}
        if self.time in rate:
            u = t / rate[self.time]
        else:
            u = self.path.at({"sigma": t, "log-sigma/4": (4 * t).exp()}[self.time])
        if self.path == FLOW:
            u = u.clamp(max=1 - 1e-8)  # pure noise: float32 rounds the time of level 1e8 to 1
        sigma, a = self.path.sigma(u), self.path.coeffs(u).a.reshape(-1, 1, 1)
        clean = x / a / self.scale
        x0 = self.problem(clean, sigma)
        return self.weight.detach() * prediction(
            self.path, self.predicts, x0, (clean - x0) / sigma.reshape(-1, 1, 1), u
        )


@every_path
@every_target
@settings(max_examples=15, deadline=None)
@given(sigma=levels, seed=st.integers(0, 10_000))
def test_to_x0_recovers_the_posterior_mean(path: Path, predicts: Any, sigma: float, seed: int) -> None:
    problem, many = mixture(), torch.full((3,), sigma, dtype=torch.float64)
    x = noisy(problem, many, seed)
    wanted = problem(x, sigma)
    u = path.at(many)
    out = prediction(path, predicts, wanted, (x - wanted) / sigma, u)
    x_u = path.coeffs(u).a.reshape(-1, 1, 1) * x
    assert relative(to_x0(path, predicts, x_u, out, u), wanted) < 1e-10
    assert relative(to_x0(path, predicts, x_u, out, float(u[0])), wanted) < 1e-10


@every_path
@every_target
def test_to_x0_takes_one_time_per_sample(path: Path, predicts: Any) -> None:
    problem, sigma = mixture(), torch.tensor([0.05, 0.7, 3.0, 40.0], dtype=torch.float64)
    x, u = noisy(problem, sigma), path.at(sigma)
    wanted = problem(x, sigma)
    out = prediction(path, predicts, wanted, (x - wanted) / sigma.reshape(-1, 1, 1), u)
    x_u = path.coeffs(u).a.reshape(-1, 1, 1) * x
    assert relative(to_x0(path, predicts, x_u, out, u), wanted) < 1e-10


def test_an_unknown_prediction_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'velocity'"):
        x0_weights(FLOW, "velocitie", 0.5)  # type: ignore[arg-type]


@every_path
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.01, 0.98))
def test_time_and_level_are_inverse(path: Path, share: float) -> None:
    u = share * (998.0 if path == DDPM else 60.0 if path == EDM else 1.0)
    assert float(path.at(path.sigma(u))) == pytest.approx(u, rel=1e-10)
    sigma = float(path.sigma(u))
    assert float(path.sigma(path.at(sigma))) == pytest.approx(sigma, rel=1e-10)


@every_path
def test_levels_increase_with_time_and_definitions_hold(path: Path) -> None:
    u = torch.linspace(0.01, 0.97, 60, dtype=torch.float64) * (999 if path == DDPM else 1)
    c = path.coeffs(u)
    assert all(part.dtype == torch.float64 and part.shape == u.shape for part in c)
    assert (path.sigma(u).diff() > 0).all()
    assert relative(path.sigma(u), c.b / c.a) < 1e-12
    kept = {"EDMPath": c.a, "FlowPath": c.a + c.b}.get(
        type(path).__name__, c.a**2 + (c.b / getattr(path, "scale", 1)) ** 2
    )
    assert float((kept - 1).abs().max()) < 1e-12


@every_path
def test_derivatives_are_those_of_the_weights(path: Path) -> None:
    step = 1e-5
    u = torch.linspace(0.05, 0.95, 37, dtype=torch.float64)
    if path == DDPM:
        u = (u * 998).floor() + 0.5  # between the knots, where log sigma is linear
    up, down, c = path.coeffs(u + step), path.coeffs(u - step), path.coeffs(u)
    for slope, high, low in ((c.da, up.a, down.a), (c.db, up.b, down.b)):
        assert float((slope - (high - low) / (2 * step)).abs().max()) < 2e-9 * max(1.0, float(slope.abs().max()))


def test_published_levels() -> None:
    u = 0.3
    assert float(VP.sigma(u)) == pytest.approx(math.sqrt(math.exp(19.9 / 2 * u**2 + 0.1 * u) - 1), rel=1e-12)
    assert float(FLOW.sigma(u)) == pytest.approx(u / (1 - u), rel=1e-12)
    t = 3 * u / (1 + 2 * u)
    assert float(FLOW(shift=3.0).sigma(u)) == pytest.approx(t / (1 - t), rel=1e-12)
    assert float(TRIG(0.5).sigma(u)) == pytest.approx(0.5 * math.tan(u), rel=1e-12)
    assert float(COSINE.sigma(0.0)) == pytest.approx(math.exp(-10), rel=1e-9)
    assert float(COSINE.sigma(1.0)) == pytest.approx(math.exp(10), rel=1e-9)
    kept = 1.0
    for beta in DDPM.betas[:401]:  # type: ignore[attr-defined]
        kept *= 1 - beta
    assert float(DDPM.sigma(400)) == pytest.approx(math.sqrt((1 - kept) / kept), rel=1e-10)
    assert len(DDPM.betas) == 1000  # type: ignore[attr-defined]


@every_path
def test_a_path_survives_its_description(path: Path) -> None:
    assert path_from_config(path_config(path)) == path
    with pytest.raises(InputError, match="cannot take"):
        path_from_config({**path_config(path), "speed": 1})


def test_bad_paths_are_refused() -> None:
    with pytest.raises(InputError, match="unknown path 'flwo': did you mean 'flow'"):
        path_from_config({"kind": "flwo"})
    with pytest.raises(InputError, match="betas"):
        DDPM(betas=(0.1, 1.5))
    assert FLOW(3.0) == FLOW(shift=3.0) != FLOW
    assert set(PATHS) == {"edm", "vp", "cosine", "flow", "trig", "ddpm"}


@every_path
@every_target
def test_a_precond_around_a_perfect_network_is_the_mixture(path: Path, predicts: Any) -> None:
    # Times that float32 holds exactly, so that the network is told the very time the algebra uses.
    u = torch.tensor([0.125, 0.25, 0.5, 0.75], dtype=torch.float64)
    if path == DDPM:
        u = torch.tensor([20.5, 100.0, 400.25, 800.0], dtype=torch.float64)
    problem, sigma = mixture(), path.sigma(u)
    D = Precond(Oracle(problem, path, predicts, "native"), SHAPE, path=path, predicts=predicts)
    x = noisy(problem, sigma)
    assert relative(D(x, sigma), problem(x, sigma)) < 1e-10


@pytest.mark.parametrize(
    ("time", "tolerance"), [("sigma", 1e-10), ("native*1000", 1e-10), ("native*999", 1e-10), ("log-sigma/4", 1e-6)]
)
@every_target
def test_every_time_map_tells_the_network_its_level(time: Any, tolerance: float, predicts: Any) -> None:
    problem = mixture()
    # Flow times 1/2, 3/4 and 7/8 are the levels 1, 3 and 7, all of them exact in float32 except as a logarithm.
    sigma = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64)
    net = Oracle(problem, FLOW, predicts, time, scale=4.0)
    D = Precond(net, SHAPE, path=FLOW, predicts=predicts, time=time, scale_in=4.0)
    x = noisy(problem, sigma)
    assert relative(D(x, sigma), problem(x, sigma)) < tolerance


class Recorder(nn.Module):
    """Remembers what it was shown and returns a fixed non-linear function of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        self.seen = x, time, cond
        self.out = torch.tanh(self.weight * x) * 0.7 + 0.1
        return self.out


@settings(max_examples=25, deadline=None)
@given(sigma=levels, sd=st.floats(0.2, 2.0))
def test_edm_is_the_published_preconditioning(sigma: float, sd: float) -> None:
    net = Recorder(torch.float64)
    D = edm(net, SHAPE, sigma_data=sd)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * sigma
    cond = {"label": torch.zeros(3, dtype=torch.int64)}
    found = D(x, sigma, cond).detach()
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / math.sqrt(sigma**2 + sd**2)
    c_in = 1 / math.sqrt(sigma**2 + sd**2)
    seen, time, got = net.seen
    assert relative(seen, c_in * x) < 1e-12
    assert float((time - math.log(sigma) / 4).abs().max()) < 1e-6
    assert got["label"] is cond["label"]
    assert relative(found, c_skip * x + c_out * net.out.detach()) < 1e-12
    assert D.sigma_data == sd


@pytest.mark.parametrize("predicts", PREDICTS)
def test_every_shape_of_sigma_gives_the_same(predicts: Any) -> None:
    problem = mixture()
    D = Precond(Oracle(problem, VP, predicts, "sigma"), SHAPE, path=VP, predicts=predicts, time="sigma")
    x = noisy(problem, torch.full((4,), 0.5, dtype=torch.float64))
    for model in (D, problem, CountingDenoiser(problem)):
        wanted = model(x, 0.5)
        for shape in ((), (4,), (4, 1, 1)):
            assert relative(model(x, torch.full(shape, 0.5, dtype=torch.float64)), wanted) < 1e-12
    own = torch.tensor([0.25, 0.5, 2.0, 8.0], dtype=torch.float64)
    mixed = D(x, own.reshape(4, 1, 1))
    for i in range(4):
        assert relative(mixed[i : i + 1], D(x[i : i + 1], own[i])) < 1e-12
        assert relative(D(x, own)[i], mixed[i]) < 1e-12


def test_pure_noise_of_a_flow_is_a_finite_level_in_float32() -> None:
    start, end = 1e8, 1.5
    problem = mixture()
    D = Precond(Oracle(problem, FLOW, "velocity", "native"), SHAPE, path=FLOW, predicts="velocity", sigma_max=start)
    x = noisy(problem, torch.full((64,), start, dtype=torch.float64))
    wanted = problem(x, start) + end / start * (x - problem(x, start))
    x32 = x.float()
    out = sample(problem, x32, euler(torch.tensor([start, end], dtype=torch.float64)))
    assert out.dtype == torch.float32
    assert float((out.double() - wanted).abs().max()) < 1e-5
    out = sample(D, x32, euler(torch.tensor([start, end], dtype=torch.float64)))
    assert float((out.double() - wanted).abs().max()) < 1e-5
    subtractive = x32 + (end - start) * (x32 - problem(x32, start)) / start
    assert float((subtractive.double() - wanted).abs().max()) > 0.1


def test_a_half_precision_network_is_combined_in_float32() -> None:
    net = Recorder(torch.bfloat16)
    D = Precond(net, SHAPE, path=FLOW, predicts="velocity")
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(2))
    found = D(x, 3.0).detach()
    assert net.seen[0].dtype == net.out.dtype == torch.bfloat16
    assert net.seen[1].dtype == found.dtype == torch.float32
    # x0 = x_u - t v with t = 3/4, x_u = x/4.
    wide = 0.25 * x - 0.75 * net.out.detach().float()
    narrow = (0.25 * x).bfloat16() - 0.75 * net.out.detach()
    assert float((found - wide).abs().max()) < 1e-6
    assert float((narrow.float() - wide).abs().max()) > 1e-3
    assert D(x.half(), 3.0).dtype == D(x.bfloat16(), 3.0).dtype == torch.float32
    assert D(x.double(), 3.0).dtype == torch.float64


def test_features_returns_the_activations_of_one_pass() -> None:
    D = untrained(load_data("digits"), "resmlp", width=16, embedding=8, blocks=2).denoiser
    assert isinstance(D, Precond)
    for p in D.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    seen: list[Tensor] = []
    hook = D.net.get_submodule("blocks.1").register_forward_hook(lambda m, args, out: seen.append(out))
    x, cond = torch.randn(3, *D.shape), {"label": torch.tensor([1, 2, 3])}
    estimate, found = D.features(x, 0.7, cond, ["block1", "block0"])
    hook.remove()
    assert len(seen) == 1
    assert set(found) == {"block1", "block0"}
    assert torch.equal(found["block1"], seen[0])
    assert not torch.equal(found["block0"], found["block1"])
    assert torch.equal(estimate, D(x, 0.7, cond))
    assert all(not m._forward_hooks for m in D.net.modules())


def test_an_unknown_tap_is_refused_with_the_nearest_names() -> None:
    D = untrained(load_data("digits"), "resmlp", width=16, embedding=8, blocks=2).denoiser
    assert isinstance(D, Precond)
    with pytest.raises(InputError, match="unknown feature tap 'blok1': did you mean 'block1'"):
        D.features(torch.zeros(1, *D.shape), 1.0, None, ["blok1"])
    assert all(not m._forward_hooks for m in D.net.modules())


def test_a_denoiser_is_rebuilt_from_its_description() -> None:
    D = untrained(load_data("digits"), "resmlp", width=16, embedding=8, blocks=1).denoiser
    assert isinstance(D, Precond)
    again = build_precond(D.describe())
    assert again.describe() == D.describe()
    again.load_state_dict(D.state_dict())
    x = torch.randn(2, *D.shape)
    assert torch.equal(again(x, 0.3, {"label": torch.tensor([1, 2])}), D(x, 0.3, {"label": torch.tensor([1, 2])}))


def test_bad_levels_and_time_maps_are_refused() -> None:
    with pytest.raises(InputError, match="0 < sigma_min < sigma_max < inf"):
        Precond(Recorder(torch.float32), SHAPE, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(InputError, match="0 < sigma_min < sigma_max < inf"):
        Precond(Recorder(torch.float32), SHAPE, sigma_max=math.inf)
    with pytest.raises(InputError, match="unknown time map"):
        Precond(Recorder(torch.float32), SHAPE, time="seconds")  # type: ignore[arg-type]
