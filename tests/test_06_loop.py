"""What the training loop promises of every method: budgets, rates, averages, frozen roles, bad gradients, precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch
from fewstep.core.fit import build_models, fit
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions, Report
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.state import Run, load_tensors
from fewstep.data.conditions import ConditionsOnly
from fewstep.errors import InputError, NonFiniteError
from tiny_runs import METHODS, Stop, bits, log_of, run

NOTHING = ConditionsOnly(None, size=32)


def linear(value: float = 0.5, size: int = 3) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = nn.Linear(size, 1)
        nn.init.constant_(made.weight, value)
        nn.init.constant_(made.bias, -value)
        return made

    return make


def fold(m: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in m.parameters()]).clone()


Step = Callable[[Models, Batch, int, Noise], Iterator[Update]]


@dataclass(frozen=True)
class Plain:
    """A method made of a table of roles and a step."""

    needs_data: ClassVar[bool] = False
    made: dict[str, Role]
    does: Step

    def roles(self, teacher: Any) -> dict[str, Role]:
        return self.made

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        return self.does(m, batch, i, noise)

    def sampler(self, teacher: Any) -> Any:
        return None


def go(method: Plain, steps: int | Budget, **options: Any) -> tuple[Models, list[Report]]:
    models = build_models(method.roles(None), "cpu")
    budget = steps if isinstance(steps, Budget) else Budget(steps)
    chosen = FitOptions(budget, **({"batch": 4, "log_every": 1} | options))
    return models, list(fit(method, models, NOTHING, chosen, None))


def regress(m: Models, noise: Noise) -> Tensor:
    x = noise.normal((3,), "x")
    return (m.net(x)[:, 0] - x.sum(1) + 2).square().mean()


# ---- budgets


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("2000", 2000, "steps"),
        (2000, 2000, "steps"),
        ("2000 steps", 2000, "steps"),
        ("1 step", 1, "steps"),
        ("2k", 2000, "steps"),
        ("200k images", 200_000, "images"),
        ("1.5M img", 1_500_000, "images"),
        ("90s", 90, "seconds"),
        ("5m", 300, "seconds"),
        (" 0.5 h ", 1800, "seconds"),
        (Budget(7, "images"), 7, "images"),
    ],
)
def test_budgets_are_read(text: Any, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize(
    "text", ["", "0", 0, -5, "-5", "many", "5 parsecs", "1.2.3", ".", "5 5", "s", "nan", "inf", None, True, "2 K"]
)
def test_bad_budgets_are_refused(text: Any) -> None:
    with pytest.raises(InputError, match=r"budget.*expected e\.g\. 2000 steps"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"micro": 0},
        {"batch": 8, "micro": 3},
        {"log_every": 0},
        {"patience": 0},
        {"save_every": -1},
        {"batch": 5, "micro": 2},
    ],
)
def test_bad_options_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError):
        FitOptions(**change)


def test_a_budget_of_images_stops_with_the_step_that_reaches_it() -> None:
    plain = Plain({"net": Role(linear(), Optim())}, lambda m, b, i, n: iter([Update("net", lambda: regress(m, n))]))
    for images, steps in ((1, 1), (4, 1), (5, 2), (12, 3)):
        _, reports = go(plain, Budget(images, "images"))
        assert [r.step for r in reports] == list(range(1, steps + 1)), images
        assert [r.done for r in reports] == [False] * (steps - 1) + [True]
        assert reports[-1].images == 4 * steps and reports[-1].progress == 1
    assert [r.step for r in go(plain, 7, log_every=3)[1]] == [3, 6, 7]


def test_a_budget_of_seconds_stops_and_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def tick() -> float:
        nonlocal now
        now += 0.5
        return now

    monkeypatch.setattr("fewstep.core.fit.time", SimpleNamespace(monotonic=tick))
    run("SFD", tmp_path / "whole", budget="5s")
    assert log_of(tmp_path / "whole")[-1]["step"] == 10
    facts, _ = Run(tmp_path / "whole").latest()
    assert facts["seconds"] == 5
    # A kill leaves the checkpoint of step 6, with three seconds spent: two are left.
    with pytest.raises(Stop):
        run("SFD", tmp_path / "cut", budget="5s", stop=7)
    now = 900.0
    run("SFD", tmp_path / "cut", budget="5s", resume=True)
    assert [e["step"] for e in log_of(tmp_path / "cut")] == [2, 4, 6, 8, 10]
    assert [e["seconds"] for e in Run(tmp_path / "cut").read_log()] == [1, 2, 3, 4, 5]


# ---- rates and averages


def test_the_learning_rate_runs_as_stated() -> None:
    warm = Optim(lr=2.0, warmup=3)
    assert [warm.rate(i, 0.0) for i in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert Optim(lr=2.0).rate(0, 0.0) == 2.0
    shares = (0.0, 0.25, 0.49, 0.5, 0.75, 1.0, 1.3)
    want = {
        "constant": [1.0] * 7,
        "linear": [1, 0.75, 0.51, 0.5, 0.25, 0, 0],
        "cosine": [1, (1 + math.cos(math.pi / 4)) / 2, None, 0.5, (1 - math.cos(math.pi / 4)) / 2, 0, 0],
        "drop": [1, 1, 1, 0.1, 0.1, 0.1, 0.1],
    }
    for decay, values in want.items():
        for share, value in zip(shares, values, strict=True):
            if value is not None:
                assert Optim(lr=1.0, decay=decay).rate(9, share) == pytest.approx(value, abs=1e-12), (decay, share)
    for bad in ({"lr": 0}, {"clip": 0}, {"warmup": -1}, {"decay": "step"}):
        with pytest.raises(InputError):
            Optim(**bad)


def test_the_loop_steps_at_the_stated_rate() -> None:
    """SGD by way of Adam: a constant gradient moves a weight by the learning rate."""
    optim = Optim(lr=0.1, warmup=1, decay="linear", betas=(0.0, 0.0))
    plain = Plain(
        {"net": Role(linear(0.0), optim)}, lambda m, b, i, n: iter([Update("net", lambda: fold_live(m.net).sum())])
    )
    models, _ = go(plain, 4)
    moved = -fold(models.net)
    want = sum(optim.rate(i, i / 4) for i in range(4))
    assert want == pytest.approx(0.1 * (0.5 + 0.75 + 0.5 + 0.25))
    assert float((moved - want).abs().max()) < 1e-6


def fold_live(m: nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in m.parameters()])


def profile(ema: Ema, steps: int) -> Tensor:
    """The weight of each step's weights in the average after all of them, by the recursion of the loop."""
    weights = torch.zeros(steps, dtype=torch.float64)
    for t in range(steps):
        decay = ema.decay(t)
        weights *= decay
        weights[t] += 1 - decay
    return weights


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_power_average_has_the_stated_profile_and_width(width: float) -> None:
    steps = 2000
    w, t = profile(Ema(power=width), steps), torch.arange(1, steps + 1, dtype=torch.float64)
    assert float(w.sum()) == pytest.approx(1, abs=1e-12)
    centre = (w * t).sum()
    assert float((w * (t - centre) ** 2).sum().sqrt()) / steps == pytest.approx(width, rel=5e-3)
    gamma = float((w[1999] / w[999]).log2())  # (t / T)^gamma between the middle and the end
    ideal = (gamma + 1) * (t / steps) ** gamma / steps
    assert float((w - ideal).abs().max() / ideal.max()) < 0.01


def test_the_constant_average_ramps_up() -> None:
    ema = Ema(rate=0.99)
    assert [ema.decay(i) for i in (0, 1, 90)] == [0.1, 2 / 11, 91 / 100]
    assert ema.decay(880) == 881 / 890 < 0.99 and ema.decay(900) == ema.decay(10**6) == 0.99
    for bad in ({}, {"rate": 0.9, "power": 0.1}, {"rate": 1.0}, {"power": 0.3}, {"power": 0}):
        with pytest.raises(InputError):
            Ema(**bad)


def test_the_loops_average_is_the_weighted_mean_of_the_weights() -> None:
    seen: list[Tensor] = []

    def step(m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        for _ in range(2):  # two updates a step: the average moves with each
            yield Update("net", lambda: regress(m, noise))
            seen.append(fold(m.net))

    for ema in (Ema(rate=0.9), Ema(power=0.1)):
        seen.clear()
        models, _ = go(Plain({"net": Role(linear(), Optim(lr=0.1), ema)}, step), 5)
        start = fold(linear()())
        w = profile(ema, 10)
        want = (1 - w.sum()) * start + (w[:, None] * torch.stack(seen)).sum(0)
        assert float((fold(models.ema("net")) - want).abs().max()) < 1e-6
        assert float((fold(models.ema("net")) - seen[-1]).abs().max()) > 1e-3
        assert not any(p.requires_grad for p in models.ema("net").parameters())


# ---- gradients that are not finite, or too large


def sometimes(bad: Callable[[int], bool], optim: Optim = Optim(lr=0.1), **how: Any) -> tuple[Plain, dict[int, Tensor]]:  # noqa: B008
    before: dict[int, Tensor] = {}

    def step(m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        before[i] = torch.cat([fold(m.net), fold(m.ema("net"))])
        factor = how.get("factor", math.nan) if bad(i) else 1.0
        yield Update("net", lambda: {"loss": regress(m, noise) * factor, "other": torch.ones(())})

    return Plain({"net": Role(linear(), optim, Ema(rate=0.9))}, step), before


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e38])
def test_a_non_finite_update_is_skipped_without_a_trace(factor: float) -> None:
    method, before = sometimes(lambda i: i in (0, 3), factor=factor)
    models, reports = go(method, 6, micro=2)
    assert [r.skipped for r in reports] == [1, 1, 1, 2, 2, 2]
    changed = [not torch.equal(before[i][:4], before[i + 1][:4]) for i in range(5)]
    assert changed == [False, True, True, False, True]
    # A network that never saw the bad steps: the same moments, the same count, the same weights.
    clean, other = sometimes(lambda i: False)
    skipping = replace(clean, does=lambda m, b, i, n: iter(()) if i in (0, 3) else clean.does(m, b, i, n))
    assert torch.equal(fold(go(skipping, 6, micro=2)[0].net), fold(models.net))
    assert other.keys() == {1, 2, 4, 5}
    assert math.isfinite(reports[1].losses["net/loss"]) and reports[1].losses["net/other"] == 1


def test_adams_state_is_untouched_by_a_skipped_update(tmp_path: Path) -> None:
    method, _ = sometimes(lambda i: i == 2)
    kept = Run(tmp_path, keep=9)
    models = build_models(method.roles(None), "cpu")
    list(fit(method, models, NOTHING, FitOptions(Budget(4), batch=4, save_every=1, micro=2), kept))
    states = [checkpoint(p) for p in kept.checkpoints()]
    optim = [{k: v for k, v in s.items() if "optim" in k or k.startswith("roles/net:")} for s in states]
    assert all(torch.equal(optim[1][k], optim[2][k]) for k in optim[1])
    assert not any(torch.equal(optim[2][k], optim[3][k]) for k in optim[2])
    assert float(optim[3]["optim/net:weight/step"]) == 3


def checkpoint(folder: Path) -> dict[str, Tensor]:
    files = folder.rglob("*.safetensors")
    return {f"{f.relative_to(folder).with_suffix('')}:{k}": t for f in files for k, t in load_tensors(f).items()}


def test_too_many_in_a_row_stop_training() -> None:
    method, before = sometimes(lambda i: i >= 4)
    with pytest.raises(NonFiniteError, match=r"3 non-finite updates of 'net' in a row from step 4 \(loss nan\)"):
        go(method, 50, patience=3)
    assert max(before) == 6, "stopped at once, not at the next report"
    with pytest.raises(NonFiniteError):
        go(sometimes(lambda i: i >= 4)[0], 50, patience=3, log_every=50)


def test_alternating_failures_never_stop_training() -> None:
    method, _ = sometimes(lambda i: i % 3 != 0)
    assert go(method, 30, patience=3)[1][-1].skipped == 20


def test_the_count_of_failures_survives_a_resume(tmp_path: Path) -> None:
    method, _ = sometimes(lambda i: i in (1, 2, 3))
    options = FitOptions(Budget(6), batch=4, save_every=3, log_every=1, patience=3)
    for steps in (0, 3):
        models = build_models(method.roles(None), "cpu")
        reports = fit(method, models, NOTHING, options, Run(tmp_path), start=steps)
        with pytest.raises(NonFiniteError, match="from step 1"):
            list(reports)


def test_a_huge_gradient_is_clipped_to_the_stated_norm() -> None:
    """Adam forgets the size of a first gradient, so a second, huge one must weigh as one of the clipped norm."""
    ends = []
    for factor in (1e6, 1.0):
        for clip in (2.0, None):

            def step(m: Models, batch: Batch, i: int, noise: Noise, factor: float = factor) -> Iterator[Update]:
                size = 0.1 if i == 0 else factor  # of each of four entries, so that 1.0 is a norm of two
                sign = torch.tensor([1.0, -1.0, 1.0, 1.0]) if i else 1.0
                yield Update("net", lambda: (fold_live(m.net) * sign).sum() * size)

            models, reports = go(Plain({"net": Role(linear(), Optim(lr=0.1, clip=clip))}, step), 2)
            ends.append(fold(models.net))
            assert reports[1].losses["net/grad_norm"] == pytest.approx(2 * factor), "the norm before clipping"
    huge, unclipped, plain, unchanged = ends
    assert float((huge - plain).abs().max()) < 1e-6 and torch.equal(plain, unchanged)
    assert float((huge - unclipped).abs().max()) > 1e-3


# ---- precision


def test_bf16_computes_in_bf16_and_keeps_float32(tmp_path: Path) -> None:
    run("SiD", tmp_path / "low", bf16=True)
    run("SiD", tmp_path / "full")
    low, full = bits(tmp_path / "low"), bits(tmp_path / "full")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in low.values())
    far = max(float((low[k] - full[k]).abs().max()) for k in low if "roles/fake" in k)
    assert 1e-5 < far < 0.1, "it must have an effect, and a small one"
    seen = set()

    def step(m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        seen.add(("step", m.net(torch.ones(2, 3)).dtype))
        yield Update("net", lambda: seen.add(("loss", m.net(torch.ones(2, 3)).dtype)) or regress(m, noise))

    go(Plain({"net": Role(linear(), Optim())}, step), 2, bf16=True)
    assert seen == {("step", torch.bfloat16), ("loss", torch.bfloat16)}
    assert not torch.is_autocast_enabled("cpu")


def test_the_methods_are_values() -> None:
    for method in METHODS.values():
        assert method == replace(method) and hash(method) == hash(replace(method))
