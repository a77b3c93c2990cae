"""Progressive distillation: target, weights and levels against closed forms, and runs that are broken and resumed."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch
from fewstep.core.denoiser import CountingDenoiser, Precond
from fewstep.core.exact import Mixture, bimodal
from fewstep.core.fit import build_models, fit
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.path import DDPM, FLOW, TRIG, to_x0, x0_weights
from fewstep.core.role import Models, Optim, Role
from fewstep.core.state import Run, read_json
from fewstep.data import Images
from fewstep.distill.progressive import SNR_WEIGHTS, Progressive, halvings, jump_target, progressive, shares
from fewstep.errors import InputError
from fewstep.guide import CFG
from fewstep.models.lora import LoRA
from fewstep.solve.euler import euler
from tiny_runs import STEADY, Stop, StopsAfter, bits, differing, log_of, tiny, tiny_data

PURE = 1e8


def start_points(problem: Mixture, n: int = 16, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return problem.sigma_max * torch.randn(n, *problem.shape, generator=g, dtype=torch.float64)


def perfect(method: Progressive, teacher: Any) -> Callable[..., Tensor]:
    """The student that a stage asks for, as a function."""
    fine = method.levels(teacher, method.start_steps)

    def student(x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
        k = int((fine - torch.as_tensor(sigma).flatten()[0]).abs().argmin())
        assert k % method.ratio == 0, "the student is asked for its own levels alone"
        return jump_target(teacher, x, fine[k : k + method.ratio + 1, None].expand(-1, len(x)), cond)

    return student


# ---- the target


@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
@pytest.mark.parametrize("to_zero", [False, True])
def test_the_target_is_what_two_ddim_steps_solved_for_x0_give(ratio: int, to_zero: bool) -> None:
    problem, n = bimodal(), 16
    g = torch.Generator().manual_seed(ratio)
    levels = (torch.rand(ratio + 1, n, generator=g, dtype=torch.float64) * 9 - 5).exp().sort(0, descending=True)[0]
    if to_zero:
        levels[-1, ::2] = 0.0  # some of the batch end at level 0, the others do not
    x = problem.draw(n) + levels[0, :, None] * torch.randn(n, 1, generator=g, dtype=torch.float64)
    found = jump_target(problem, x, levels)
    for i in range(n):
        grid = levels[:, i]
        end = euler(grid)(problem, x[i : i + 1])
        ratio_ = float(grid[-1] / grid[0])
        wanted = (end - ratio_ * x[i : i + 1]) / (1 - ratio_)
        assert float((found[i] - wanted[0]).abs().max()) < 1e-9, i
        again = euler(grid[[0, -1]])(lambda *args, i=i: found[i : i + 1], x[i : i + 1])
        assert float((again - end).abs().max()) < 1e-12 * float(x[i].abs().max() + 1)


def test_two_steps_have_the_closed_form_of_the_paper() -> None:
    # In its terms: z = alpha x0 + sigma n with alpha = cos, sigma = sin, and DDIM in these.
    problem, n = bimodal(), 32
    t, m, s = (torch.full((n,), v, dtype=torch.float64) for v in (1.3, 1.1, 0.7))
    z = 0.5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def ddim(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x0 = problem(z / t.cos()[:, None], t.tan())
        return s.cos()[:, None] * x0 + (s.sin() / t.sin())[:, None] * (z - t.cos()[:, None] * x0)

    end = ddim(ddim(z, t, m), m, s)
    share = (s.sin() / t.sin())[:, None]
    wanted = (end - share * z) / (s.cos()[:, None] - share * t.cos()[:, None])
    found = jump_target(problem, z / t.cos()[:, None], torch.stack([t, m, s]).tan())
    assert float((found - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize("grid", ["cosine", "karras"])
@pytest.mark.parametrize(("steps", "start"), [(1, 2), (4, 8), (5, 10), (16, 32), (3, 3), (2, 8)])
def test_a_perfect_student_does_what_its_teacher_does(grid: Any, steps: int, start: int) -> None:
    method, problem = Progressive(steps=steps, start_steps=start, grid=grid), bimodal()
    x = start_points(problem)
    many = euler(method.levels(problem, start))(problem, x)
    few = euler(method.levels(problem, steps))(perfect(method, problem), x)
    assert float((many - few).abs().max()) < 1e-10
    if start > steps:
        plain = euler(method.levels(problem, steps))(problem, x)
        assert float((many - plain).abs().max()) > 1e-3, "there was something to learn"


def test_stages_that_are_perfect_add_up() -> None:
    problem, wide = bimodal(), 16
    current: Any = problem
    x = start_points(problem)
    for many, few in halvings(wide, 1):
        method = Progressive(steps=few, start_steps=many)
        student = perfect(method, _Like(current, problem))
        current = _Like(student, problem)
    end = euler(Progressive().levels(problem, wide))(problem, x)
    assert float((current(x, problem.sigma_max) - end).abs().max()) < 1e-10, "one step is all sixteen"


class _Like:
    """A function with the levels of a denoiser."""

    def __init__(self, function: Any, like: Any) -> None:
        self.function, self.shape, self.sigma_data = function, like.shape, 1.0
        self.sigma_min, self.sigma_max = like.sigma_min, like.sigma_max

    def __call__(self, x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        return self.function(x, sigma, cond)


def test_the_target_is_a_mean_of_the_teachers_outputs() -> None:
    asked: list[Tensor] = []

    def one_of(k: int) -> Tensor:
        """The weight of output k: the target when that output alone is 1."""
        asked.clear()

        def teacher(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            asked.append(sigma)
            return torch.full_like(x, 1.0 if len(asked) == k + 1 else 0.0)

        return jump_target(teacher, torch.zeros(3, 1, dtype=torch.float64), levels)[:, 0]

    levels = torch.tensor([[PURE, 3.0, 0.2], [5.0, 1.0, 0.1], [0.5, 0.4, 0.0]], dtype=torch.float64)
    early, late = one_of(0), one_of(1)
    a, m, b = levels
    assert [float((s - t).abs().max()) for s, t in zip(asked, levels[:2], strict=True)] == [0.0, 0.0]
    assert float((late - (1 - b / m) / (1 - b / a)).abs().max()) < 1e-15
    assert float((early + late - 1).abs().max()) < 1e-15
    assert (early[:2] > 0).all() and (late > 0).all() and (late[:2] < 1).all()
    assert float(late[2]) == 1 and float(early[2]) == 0, "into level 0 the last output is all"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_target_is_finite_and_right_at_both_ends(dtype: torch.dtype) -> None:
    teacher = Mixture(torch.tensor([[0.3, -0.4]]), 0.25, sigma_max=PURE)
    method = Progressive(steps=256, start_steps=512)
    fine = method.levels(teacher, 512)
    unit = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k, most in ((0, 1e-6), (508, 1e-6), (510, 1e-6)):
        levels = fine[k : k + 3, None].expand(-1, 8)
        x = (teacher.draw(8) + levels[0, :, None] * unit).to(dtype)
        found = jump_target(teacher, x, levels)
        assert found.dtype == dtype and found.isfinite().all()
        x64 = x.double()
        there = euler(fine[k : k + 2])(teacher, x64)
        wanted = teacher(there, fine[k + 1])
        if fine[k + 2] > 0:
            w = (1 - fine[k + 2] / fine[k + 1]) / (1 - fine[k + 2] / fine[k])
            wanted = w * wanted + (1 - w) * teacher(x64, fine[k])
        assert float((found.double() - wanted).abs().max()) < (most if dtype == torch.float32 else 1e-12), k


# ---- levels


@pytest.mark.parametrize("grid", ["cosine", "karras", "native"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 64])
def test_the_teachers_grid_holds_the_students(grid: Any, steps: int) -> None:
    D = tiny().denoiser
    method = Progressive(grid=grid)
    coarse, fine = method.levels(D, steps), method.levels(D, 2 * steps)
    assert torch.equal(fine[::2], coarse) and coarse.dtype == torch.float64
    assert float(coarse[0]) == D.sigma_max and float(coarse[-1]) == 0 and len(coarse) == steps + 1
    assert (coarse.diff() < 0).all() and float(fine[-2]) > D.sigma_min


def test_the_cosine_grid_is_the_papers() -> None:
    # log-SNR(t) = -2 log tan(A t + B), whose ends are those of the denoiser's range.
    D, method = tiny().denoiser, Progressive(scale=0.5)
    low, high = math.atan(D.sigma_min / 0.5), math.atan(D.sigma_max / 0.5)
    t = torch.arange(12, 0, -1, dtype=torch.float64) / 12
    wanted = 0.5 * torch.tan(low + (high - low) * t)
    assert float((method.levels(D, 12)[:-1] / wanted - 1).abs().max()) < 1e-11


def test_native_grids_are_even_in_the_time_of_the_path() -> None:
    net = tiny().denoiser.net
    flow = Precond(net, (1, 4, 4), path=FLOW(shift=3.0), predicts="velocity", sigma_min=1e-3, sigma_max=PURE)
    t = FLOW(shift=3.0).at(Progressive(grid="native").levels(flow, 10)[:-1])
    assert float((t.diff() - t.diff()[0]).abs().max()) < 1e-9 and float(t[0]) == pytest.approx(1, abs=1e-7)
    low, high = float(DDPM.levels[0]), float(DDPM.levels[-1])
    ddpm = Precond(net, (1, 4, 4), path=DDPM, predicts="noise", time="nearest", sigma_min=low, sigma_max=high)
    index = DDPM.at(Progressive(grid="native").levels(ddpm, 9)[:-1])
    assert float((index - torch.arange(999, 0, -111)).abs().max()) < 1e-6
    cosine = Progressive().levels(flow, 4)
    angles = TRIG.at(cosine[1:-1])
    assert (
        float(cosine[0]) == PURE and float((angles / (math.pi / 8) - torch.tensor([3.0, 2.0, 1.0])).abs().max()) < 3e-3
    )


@pytest.mark.parametrize(("steps", "start"), [(4, 8), (3, 3), (1, 2)])
def test_discrete_draws_are_the_samplers_levels_equally_often(steps: int, start: int) -> None:
    D, method = tiny().denoiser, Progressive(steps=steps, start_steps=start)
    drawn, fine = method.drawn(D, Noise.of(0, 6000)), method.levels(D, start)
    assert drawn.shape == (method.ratio + 1, 6000) and drawn.dtype == torch.float64
    k = (drawn[0][:, None] - fine[:-1]).abs().argmin(1)
    assert torch.equal(drawn, torch.stack([fine[k + j] for j in range(method.ratio + 1)]))
    counts = torch.bincount(k, minlength=start)
    assert (counts[1 :: method.ratio] == 0).all() if method.ratio == 2 else True
    assert float((counts[:: method.ratio] / 6000 - 1 / steps).abs().max()) < 4 * math.sqrt(1 / steps / 6000) + 1e-9


def test_continuous_draws_fill_the_grid_and_step_alike() -> None:
    D, method = tiny().denoiser, Progressive(steps=4, start_steps=8, draw="continuous")
    drawn = method.drawn(D, Noise.of(0, 6000))
    places = TRIG.at(drawn.clamp_min(D.sigma_min))
    width = (math.atan(D.sigma_max) - math.atan(D.sigma_min)) / 8
    assert float((places[:-1] - places[1:] - width).abs().max()) < 1e-9, "half a student's step each"
    share = ((places[0] - math.atan(D.sigma_min)) / (8 * width)).sort()[0]
    assert float((share - torch.linspace(0.25, 1, 6000)).abs().max()) < 0.02


# ---- weights


@pytest.mark.parametrize(("weight", "predicts"), [("constant", "x0"), ("snr", "noise"), ("snr+1", "v")])
def test_weights_are_the_error_of_what_a_network_predicts(weight: str, predicts: Any) -> None:
    g = torch.Generator().manual_seed(0)
    out, other = torch.randn(2, 50, generator=g, dtype=torch.float64)
    u = torch.linspace(0.01, 1.55, 50, dtype=torch.float64)
    x_u, sigma = torch.randn(50, generator=g, dtype=torch.float64), u.tan()
    x0, there = (to_x0(TRIG, predicts, x_u, o, u) for o in (out, other))
    found = SNR_WEIGHTS[weight](sigma) * (x0 - there) ** 2
    assert float((found / (out - other) ** 2 - 1).abs().max()) < 1e-9
    assert x0_weights(TRIG, predicts, u)[0].shape == (50,)


def test_the_truncated_snr_is_the_larger_of_the_two() -> None:
    sigma = torch.tensor([0.01, 0.5, 1.0, 2.0, PURE], dtype=torch.float64)
    wanted = torch.tensor([1e4, 4.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert float((SNR_WEIGHTS["truncated-snr"](sigma) / wanted - 1).abs().max()) < 1e-12


# ---- the loss


class Posterior(nn.Module):
    """The exact denoiser of N(0, 1), as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1,), 0.002, 20.0, 1.0

    def forward(self, x: Tensor, sigma: Tensor | float, cond: object = None) -> Tensor:
        return x / (1 + torch.as_tensor(sigma).reshape(-1, 1) ** 2).to(x.dtype)


class Slopes(Posterior):
    """A student with one slope a level, the teacher's at first."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.levels = levels
        self.slopes = nn.Parameter(1 / (1 + levels[:-1] ** 2))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Tensor | float, cond: object = None) -> Tensor:
        self.seen.append(x.detach())
        near = (torch.as_tensor(sigma).reshape(-1, 1) - self.levels[:-1]).abs().argmin(1)
        return self.slopes[near][:, None].to(x.dtype) * x


def exact_slopes(method: Progressive) -> Tensor:
    """What the slopes are to become: those of two steps on N(0, 1)."""
    fine = method.levels(Posterior(), method.start_steps)
    a, m, b = fine[:-2:2], fine[1::2], fine[2::2]
    w = (1 - b / m) / (1 - b / a)
    moved = m / a + (1 - m / a) / (1 + a**2)
    return w * moved / (1 + m**2) + (1 - w) / (1 + a**2)


class Ones:
    """A data set of samples of N(0, 1)."""

    def __len__(self) -> int:
        return 4096

    def take(self, ids: Tensor) -> Batch:
        return Batch(Noise.of(9, ids).normal((1,), "x", dtype=torch.float64), {})


def gaussian_models(method: Progressive) -> Models:
    levels = method.levels(Posterior(), method.steps)
    return build_models({"teacher": Role(Posterior), "student": Role(lambda: Slopes(levels), method.optim)}, "cpu")


@pytest.mark.parametrize("weight", SNR_WEIGHTS)
def test_loss_and_gradient_on_a_gaussian_are_those_of_the_closed_form(weight: Any) -> None:
    method = Progressive(steps=4, start_steps=8, weight=weight)
    m, ids = gaussian_models(method), torch.arange(256)
    (update,) = method.step(m, Ones().take(ids), 0, Noise.of(1, 256))
    m.student.requires_grad_(True)
    loss = update.loss()
    assert not isinstance(loss, dict)
    loss.backward()
    drawn = method.drawn(m.teacher, Noise.of(1, 256).fold("stage", 4))[0]
    x, k = m.student.seen[-1], (drawn[:, None] - m.student.levels[:-1]).abs().argmin(1)
    off = (m.student.slopes.detach() - exact_slopes(method))[k]
    each = SNR_WEIGHTS[weight](drawn) * off * x[:, 0]
    assert loss.item() == pytest.approx(float((each * off * x[:, 0]).mean()), rel=1e-10)
    wanted = torch.zeros(4, dtype=torch.float64).index_add(0, k, 2 * each * x[:, 0] / 256)
    assert float((m.student.slopes.grad / wanted - 1).abs().max()) < 1e-9
    with torch.no_grad():
        m.student.slopes.copy_(exact_slopes(method))
    assert update.loss().item() < 1e-25, "the exact two-step map is the minimum"
    assert all(p.grad is None for p in m.teacher.parameters())
    spread = (x[:, 0] - Ones().take(ids).x[:, 0]) / drawn
    assert abs(float(spread.mean())) < 0.2 and float(spread.std()) == pytest.approx(1, abs=0.15)


def test_training_finds_the_two_step_map() -> None:
    method = Progressive(steps=4, start_steps=8, weight="constant", optim=Optim(lr=0.02, decay="linear"))
    m = gaussian_models(method)
    before = float((m.student.slopes - exact_slopes(method)).abs().max())
    list(fit(method, m, Ones(), FitOptions(Budget(150), batch=64), None))
    after = float((m.student.slopes.detach() - exact_slopes(method)).abs().max())
    assert before > 0.03 and after < 2e-3, (before, after)
    holder: Any = type("G", (), {"denoiser": m.teacher})
    x = 20.0 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        few, many = method.sampler(holder)(m.student, x), euler(method.levels(m.teacher, 8))(m.teacher, x)
        plain = method.sampler(holder)(m.teacher, x)
    assert float((few - many).abs().max()) < 0.1 * float((plain - many).abs().max())


@pytest.mark.parametrize("draw", ["discrete", "continuous"])
def test_a_stage_starts_as_its_teacher_and_its_sampler_costs_its_steps(draw: Any) -> None:
    start, method = tiny(), Progressive(steps=2, start_steps=4, draw=draw)
    m = build_models(method.roles(start), "cpu")
    for p, q in zip(m.teacher.parameters(), m.student.parameters(), strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    same = Progressive(steps=4, start_steps=4, draw=draw)
    batch = tiny_data().take(torch.arange(32))
    (update,) = same.step(m, batch, 0, Noise.of(0, 32))
    assert update.loss().item() < 1e-9, "one step of the same network leaves nothing to learn"
    (update,) = method.step(m, batch, 0, Noise.of(0, 32))
    assert update.loss().item() > 1e-6
    counting, table = CountingDenoiser(start.denoiser), method.sampler(start)
    with torch.no_grad():
        table(counting, table.start * torch.randn(3, 1, 4, 4), {"label": torch.arange(3)})
    assert table.nfe == counting.nfe == 2 and table.end == 0


def test_labels_and_guidance_reach_the_target() -> None:
    start = tiny()
    guided = CFG(start.denoiser, 3.0)
    method = Progressive(steps=4, start_steps=4)
    m = build_models(method.roles(Generator(guided, start.sampler, conds=start.conds)), "cpu")
    assert isinstance(m.student, Precond) and list(m.teacher.parameters())
    batch, noise = tiny_data().take(torch.arange(24)), Noise.of(0, 24)
    (update,) = method.step(m, batch, 0, noise)
    seen: dict[str, Any] = {}
    hook = m.student.register_forward_hook(lambda mod, args, out: seen.update(x=args[0], sigma=args[1], cond=args[2]))
    loss = update.loss()
    hook.remove()
    with torch.no_grad():
        wanted = guided(seen["x"], seen["sigma"], batch.cond) - start.denoiser(seen["x"], seen["sigma"], batch.cond)
    weight = (seen["sigma"] ** -2).clamp(min=1)[:, None, None, None]
    assert loss.item() == pytest.approx(float((weight * wanted.double() ** 2).mean()), rel=1e-4)
    assert torch.equal(seen["cond"]["label"], batch.cond["label"]) and loss.item() > 1e-6
    same = m.teacher(seen["x"], seen["sigma"], batch.cond)
    m.teacher.network = copy.deepcopy(m.teacher.network)
    assert torch.equal(m.teacher(seen["x"], seen["sigma"], batch.cond), same)
    for p in m.teacher.network.parameters():
        p.data *= 1.5
    assert not torch.equal(m.teacher(seen["x"], seen["sigma"], batch.cond), same), "the network that it holds is used"


# ---- stages and their budgets


@pytest.mark.parametrize(
    ("start", "steps", "guided", "stages"),
    [
        (8, 4, False, [(8, 4)]),
        (16, 1, False, [(16, 8), (8, 4), (4, 2), (2, 1)]),
        (12, 3, True, [(12, 12), (12, 6), (6, 3)]),
        (4, 4, True, [(4, 4)]),
        (10, 5, False, [(10, 5)]),
    ],
)
def test_stages_halve(start: int, steps: int, guided: bool, stages: list[tuple[int, int]]) -> None:
    assert halvings(start, steps, guided=guided) == stages
    parts = shares(stages)
    assert sum(parts) == pytest.approx(1) and len(parts) == len(stages)
    last = {few: part for (_, few), part in zip(stages, parts, strict=True)}
    assert all(
        last[few] == pytest.approx((2 if few <= 2 else 1) * min(parts)) for few in last if min(last) <= 2 < max(last)
    )


# ---- whole runs

SETTINGS = Progressive(optim=STEADY)
OPTIONS: dict[str, Any] = {"budget": 15, "batch": 8, "micro": 2, "log_every": 1, "save_every": 2, "progress": False}


def run(out: Path, *, start: Generator | None = None, stop: int | None = None, **options: Any) -> Generator:
    """From 8 to 2 steps in two stages of 5 and 10 updates; ``stop`` ends it after that many of the first it makes."""
    data: Any = tiny_data() if stop is None else StopsAfter(tiny_data(), stop * 2)
    settings = {"settings": SETTINGS, "start_steps": 8, "steps": 2} | OPTIONS | options
    return progressive(start or tiny(), data, out=out, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out)
    return out


def whole(out: Path) -> dict[str, Tensor]:
    """Every tensor of every stage and of the student."""
    parts = {f"{p.name}/{k}": t for p in sorted((out / "stages").iterdir()) for k, t in bits(p).items()}
    student = Generator.load(out).denoiser
    assert isinstance(student, Precond)
    return parts | {f"top/{k}": t for k, t in student.state_dict().items()}


def told(out: Path) -> list[Any]:
    return [log_of(p) for p in (out, *sorted((out / "stages").iterdir()))]


def test_a_run_leaves_a_generator_for_every_stage(finished: Path) -> None:
    top = Generator.load(finished)
    assert sorted(p.name for p in (finished / "stages").iterdir()) == ["0002", "0004"]
    assert top.sampler.nfe == 2 and [e["steps"] for e in top.card["stages"]] == [4, 2]
    assert [e["step"] for e in top.card["stages"]] == [5, 10], "the stage to 2 steps has twice the budget"
    last = Generator.load(finished / "stages/0002")
    assert torch.equal(top.sample(4, progress=False), last.sample(4, progress=False))
    assert Generator.load(finished / "stages/0004").sampler.nfe == 4
    one, two = (dict(Generator.load(finished / f"stages/{n}").network.named_parameters()) for n in ("0004", "0002"))
    first = dict(tiny().network.named_parameters())
    for before, after in ((first, one), (one, two)):
        assert min(float((after[k] - before[k]).detach().abs().max()) for k in one) > 1e-6, "every weight has moved"
    recipe = read_json(finished / "stages/0002/recipe.json")
    assert recipe["from"] == Generator.load(finished / "stages/0004").fingerprint(), "the student becomes the teacher"
    assert recipe["settings"]["start_steps"] == 4 and recipe["settings"]["steps"] == 2
    assert [e["step"] for e in log_of(finished)] == [1, 2]


def test_the_learning_rate_falls_to_zero_in_every_stage() -> None:
    optim = Progressive().optim
    assert optim.rate(0, 0.0) == optim.lr and optim.rate(10, 0.5) == optim.lr / 2 and optim.rate(99, 1.0) == 0


@pytest.mark.parametrize("stop", [0, 3, 5, 9])
def test_a_broken_run_goes_on_to_the_same_bits(stop: int, finished: Path, tmp_path: Path) -> None:
    if stop == 0:  # between the stages: the first is whole, and the second was never begun
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "stages/0002")
        for name in ("fewstep.json", "student.safetensors", "sampler.json"):
            (tmp_path / name).unlink()
        Run(tmp_path).rewind_log(1)
    else:
        with pytest.raises(Stop):
            run(tmp_path, stop=stop)
        assert not (tmp_path / "fewstep.json").exists()
        assert (tmp_path / "stages/0004/fewstep.json").exists() == (stop >= 5)
    torch.manual_seed(stop)
    run(tmp_path, resume=True)
    assert differing(whole(finished), whole(tmp_path)) == []
    assert told(finished) == told(tmp_path)


def test_resuming_a_finished_run_trains_nothing_and_changes_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    run(tmp_path, resume=True, stop=0)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before


def test_a_resume_that_forgets_something_would_be_noticed(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "seed", seed=1)
    assert len(differing(whole(finished), whole(tmp_path / "seed"))) > 10


def test_two_micro_batches_are_one_batch(finished: Path, tmp_path: Path) -> None:
    run(tmp_path, micro=1)
    one, two = whole(tmp_path), whole(finished)
    for name in (k for k in one if k.startswith("top/")):
        assert float((one[name] - two[name]).abs().max()) < 1e-5, name


def test_a_guided_teacher_is_first_made_one_network(tmp_path: Path) -> None:
    start = tiny()
    guided = Generator(CFG(start.denoiser, 2.0), start.sampler, conds=start.conds)
    made = run(tmp_path, start=guided, start_steps=4, budget=6)
    assert sorted(p.name for p in (tmp_path / "stages").iterdir()) == ["0002", "0004"]
    assert isinstance(made.denoiser, Precond) and made.sampler.nfe == 2
    settings = [read_json(tmp_path / f"stages/{n}/recipe.json")["settings"] for n in ("0004", "0002")]
    assert [(s["start_steps"], s["steps"]) for s in settings] == [(4, 4), (4, 2)]
    with pytest.raises(InputError, match="another recipe: from was"):
        run(tmp_path, start=Generator(CFG(start.denoiser, 3.0), start.sampler, conds=start.conds), start_steps=4,
            budget=6, resume=True)  # fmt: skip


def test_lora_stages_are_merged_before_the_next(tmp_path: Path) -> None:
    made = run(tmp_path, lora=LoRA(2), budget=6)
    assert isinstance(made.denoiser, Precond) and (tmp_path / "stages/0002/lora").exists()
    assert torch.equal(Generator.load(tmp_path).sample(2, progress=False), made.sample(2, progress=False))


def test_settings_run_as_a_whole(finished: Path, tmp_path: Path) -> None:
    method = Progressive(steps=2, start_steps=8, optim=STEADY)
    method.run(tiny(), tiny_data(), out=tmp_path, **OPTIONS)
    assert differing(whole(finished), whole(tmp_path)) == []


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Progressive(steps=0), "steps >= 1"),
        (lambda: Progressive(start_steps=0), "start_steps >= 1"),
        (lambda: Progressive(scale=0.0), "0 < scale < inf"),
        (lambda: Progressive(steps=3, start_steps=8), r"no multiple of it: use start_steps=6"),
        (lambda: Progressive(grid="cosin"), "unknown grid.*'cosine'"),
        (lambda: Progressive(weight="snr-trunc"), "unknown weight.*truncated-snr"),
        (lambda: Progressive(draw="both"), "unknown draw.*discrete"),
        (lambda: halvings(48, 5), r"reaches 24, 12, 6, 3, and not 5; 5 is reached from 10, 20, 40, 80"),
        (lambda: halvings(7, 2), r"from 7 it reaches nothing, and not 2; 2 is reached from 4, 8"),
        (lambda: halvings(4, 8), "1 <= steps <= start_steps, got 8 and 4"),
        (lambda: halvings(4, 0), "1 <= steps <= start_steps, got 0 and 4"),
        (lambda: halvings(4, 4), "nothing to do: raise start_steps"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def odd_data() -> Images:
    return Images("odd", torch.zeros(8, 1, 2, 2), torch.arange(8) % 3)


def pure_noise() -> Generator:
    start = copy.deepcopy(tiny())
    start.denoiser.sigma_max = PURE
    return start


def noise_from_pure() -> Generator:
    start = pure_noise()
    start.denoiser.predicts = "noise"
    return start


class Bare(Posterior):
    path = None


REFUSED: list[tuple[Callable[[], Generator], Any, dict[str, Any], str]] = [
    (tiny, None, {}, "learns from data and got none"),
    (tiny, odd_data(), {}, r"data hold \(1, 2, 2\) and the teacher takes \(1, 4, 4\)"),
    (tiny, tiny_data(), {"steps": 3}, "reaches 4, 2, 1, and not 3"),
    (tiny, tiny_data(), {"budget": "soon"}, "budget 'soon'"),
    (tiny, tiny_data(), {"bacth": 8}, "unknown training option.*bacth"),
    (pure_noise, tiny_data(), {"settings": Progressive(grid="karras")}, "Karras' grid cannot start at sigma 1e"),
    (noise_from_pure, tiny_data(), {}, "predicts noise says nothing of x0 at sigma 1e"),
    (lambda: Generator(bimodal(), euler(torch.tensor([1.0, 0.0]))), tiny_data(), {}, "data hold|no fingerprint"),
    (
        lambda: Generator(CFG(tiny().denoiser, 2.0), tiny().sampler, conds=tiny().conds),
        tiny_data(),
        {"lora": LoRA(2)},
        "LoRA cannot be trained on a CFG",
    ),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_runs_are_refused_before_anything_is_written(case: int, tmp_path: Path) -> None:
    make, data, options, said = REFUSED[case]
    settings = {"settings": SETTINGS, "start_steps": 8, "steps": 2} | OPTIONS | options
    with pytest.raises(InputError, match=said) as error:
        progressive(make(), data, out=tmp_path / "run", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_native_grid_needs_a_path() -> None:
    with pytest.raises(InputError, match="has no path, so no native grid"):
        Progressive(grid="native").levels(Bare(), 4)


def test_a_step_without_pictures_of_the_right_shape_is_refused() -> None:
    m = build_models(Progressive().roles(tiny()), "cpu")
    for batch, said in ((Batch(None, {}), "got None"), (Batch(torch.zeros(2, 1, 2, 2), {}), r"got \(1, 2, 2\)")):
        with pytest.raises(InputError, match=f"needs pictures of .*{said}"):
            next(Progressive().step(m, batch, 0, Noise.of(0, 2)))


def test_an_occupied_folder_and_another_recipe_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already holds files"):
        run(finished)
    with pytest.raises(InputError, match=r"another recipe: settings.start_steps was 8 and is 16"):
        run(finished, start_steps=16, resume=True)
    with pytest.raises(InputError, match=r"options.budget.amount was 15.0 and is 30.0"):
        run(finished, budget=30, resume=True)
    assert [b - a for a, b in pairwise(e["step"] for e in log_of(finished))] == [1], "nothing was written"
