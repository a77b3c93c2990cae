"""Gradients of the training methods against closed forms on Gaussians, and what reaches which parameter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch
from fewstep.core.denoiser import CountingDenoiser
from fewstep.core.fit import build_models, fit
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.role import Models, Optim, Role
from fewstep.data import Images
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill import SFD, SiD
from fewstep.distill.sid import sid_loss
from fewstep.errors import InputError
from fewstep.loss.draw import KarrasUniform, LogNormal, edm_weight
from fewstep.loss.dsm import dsm
from fewstep.train import EDMTraining, untrained

# Four equally likely points whose moments up to the second are those of two independent unit Gaussians: the mean of a
# quadratic over them is its exact expectation.
Z = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
N = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
CASES = [(1.0, 0.7, 0.4, 0.5), (0.5, -1.3, 1.1, 2.0), (2.0, 0.2, 2.5, 0.8)]  # S, th, c, s


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def gaussian_sid(S: float, th: float, c: float, s: float, alpha: float, *, detach: bool = False) -> tuple[float, ...]:
    """Value and gradient in (th, c) of SiD's expected loss *without* its weight, taken from `sid_loss` itself.

    The four points are the pixels of one picture, so omega is one number: multiplying by it undoes the weight exactly.
    """
    mean, scale = scalar(th), scalar(c)
    a, b = S**2 / (S**2 + s**2), c**2 / (c**2 + s**2)
    x = mean + scale * Z
    y = x + s * N
    d_teacher, d_fake = a * y, b * y + (1 - b) * th
    if detach:
        d_teacher = d_teacher.detach()
    omega = float((x - a * y).detach().abs().mean())
    assert omega > 1e-3, "the floor of omega would be in the way"
    loss = sid_loss(x, d_teacher, d_fake, alpha)["loss"] * omega
    by_mean, by_scale = torch.autograd.grad(loss, [mean, scale])
    return float(loss.detach()), float(by_mean), float(by_scale)


# ---- SiD


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("case", CASES)
def test_sid_has_the_gradient_of_the_closed_form(case: tuple[float, float, float, float], alpha: float) -> None:
    S, th, c, s = case
    a, b = S**2 / (S**2 + s**2), c**2 / (c**2 + s**2)
    value, by_mean, by_scale = gaussian_sid(S, th, c, s, alpha)
    assert value == pytest.approx((1 - alpha) * ((a - b) ** 2 * (c**2 + s**2) + th**2 * (1 - a) ** 2), abs=1e-12)
    assert by_mean == pytest.approx(th * (1 - a) * ((1 - b) + 2 * (alpha - 1) * (a - b)), rel=1e-10, abs=1e-12)
    assert by_scale == pytest.approx(-2 * c * (a - b) * ((1 - b) + (alpha - 1) * (a - b)), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_sid_at_alpha_one_half_is_half_the_gradient_of_the_true_fisher_divergence(
    case: tuple[float, float, float, float],
) -> None:
    S, th, c, s = case
    mean, scale = scalar(th), scalar(c)
    a, b = S**2 / (S**2 + s**2), scale**2 / (scale**2 + s**2)  # the fake score follows the student
    fisher = (a - b) ** 2 * (scale**2 + s**2) + mean**2 * (1 - a) ** 2
    by_mean, by_scale = torch.autograd.grad(fisher, [mean, scale])
    _, *got = gaussian_sid(S, th, c, s, 0.5)
    assert got == pytest.approx([float(by_mean) / 2, float(by_scale) / 2], rel=1e-10)
    _, *full = gaussian_sid(S, th, c, s, 1.2)
    assert max(abs(g - f) for g, f in zip(got, full, strict=True)) > 1e-3, "alpha must matter"


@pytest.mark.parametrize("case", CASES)
def test_detaching_the_teacher_changes_the_gradient(case: tuple[float, float, float, float]) -> None:
    right, wrong = gaussian_sid(*case, 1.0), gaussian_sid(*case, 1.0, detach=True)
    assert right[0] == pytest.approx(wrong[0], abs=1e-12)
    assert max(abs(r - w) for r, w in zip(right[1:], wrong[1:], strict=True)) > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_equal_scores_give_zero(alpha: float) -> None:
    x = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    out = sid_loss(x, 0.3 * x + x**2, 0.3 * x + x**2, alpha)
    out["loss"].backward()
    assert float(out["loss"].detach()) == 0 and float(out["fisher"]) == 0
    # Two equal graphs of opposite sign: what is left is the rounding of their sum.
    assert float(x.grad.abs().max()) < 1e-15


def test_sid_loss_is_the_written_out_formula_with_one_detached_weight_per_picture() -> None:
    g = torch.Generator().manual_seed(1)
    x, t, f = (torch.randn(6, 2, 3, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        omega = (x[i] - t[i]).abs().mean().detach()
        d = t[i] - f[i]
        expected = expected + (d * (f[i] - x[i]) + (1 - 1.2) * d**2).mean() / omega / 6
    out = sid_loss(x, t, f, 1.2)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert float(out["fisher"]) == pytest.approx((t - f).square().mean().item(), rel=1e-12)
    for got, want in zip(
        torch.autograd.grad(out["loss"], [x, t, f]), torch.autograd.grad(expected, [x, t, f]), strict=True
    ):
        assert float((got - want).abs().max()) < 1e-12
    flat = sid_loss(x, x + 1e-9, x, 1.0)  # a perfect student: the floor of the weight keeps the loss finite
    assert abs(flat["loss"].item()) < 1e-4


class Scores(nn.Module):
    """A denoiser ``gain * x + shift`` that can hide its input's gradient."""

    def __init__(self, gain: float, shift: float, *, detach: bool = False) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.tensor(gain)), nn.Parameter(torch.tensor(shift))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 2, 2), 0.002, 80.0, 0.5
        self.detach = detach
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor | float, cond: object = None) -> Tensor:
        self.seen.append((x.detach().clone(), torch.as_tensor(sigma).detach().clone()))
        return self.gain * (x.detach() if self.detach else x) + self.shift


def sid_updates(hide: tuple[str, ...] = ()) -> tuple[Models, dict[str, Callable]]:
    method = SiD(alpha=1.2)
    made = {"teacher": (0.6, 0.0), "fake": (0.5, 0.1), "student": (0.9, 0.2)}
    roles = {n: Role(lambda n=n, v=v: Scores(*v, detach=n in hide)) for n, v in made.items()}
    models = build_models(roles, "cpu")
    updates = method.step(models, Batch(None, {}), 0, Noise.of(3, 16))
    return models, {u.role: u.loss for u in updates}


def test_sid_reaches_its_student_through_both_scores_and_no_other_parameter() -> None:
    slopes = {}
    for hide in ((), ("teacher",), ("fake",)):
        m, losses = sid_updates(hide)
        assert list(losses) == ["fake", "student"], "the fake score learns first"
        m.student.requires_grad_(True)
        losses["student"]()["loss"].backward()
        assert all(p.grad is None for p in [*m.teacher.parameters(), *m.fake.parameters()])
        slopes[hide] = torch.stack([m.student.gain.grad, m.student.shift.grad])
        assert float(slopes[hide].abs().min()) > 0
    assert float((slopes[()] - slopes[("teacher",)]).abs().max()) > 1e-3
    assert float((slopes[()] - slopes[("fake",)]).abs().max()) > 1e-3


def test_the_fake_score_learns_from_detached_samples_on_noise_of_its_own() -> None:
    m, losses = sid_updates()
    m.student.requires_grad_(True)
    m.fake.requires_grad_(True)
    losses["fake"]().backward()
    assert all(p.grad is None for p in m.student.parameters())
    assert all(float(p.grad.abs()) > 0 for p in m.fake.parameters())
    losses["student"]()
    by_fake, by_student = m.student.seen
    assert float((by_fake[0] - by_student[0]).abs().min()) > 0, "separate noise"
    assert by_fake[0].std() == pytest.approx(2.5, rel=0.2) and float(by_fake[1]) == 2.5
    teacher, fake = m.teacher.seen[-1], m.fake.seen[-1]
    assert torch.equal(teacher[0], fake[0]) and torch.equal(teacher[1], fake[1]), "both scores at the same point"


# ---- denoising


@pytest.mark.parametrize(("mu", "S", "s"), [(0.3, 0.5, 0.7), (-1.0, 1.5, 0.05), (0.0, 0.2, 10.0)])
def test_dsm_on_gaussian_data_has_the_posterior_mean_as_its_minimum(mu: float, S: float, s: float) -> None:
    x0, sigma, weight = mu + S * Z, torch.tensor([s], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    best = S**2 / (S**2 + s**2)
    for gain, shift in ((best, (1 - best) * mu), (0.8, -0.2), (0.1, 0.4)):
        w, v = scalar(gain), scalar(shift)
        loss = dsm(lambda y, level, cond, w=w, v=v: w * y + v, x0, N, sigma, weight)
        bias = (gain - 1) * mu + shift
        assert loss.item() == pytest.approx(3 * ((gain - 1) ** 2 * S**2 + gain**2 * s**2 + bias**2), rel=1e-12)
        by_w, by_v = torch.autograd.grad(loss, [w, v])
        want = 6 * ((gain - 1) * S**2 + gain * s**2 + bias * mu)
        assert float(by_w) == pytest.approx(want, abs=1e-10) and float(by_v) == pytest.approx(6 * bias, abs=1e-10)
        at_best = gain == best
        assert (abs(float(by_w)) < 1e-10 and abs(float(by_v)) < 1e-10) == at_best


def test_a_network_that_says_nothing_has_unit_loss_at_every_level() -> None:
    # edm() scales by the rounded deviation of the data, 0.5 here; the last layer starts at zero.
    net = untrained(
        Images("two", 0.5 * Z.float().reshape(4, 1, 1, 1)), "resmlp", width=8, embedding=8, blocks=1
    ).denoiser
    assert net.sigma_data == 0.5
    x0, n = 0.5 * Z.float().reshape(4, 1, 1, 1), N.float().reshape(4, 1, 1, 1)
    for s in (0.002, 0.1, 0.5, 3.0, 80.0):
        sigma = torch.full((4,), s)
        with torch.no_grad():
            assert float(dsm(net, x0, n, sigma, edm_weight(sigma, 0.5))) == pytest.approx(1, rel=1e-4)


class Watching(nn.Module):
    """A student that remembers its arguments and returns zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def forward(self, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.x, self.sigma, self.label = x.detach(), sigma.detach(), cond["label"]
        return self.weight * x


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_class_dropout_hides_the_stated_share_of_labels(share: float) -> None:
    models = build_models({"student": Role(Watching)}, "cpu")
    count = 20000
    label = torch.arange(count) % 10
    batch = Batch(torch.zeros(count, 1, 1, 1), {"label": label})
    (update,) = EDMTraining(class_dropout=share).step(models, batch, 0, Noise.of(0, count))
    update.loss()
    seen = models.student.label
    hidden = seen == -1
    assert float(hidden.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))
    assert torch.equal(seen[~hidden], label[~hidden])
    unit = models.student.x[:, 0, 0, 0] / models.student.sigma
    assert abs(float(unit.mean())) < 0.03 and float(unit.std()) == pytest.approx(1, abs=0.03)
    if 0 < share < 1:  # what is hidden has nothing to do with the noise level
        assert abs(float(models.student.sigma[hidden].log().mean() + 1.2)) < 0.15


# ---- draws


def test_the_log_normal_draw_has_the_stated_moments_and_weight() -> None:
    sigma, weight = LogNormal(mean=-1.2, std=1.2)(Noise.of(0, 40000), 0.5)
    logs = sigma.double().log()
    assert abs(float(logs.mean()) + 1.2) < 0.03 and abs(float(logs.std()) - 1.2) < 0.03
    assert abs(float(((logs + 1.2) / 1.2).pow(4).mean()) - 3) < 0.2
    want = (sigma.double() ** 2 + 0.25) / (0.5 * sigma.double()) ** 2
    assert float((weight / want - 1).abs().max()) < 1e-5
    assert sigma.dtype == weight.dtype == torch.float32 and sigma.shape == weight.shape == (40000,)


@pytest.mark.parametrize(("top", "highest"), [(0.8, 24.4), (1.0, 80.0), (0.3, 0.318)])
def test_the_karras_draw_is_uniform_in_its_coordinate(top: float, highest: float) -> None:
    sigma, weight = KarrasUniform(top=top)(Noise.of(0, 20000), 0.5)
    assert torch.equal(weight, torch.ones(20000))
    assert 0.002 <= float(sigma.min()) < 0.0021 and float(sigma.max()) == pytest.approx(highest, rel=0.02)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    u = ((sigma.double() ** (1 / 7) - low) / (high - low) / top).sort().values
    assert float((u - torch.linspace(0, 1, 20000)).abs().max()) < 0.02


@pytest.mark.parametrize("make", [lambda: LogNormal(std=0), lambda: KarrasUniform(top=0), lambda: KarrasUniform(top=2)])
def test_draws_refuse_what_is_no_density(make: Callable) -> None:
    with pytest.raises(InputError):
        make()


# ---- SFD


class Posterior(nn.Module):
    """The exact denoiser of N(0, 1), as a module; remembers the levels it is asked for."""

    def __init__(self, sigma_max: float = 80.0) -> None:
        super().__init__()
        self.shape, self.sigma_min, self.sigma_max, self.sigma_data = (1,), 0.002, sigma_max, 1.0
        self.asked: list[float] = []

    def forward(self, x: Tensor, sigma: Tensor | float, cond: object = None) -> Tensor:
        self.asked.append(float(sigma))
        return x / (1 + float(sigma) ** 2)


class Slopes(Posterior):
    """A student with one slope a level, the teacher's at first."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__(float(levels[0]))
        self.levels = levels
        self.slopes = nn.Parameter((1 / (1 + levels[:-1] ** 2)).float())

    def forward(self, x: Tensor, sigma: Tensor | float, cond: object = None) -> Tensor:
        return self.slopes[int((self.levels - float(sigma)).abs().argmin())] * x


def sfd_models(method: SFD, sigma_max: float) -> Models:
    levels = method.levels(method.sigma_min or 0.006, sigma_max)[0]
    roles = {"teacher": Role(lambda: Posterior(sigma_max)), "student": Role(lambda: Slopes(levels), method.optim)}
    return build_models(roles, "cpu")


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("between", [0, 1, 2, 3])
def test_the_teachers_kept_points_are_the_students_levels(steps: int, between: int) -> None:
    method = SFD(steps=steps, between=between)
    coarse, fine = method.levels(0.006, 80.0)
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    own = (80 ** (1 / 7) + ramp * (0.006 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert float(((coarse - own) / own).abs().max()) < 1e-12
    assert len(fine) == steps * (between + 1) + 1
    assert float((fine[:: between + 1] / coarse - 1).abs().max()) < 1e-12
    m = sfd_models(method, 80.0)
    count = len(list(method.step(m, Batch(None, {}), 0, Noise.of(0, 2))))
    assert count == steps, "one update a student step"
    assert m.teacher.asked == pytest.approx(fine[:-1].tolist(), rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_shipped_sampler_costs_the_stated_evaluations(steps: int) -> None:
    method, start = SFD(steps=steps), untrained(Images("x", torch.randn(8, 1, 2, 2)), "resmlp", width=8, embedding=8)
    table = method.sampler(start)
    counting = CountingDenoiser(start.denoiser)
    with torch.no_grad():
        table(counting, table.start * torch.randn(3, 1, 2, 2))
    assert table.nfe == counting.nfe == steps
    assert torch.equal(table.levels, method.levels(0.006, 80.0)[0])
    assert SiD(sigma_init=3.0).sampler(start).nfe == 1 and SiD(sigma_init=3.0).sampler(start).start == 3.0


def test_a_step_that_the_teacher_takes_alike_has_no_loss() -> None:
    # A single step of the multistep teacher is Euler's, so there is nothing to learn; with levels between there is.
    for between, zero in ((0, True), (3, False)):
        method = SFD(steps=1, between=between)
        m = sfd_models(method, 80.0)
        (update,) = method.step(m, Batch(None, {}), 0, Noise.of(0, 64))
        assert (update.loss().item() < 1e-5) == zero


def test_the_loss_of_a_step_does_not_reach_earlier_steps() -> None:
    method = SFD(steps=4)
    m = sfd_models(method, 80.0)
    for k, update in enumerate(method.step(m, Batch(None, {}), 0, Noise.of(0, 32))):
        m.student.requires_grad_(True)
        update.loss().backward()
        reached = m.student.slopes.grad != 0
        assert reached.tolist() == [i == k for i in range(4)]
        m.student.slopes.grad = None
        m.student.requires_grad_(False)


def test_every_step_starts_where_the_student_itself_arrived() -> None:
    method = SFD(steps=3, between=1)
    m, levels, seen = sfd_models(method, 80.0), method.levels(0.006, 80.0)[0], []
    m.student.slopes.data *= 0.5
    m.student.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for update in method.step(m, Batch(None, {}), 0, Noise.of(0, 32)):
        update.loss()
    x = 80.0 * Noise.of(0, 32).normal((1,), "start")
    for k in range(3):
        assert float((seen[k] - x).abs().max()) < 1e-5 * float(x.abs().max()), k
        ratio = float(levels[k + 1] / levels[k])
        x = ratio * x + (1 - ratio) * m.student.slopes[k] * x
    assert len(seen) == 3, "one pass for each step"


def test_an_affine_student_learns_the_exact_slope_of_every_step() -> None:
    method = SFD(steps=2, between=11, sigma_min=0.1, optim=Optim(lr=0.03, decay="linear"))
    m = sfd_models(method, 5.0)
    a, b = m.student.levels[:-1], m.student.levels[1:]
    exact = ((1 + b**2) / (1 + a**2)).sqrt()

    def moves() -> Tensor:
        return b / a + (1 - b / a) * m.student.slopes.detach()

    assert float((moves() - exact).abs().min()) > 0.05, "Euler must be wrong at first"
    list(fit(method, m, ConditionsOnly(None), FitOptions(Budget(160), batch=16), None))
    assert float((moves() - exact).abs().max()) < 3e-3
    x = 5.0 * Noise.of(1, 500).normal((1,), "x")
    # N(0, 1) noised at level 5 has variance 26; the flow carries it to 1 + 0.1^2.
    end = method.sampler(type("G", (), {"denoiser": m.teacher}))(m.student, x)
    assert float((end - x * math.sqrt(1.01 / 26)).abs().max()) < 0.05
