"""Updates in parts: the same gradients as the whole objective, one graph at a time, less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch
from fewstep.core.fit import _Loop, build_models
from fewstep.core.generator import Generator
from fewstep.core.memory import MemoryEstimate
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions
from fewstep.core.role import Models, Optim, Role, Update, added, portions
from fewstep.data import Images
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill.boot import BOOT
from fewstep.distill.ctm import CTM
from fewstep.distill.dmd2 import DMD2
from fewstep.distill.f_distill import FDistill
from fewstep.distill.score_forgetting import ScoreForgetting
from fewstep.distill.sid import SiD
from fewstep.distill.sida import SiDA
from fewstep.loss.matching import carried, in_two_passes
from fewstep.train.memory import estimate_memory
from tiny_runs import tiny, tiny_data

CASES: dict[str, Any] = {
    "DMD2": DMD2(sigma_init=2.5, gan=0.3, critic=0.7),
    "DMD2 on teacher features": DMD2(sigma_init=2.5, gan=0.3, critic=0.7, features="teacher"),
    "DMD2 of two steps": DMD2(steps=2, gan=0.3),
    "FDistill": FDistill(sigma_init=2.5, gan=0.3, critic=0.7),
    "SiD": SiD(alpha=1.2),
    "SiD with guidance": SiD(kappa_train=1.5, kappa_fake=1.5, kappa_teacher=1.5),
    "SiDA": SiDA(gan=0.3, critic=7.0),
    "ScoreForgetting": ScoreForgetting(forget=(1,), forgetting=0.5, fake_forgetting=0.5),
    "BOOT": BOOT(),
    "CTM": CTM(levels=5, span=2, distance="l2"),
    "CTM without the denoising term": CTM(levels=5, span=2, dsm=0.0),
    "CTM with a game": CTM(levels=5, span=2, gan=0.7, gan_start=0.0, dsm=0.5),
    "CTM with fixed weights": CTM(levels=5, span=2, gan=0.7, gan_start=0.0, adaptive=False),
}
COUNT = 13


def moved(method: Any, start: Generator | None = None) -> Models:
    """Networks that differ from each other, so that nothing cancels."""
    m = build_models(method.roles(start or tiny()), "cpu")
    g = torch.Generator().manual_seed(0)
    for name, role in m.roles.items():
        if role.optim is not None:
            for p in m.networks[name].parameters():
                p.data += 0.05 * torch.randn(p.shape, generator=g)
    return m


def gradients(m: Models, update: Update, closures: tuple[Callable[[], Any], ...]) -> tuple[dict[str, float], Tensor]:
    """The sums of the losses, and every gradient of the roles as one vector, after a backward pass for each closure."""
    parameters = [p for role in update.roles for p in m.networks[role].parameters()]
    for p in parameters:
        p.grad = None
        p.requires_grad_(True)
    found = []
    for closure in closures:
        losses = added([closure()])
        losses["loss"].backward()
        found.append({name: value.detach() for name, value in losses.items()})
    reached = {name for name, net in m.networks.items() if any(p.grad is not None for p in net.parameters())}
    assert reached == set(update.roles)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for p in parameters:
        p.grad = None
        p.requires_grad_(False)
    return {name: float(value) for name, value in added(found).items()}, flat


@pytest.mark.parametrize("name", CASES)
def test_the_parts_have_the_gradient_of_the_whole(name: str) -> None:
    method = CASES[name]
    m, batch = moved(method), tiny_data().take(torch.arange(COUNT))
    in_parts = 0
    for update in method.step(m, batch, 0, Noise.of(3, COUNT)):
        whole, expected = gradients(m, update, (update.loss,))
        if update.parts:
            in_parts += 1
            told, got = gradients(m, update, update.parts)
            assert told.keys() == whole.keys()
            assert told == pytest.approx(whole, rel=2e-5, abs=1e-6)
            assert float((got - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    assert in_parts


def test_what_is_not_lean_has_no_parts_to_save_memory() -> None:
    batch = tiny_data().take(torch.arange(COUNT))
    for method, lean in ((DMD2(sigma_init=2.5), 1), (SiD(), 3)):
        for given, count in ((method, lean), (replace(method, lean=False), 0)):
            updates = given.step(moved(given), batch, 0, Noise.of(3, COUNT))  # type: ignore[attr-defined]
            assert [len(u.parts) for u in updates if u.role == "student"] == [count]
    for size, count in ((4, 0), (7, 0), (8, 2), (11, 2), (12, 3)):
        few = tiny_data().take(torch.arange(size))
        *_, update = SiD().step(moved(SiD()), few, 0, Noise.of(3, size))
        assert len(update.parts) == count


# ---- what parts are made of


@pytest.mark.parametrize(
    ("size", "count", "expected"), [(7, 3, [3, 2, 2]), (4, 3, [2, 1, 1]), (2, 3, [1, 1]), (5, 1, [5])]
)
def test_portions_are_even_and_add_up_to_the_mean(size: int, count: int, expected: list[int]) -> None:
    x, taken = torch.arange(size, dtype=torch.float64), []

    def loss(samples: slice) -> dict[str, Tensor]:
        taken.append(len(x[samples]))
        return {"loss": x[samples].mean()}

    found = added(part() for part in portions(loss, size, count))
    assert sorted(taken, reverse=True) == expected
    assert float(found["loss"]) == pytest.approx(float(x.mean()), rel=1e-12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))


def test_the_loop_backs_a_part_up_before_the_next_and_logs_the_sums() -> None:
    seen: list[tuple[str, bool]] = []

    class Method:
        needs_data = False

        def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
            def first() -> dict[str, Tensor]:
                seen.append(("first", m.net.w.grad is not None))
                return {"loss": m.net.w.square().sum(), "one": torch.ones(())}

            def second() -> Tensor:
                seen.append(("second", m.net.w.grad is not None))
                return 3 * m.net.w.sum()

            yield Update.of("net", first, second)

    m = build_models({"net": Role(Net, Optim(lr=1e-2))}, "cpu")
    loop = _Loop(Method(), m, ConditionsOnly(None), FitOptions(batch=4, micro=2), None)  # type: ignore[arg-type]
    loop.step(0, 0.0, loop.load(0))
    assert seen == [("first", False), ("second", True), ("first", True), ("second", True)]
    means, skipped = loop.read()
    assert skipped == 0 and means["net/loss"] == pytest.approx(5 - 3) and means["net/one"] == 1
    # 2 w + 3 for each micro-batch, and the mean of both.
    assert means["net/grad_norm"] == pytest.approx((25 + 1) ** 0.5)
    assert m.net.w.grad is None and not m.net.w.requires_grad


def test_a_part_that_is_not_finite_skips_the_update() -> None:
    class Method:
        needs_data = False

        def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
            yield Update.of("net", lambda: m.net.w.sum(), lambda: m.net.w.sum() * float("nan"))

    m = build_models({"net": Role(Net, Optim(lr=1e-2))}, "cpu")
    loop = _Loop(Method(), m, ConditionsOnly(None), FitOptions(batch=4), None)  # type: ignore[arg-type]
    loop.step(0, 0.0, loop.load(0))
    assert m.net.w.tolist() == [1.0, -2.0] and loop.read()[1] == 1


# ---- two passes


def two_ways(net: nn.Module, bf16: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the plain loss and of that in two passes, with the same state of torch's generator before each."""
    z, found = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), []
    for lean in (False, True):
        net.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if lean:
                losses, x = in_two_passes(lambda: net(z).float(), lambda x: {"loss": x.pow(3).mean()}, z.device)
                assert not x.requires_grad
            else:
                losses = {"loss": net(z).float().pow(3).mean()}
        losses["loss"].backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()])
    return found[0], found[1]


@pytest.mark.parametrize("bf16", [False, True])
def test_two_passes_are_one_also_with_dropout_and_autocast(bf16: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.SiLU(), nn.Linear(16, 8)).train()
    plain, lean = two_ways(net, bf16)
    for a, b in zip(plain, lean, strict=True):
        # Gradients between the passes are rounded to bfloat16 in either way.
        assert float((a - b).abs().max()) <= (1e-2 if bf16 else 1e-6) * float(a.abs().max())
        assert float(a.abs().max()) > 0


def test_a_carried_slope_is_the_gradient_and_the_value_is_kept() -> None:
    x, slope = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    loss = carried(x, slope, torch.tensor(0.25))
    loss.backward()
    assert torch.equal(x.grad, slope) and loss.item() == 0.25  # type: ignore[arg-type]


# ---- memory


def needed(method: Any) -> MemoryEstimate:
    """With pictures so large that activations are most of it."""
    start = tiny("unet", channels=8, multipliers=(1,), blocks=1, attention=())
    data = Images("larger", torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    return estimate_memory(method, start, data if method.needs_data else None, FitOptions(batch=96))


@pytest.mark.parametrize("method", [DMD2(), SiD()], ids=["DMD2", "SiD"])
def test_one_graph_at_a_time_needs_less(method: Any) -> None:
    lean, whole = needed(method), needed(replace(method, lean=False))
    assert lean.roles == whole.roles
    assert lean.activations + lean.gradients < 0.8 * (whole.activations + whole.gradients)
