"""Adversarial consistency distillation: its parent without the game, the two sides of the game, and runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.cond import Batch
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Ema, Models, Update
from fewstep.data.conditions import ImageConditions
from fewstep.data.sr import SuperResolution
from fewstep.distill.adversarial_consistency import AdversarialCD
from fewstep.distill.consistency import CD
from fewstep.errors import InputError
from fewstep.guide import CFG
from fewstep.loss.gan import ADVERSARIAL
from fewstep.models.consistency import ConsistencyPrecond
from fewstep.models.discriminator import judged
from fewstep.models.image_conditioned import ImageConditioned, image_conditioned
from fewstep.train import train
from tiny_runs import STEADY, StopsAfter, bits, check_restart, differing, run, tiny, tiny_data

CONSISTENCY: dict[str, Any] = {
    "optim": STEADY,
    "target": "ema",
    "target_ema": Ema(rate=0.9),
    "levels": 6,
    "weighted": False,
}
SMALL: dict[str, Any] = {**CONSISTENCY, "heads": STEADY, "hidden": 8}


def data() -> SuperResolution:
    return SuperResolution(tiny_data())


def teacher() -> Generator:
    """A tiny translator from 2x2 to 4x4 pictures."""
    made = tiny()
    net = tiny(width=16, embedding=8, blocks=1).denoiser
    D = image_conditioned(net, (1, 2, 2))  # type: ignore[arg-type]
    D.net.extra.weight.data += 0.3 * torch.randn(16, 4, generator=torch.Generator().manual_seed(3))  # type: ignore[union-attr, operator]
    return replace(made, denoiser=D, conds=ImageConditions(data()))


def batch(n: int = 8) -> Batch:
    return data().take(torch.arange(n))


def updates(method: CD, m: Models, progress: float = 0.5) -> tuple[list[Update], list[Any]]:
    """The updates of a step and what each loses; roles are open as in the loop."""
    m.progress, found, losses = progress, [], []
    for update in method.step(m, batch(), 0, Noise.of(1, 8)):
        for name in update.roles:
            m.networks[name].requires_grad_(True)
        found.append(update)
        losses.append(update.loss())
        for name in update.roles:
            m.networks[name].requires_grad_(False)
    return found, losses


def test_without_the_game_it_is_its_parent_bit_for_bit(tmp_path: Path) -> None:
    assert set(AdversarialCD(adversarial=0).roles(teacher())) == {"teacher", "student"}
    run("CD", tmp_path / "parent", method=CD(**CONSISTENCY))
    run("CD", tmp_path / "own", method=AdversarialCD(adversarial=0.0, **SMALL))
    assert differing(bits(tmp_path / "parent"), bits(tmp_path / "own")) == []


def test_the_consistency_part_is_the_parents_and_the_rest_the_weighted_game() -> None:
    m = build_models(AdversarialCD(**SMALL).roles(teacher()), "cpu")
    _, (parent,) = updates(CD(**CONSISTENCY), m)
    for weight in (0.1, 2.0):
        made, (losses, heads) = updates(AdversarialCD(adversarial=weight, **SMALL), m)
        assert [u.role for u in made] == ["student", "heads"]
        assert float(losses["agreement"]) == pytest.approx(float(parent), rel=1e-6)
        assert float(losses["loss"]) == pytest.approx(float(losses["agreement"] + weight * losses["fooled"]), rel=1e-6)
        assert abs(float(losses["fooled"])) > 1e-4 and float(heads["loss"]) > 0
    weighted = {"weighted": True}
    parent = updates(CD(**{**CONSISTENCY, **weighted}), m)[1][0]
    own = updates(AdversarialCD(**{**SMALL, **weighted}), m)[1][0]["agreement"]
    assert float(own) == pytest.approx(float(parent), rel=1e-6)


def test_the_game_pushes_estimates_towards_what_the_heads_call_real() -> None:
    m = build_models(AdversarialCD(**SMALL).roles(teacher()), "cpu")
    slopes = {}
    for weight in (1e-9, 50.0):
        m.student.requires_grad_(True)
        step = AdversarialCD(adversarial=weight, **SMALL).step(m, batch(), 0, Noise.of(1, 8))
        losses: Any = next(step).loss()
        slopes[weight] = torch.autograd.grad(losses["loss"], list(m.student.parameters()), allow_unused=True)
        m.student.requires_grad_(False)
    pairs = zip(slopes[1e-9], slopes[50.0], strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs if a is not None and b is not None) > 1e-4
    assert all(p.grad is None for p in [*m.teacher.parameters(), *m.heads.parameters()])


def test_the_heads_see_the_estimates_that_the_student_was_trained_on() -> None:
    m = build_models(AdversarialCD(**SMALL).roles(teacher()), "cpu")
    seen: list[torch.Tensor] = []
    hook = m.student.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    _, (losses, heads) = updates(AdversarialCD(**SMALL), m)
    hook.remove()
    assert len(seen) == 1, "one evaluation of the student serves both updates"
    method, noise, x0 = AdversarialCD(**SMALL), Noise.of(1, 8), batch().x
    assert x0 is not None
    s, _ = method.draw(noise.fold("judge"), m.student.sigma_data)
    s = s.clamp(m.teacher.sigma_min, m.teacher.sigma_max)
    z = [s.reshape(-1, 1, 1, 1) * noise.normal((1, 4, 4), "judge", part) for part in ("fake", "real")]
    on_fake = judged(m.teacher, m.heads, seen[0] + z[0], s, batch().cond)
    on_real = judged(m.teacher, m.heads, x0 + z[1], s, batch().cond)
    assert float(losses["fooled"].detach()) == pytest.approx(float(ADVERSARIAL["hinge"].generator(on_fake)), rel=1e-5)
    wanted = ADVERSARIAL["hinge"].discriminator(on_real, on_fake)
    assert float(heads["loss"].detach()) == pytest.approx(float(wanted), rel=1e-5)
    # The condition reaches the features: another picture beside the same one is judged otherwise.
    other = judged(m.teacher, m.heads, seen[0] + z[0], s, {"image": batch().cond["image"].flip(0)})
    assert float((other - on_fake).abs().max()) > 1e-4


def test_the_game_can_start_later_and_be_penalised() -> None:
    m = build_models(AdversarialCD(**SMALL).roles(teacher()), "cpu")
    early = updates(AdversarialCD(after=0.5, **SMALL), m, 0.4)[1]
    late = updates(AdversarialCD(after=0.5, **SMALL), m, 0.6)[1]
    assert "fooled" not in early[0] and "fooled" in late[0]
    assert float(early[1]["loss"].detach()) == pytest.approx(float(late[1]["loss"].detach()), rel=1e-6)
    more = updates(AdversarialCD(penalty=3.0, **SMALL), m)[1][1]["loss"]
    assert float(more.detach()) > float(late[1]["loss"].detach()) + 1e-6


def test_a_guided_teacher_is_distilled_with_its_guidance() -> None:
    start = tiny()
    m = build_models(AdversarialCD(**SMALL).roles(replace(start, denoiser=CFG(start.denoiser, 3.0))), "cpu")
    labelled = Batch(tiny_data().pixels[:8], {"label": torch.arange(8) % 3})
    step = AdversarialCD(**SMALL).step(m, labelled, 0, Noise.of(1, 8))
    losses: Any = next(step).loss()
    assert float(losses["loss"]) != 0 and isinstance(m.student, ConsistencyPrecond)


def trained(out: Path, stop: int | None = None, **options: Any) -> Generator:
    options = {"batch": 8, "micro": 2, "log_every": 2, "save_every": 3, "progress": False} | options
    source: Any = data() if stop is None else StopsAfter(data(), stop * options["micro"])
    return train(teacher(), AdversarialCD(after=0.3, **SMALL), source, out=out, budget=6, **options)


def test_a_resumed_run_and_micro_batches(tmp_path: Path) -> None:
    check_restart(tmp_path, lambda out, **more: trained(out, **more), far=1e-5)
    made = Generator.load(tmp_path / "whole")
    assert isinstance(made.denoiser, ConsistencyPrecond) and isinstance(made.denoiser.net, ImageConditioned)
    assert made.sample(2, batch(2).cond, progress=False).shape == (2, 1, 4, 4)
    assert any("roles/heads" in k for k in bits(tmp_path / "whole"))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: AdversarialCD(adversarial=-0.1), "AdversarialCD needs adversarial >= 0"),
    (lambda: AdversarialCD(after=1.0), "0 <= after < 1"),
    (lambda: AdversarialCD(penalty=-1.0), "penalty >= 0"),
    (lambda: AdversarialCD(penalty=math.nan), "penalty >= 0"),
    (lambda: AdversarialCD(adversarial=math.inf), "AdversarialCD needs adversarial >= 0"),
    (
        lambda: next(
            AdversarialCD(**SMALL).step(
                build_models(AdversarialCD(**SMALL).roles(tiny()), "cpu"), Batch(None, {}), 0, Noise.of(0, 2)
            )
        ),
        "AdversarialCD needs pictures of .*got None",
    ),
    (lambda: AdversarialCD(game="poker"), "unknown game 'poker'"),  # type: ignore[arg-type]
    (lambda: AdversarialCD(levels=1), "at least 2 levels"),
    (lambda: AdversarialCD(taps=("top",)).roles(teacher()), "unknown feature tap 'top'"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
