"""Score forgetting: both terms are SiD's under the right conditions, classes are replaced, a class is unlearned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Classes, Cond
from fewstep.core.fit import build_models
from fewstep.core.noise import Noise
from fewstep.core.role import Models, Optim, Role
from fewstep.distill.front import distill
from fewstep.distill.score_forgetting import ScoreForgetting, Staying
from fewstep.distill.sid import SiD
from fewstep.errors import InputError
from fewstep.guide import guided
from tiny_runs import STEADY, check_resume, tiny, tiny_data

METHODS: dict[str, Any] = {
    "random": ScoreForgetting(forget=(1,), forgetting=0.5, fake_forgetting=0.5, student=STEADY, fake=STEADY),
    "fixed": ScoreForgetting(
        forget=(0, 2), override=1, forgetting=1.0, fake_forgetting=1.0, student=STEADY, fake=STEADY
    ),
}


class PerClass(nn.Module):
    """The denoiser of a Gaussian of spread ``spread`` around a mean of each class, or a student of that kind."""

    shape, sigma_min, sigma_max, sigma_data = (1, 1, 1), 0.002, 80.0, 0.5

    def __init__(self, means: list[float], spread: float = 0.5, *, student: bool = False) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means))
        self.spread, self.student = spread, student
        self.told: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Any, cond: Cond | None = None) -> Tensor:
        assert cond is not None
        self.told.append(cond["label"])
        mean = self.means[cond["label"]].reshape(-1, 1, 1, 1)
        level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        if self.student:
            return mean + self.spread * x / level
        gain = self.spread**2 / (self.spread**2 + level**2)
        return gain * x + (1 - gain) * mean


MEANS = [-1.0, 0.0, 1.0]


def exact(method: ScoreForgetting, means: list[float] = MEANS) -> Models:
    """Three Gaussians; student and fake score start as the teacher's classes, shifted."""
    shifted = [m + 0.2 for m in means]
    networks = {
        "teacher": PerClass(means),
        "fake": PerClass(shifted),
        "student": PerClass(shifted, student=True),
        "classes": Staying((1.0, 1.0, 2.0), method.forget),
    }
    return build_models({name: Role(lambda net=net: net) for name, net in networks.items()}, "cpu")


def given(n: int = 64) -> Batch:
    return Batch(None, {"label": torch.arange(n) % 3})


def test_every_network_is_told_its_own_class() -> None:
    method = ScoreForgetting(forget=(1,), override=2)
    m = exact(method)
    fake, student = (u.loss() for u in method.step(m, given(), 0, Noise.of(0, 64)))
    stay, gone = m.student.told[0], m.student.told[1]
    assert set(stay.tolist()) == {0, 2} and set(gone.tolist()) == {1}
    assert torch.equal(stay[given().cond["label"] != 1], given().cond["label"][given().cond["label"] != 1])
    # fake: while it learns, remain and forget; then in the student's loss the same.
    told = [set(t.tolist()) for t in m.fake.told]
    assert told == [{0, 2}, {1}, {0, 2}, {1}]
    assert [set(t.tolist()) for t in m.teacher.told] == [{0, 2}, {2}]
    assert torch.equal(m.teacher.told[0], m.fake.told[2])
    assert set(fake) == {"loss", "remain", "forget"} and set(student) == {"loss", "fisher", "fisher_forget"}  # type: ignore[arg-type]


def test_without_the_forget_terms_it_is_sid_on_what_stays() -> None:
    method = ScoreForgetting(forget=(1,), forgetting=0.0, fake_forgetting=0.0)
    m, plain = exact(method), SiD()
    noise = Noise.of(0, 64)
    stay = {"label": m.classes(given().cond["label"], noise.fold("remain"))}
    own = [u.loss() for u in method.step(m, given(), 0, noise)]
    want = [u.loss() for u in plain.step(m, Batch(None, stay), 0, noise)]
    assert torch.equal(own[0]["loss"], want[0])  # type: ignore[index, arg-type]
    assert torch.equal(own[1]["loss"], want[1]["loss"])  # type: ignore[index]


def test_classes_that_are_alike_make_the_forget_term_a_remain_term() -> None:
    method = ScoreForgetting(forget=(1,), override=2)
    m, noise = exact(method, [-1.0, 0.6, 0.6]), Noise.of(3, 64)
    gone, other = ({"label": torch.full((64,), k)} for k in (1, 2))
    forget = method.forget_losses(m, gone, other, noise)
    remain = method.forget_losses(m, gone, gone, noise)
    assert torch.equal(forget["loss"], remain["loss"]) and torch.equal(forget["fisher"], remain["fisher"])
    other_teacher = exact(method)
    assert float(method.forget_losses(other_teacher, gone, other, noise)["loss"]) != float(remain["loss"])


def test_the_forget_term_moves_the_forgotten_class_alone_and_towards_the_other() -> None:
    method = ScoreForgetting(forget=(1,), override=2, alpha=1.0)
    m = exact(method)
    m.fake.means.data, m.student.means.data = torch.tensor(MEANS), torch.tensor(MEANS)
    gone, other = ({"label": torch.full((20_000,), k)} for k in (1, 2))
    m.student.requires_grad_(True)
    method.forget_losses(m, gone, other, Noise.of(0, 20_000))["loss"].backward()
    slope = m.student.means.grad
    assert slope[0] == slope[2] == 0
    assert slope[1] < -1e-3, "downhill is towards the mean of class 2, which is higher"


def test_a_class_is_unlearned_and_the_others_stay() -> None:
    """Gradient descent on three Gaussians, with and without the forget term."""
    means = {}
    for weight in (0.0, 1.0):
        method = ScoreForgetting(forget=(1,), override=2, forgetting=weight, fake_forgetting=weight)
        m = exact(method)
        # The fake score leads, and the last iterates are averaged, because the two circle each other.
        rates = {"fake": 0.05, "student": 0.01}
        steps = {name: torch.optim.Adam(m.networks[name].parameters(), rate) for name, rate in rates.items()}
        late = []
        for i in range(320):
            for update in method.step(m, given(48), i, Noise.of(i, 48)):
                network = m.networks[update.roles[0]].requires_grad_(True)
                losses = update.loss()
                losses["loss"].backward()  # type: ignore[index]
                steps[update.roles[0]].step()
                steps[update.roles[0]].zero_grad()
                network.requires_grad_(False)
            late.append(m.student.means.detach().clone())
        means[weight] = torch.stack(late[220:]).mean(0)
    for found in means.values():
        assert float((found[[0, 2]] - torch.tensor([-1.0, 1.0])).abs().max()) < 0.1
    assert float(means[0.0][1]) == pytest.approx(0.2, abs=1e-6), "nothing teaches it the forgotten class"
    assert float(means[1.0][1]) == pytest.approx(1.0, abs=0.1)


def test_classes_that_stay_are_drawn_by_their_frequency() -> None:
    classes, noise = Staying((0.1, 0.2, 0.3, 0.0, 0.4), (1, 4)), Noise.of(0, 20_000)
    drawn = classes.staying(noise)
    share = torch.bincount(drawn, minlength=5).double() / len(noise)
    assert float((share - torch.tensor([0.25, 0, 0.75, 0, 0])).abs().max()) < 0.01
    gone = torch.bincount(classes.forgotten(noise), minlength=5).double() / len(noise)
    assert float((gone - torch.tensor([0, 0.5, 0, 0, 0.5])).abs().max()) < 0.01
    labels = noise.integers(-1, 5, (), "label")
    kept = classes(labels, noise)
    left = (labels != 1) & (labels != 4)
    assert torch.equal(kept[left], labels[left]) and not ((kept == 1) | (kept == 4)).any()


def exact_losses(method: ScoreForgetting, m: Models) -> list[Any]:
    return [u.loss() for u in method.step(m, given(), 0, Noise.of(0, 64))]


def test_a_random_override_is_a_class_that_stays() -> None:
    method = ScoreForgetting(forget=(0, 1))
    m = exact(method)
    exact_losses(method, m)
    assert set(m.teacher.told[1].tolist()) == {2} and set(m.fake.told[1].tolist()) == {0, 1}
    loose = ScoreForgetting(forget=(1,))
    m = exact(loose)
    exact_losses(loose, m)
    assert set(m.teacher.told[1].tolist()) == {0, 2}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_and_micro_batches(name: str, tmp_path: Path) -> None:
    check_resume(name, METHODS[name], tmp_path)


def test_guided_teachers_and_data(tmp_path: Path) -> None:
    method = replace(METHODS["random"], student=Optim(lr=1e-3))
    made = distill(guided(tiny(), 2.0), method, out=tmp_path / "a", budget=2, batch=4, progress=False)
    assert made.sampler.nfe == 1 and made.sample(4, progress=False).isfinite().all()
    with pytest.raises(InputError, match="data-free"):
        distill(tiny(), method, tiny_data(), out=tmp_path / "b", budget=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreForgetting(forget=()), "different classes to forget"),
        (lambda: ScoreForgetting(forget=(1, 1)), "different classes to forget"),
        (lambda: ScoreForgetting(forget=(-1,)), "different classes to forget"),
        (lambda: ScoreForgetting(forget=(1,), override=1), "cannot put class 1 in the place"),
        (lambda: ScoreForgetting(override=-1), "cannot put class -1"),
        (lambda: ScoreForgetting(forgetting=-0.1), "forgetting >= 0"),
        (lambda: ScoreForgetting(fake_forgetting=float("inf")), "fake_forgetting >= 0"),
        (lambda: ScoreForgetting(forget=(3,)).roles(tiny()), "class 3 is unknown: the teacher has 0 to 2"),
        (lambda: ScoreForgetting(override=7).roles(tiny()), "class 7 is unknown"),
        (lambda: ScoreForgetting(forget=(0, 1, 2)).roles(tiny()), "would forget every class"),
        (
            lambda: ScoreForgetting(forget=(0, 1)).roles(replace(tiny(), conds=Classes((1, 1, 0)))),
            "would forget every class",
        ),
        (lambda: ScoreForgetting().roles(replace(tiny(), conds=None)), "this teacher has none"),
        (
            lambda: next(ScoreForgetting().step(exact(ScoreForgetting()), Batch(None, {}), 0, Noise.of(0, 4))),
            "conditions with a label",
        ),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
