"""Roles are open only inside their own update, in training mode only there, and data come in a keyed order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch
from fewstep.core.fit import build_models, example_order, fit
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.data.conditions import ConditionsOnly
from tiny_runs import METHODS, tiny

SGD = Optim(lr=0.05, betas=(0.0, 0.999), eps=1.0)
INPUTS = torch.linspace(-1, 1, 12).reshape(4, 3)


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False, momentum=None), nn.Dropout(0.5))


@dataclass(frozen=True)
class Watchful:
    """Two coupled roles and a frozen one; notes who is open, training or holds gradients wherever it is called."""

    needs_data: ClassVar[bool] = False
    seen: list[tuple[str, frozenset[str], frozenset[str], frozenset[str]]] = field(default_factory=list, compare=False)

    def roles(self, teacher: Any) -> dict[str, Role]:
        return {
            "teacher": Role(lambda: net(0)),
            "a": Role(lambda: net(1), SGD, Ema(rate=0.5)),
            "b": Role(lambda: net(2), SGD),
            "unused": Role(lambda: net(3), SGD),
        }

    def note(self, where: str, m: Models) -> None:
        everyone = {**m.networks, "a.ema": m.ema("a")}
        has = [
            frozenset(n for n, network in everyone.items() if any(test(p) for p in network.parameters()))
            for test in (lambda p: p.requires_grad, lambda p: p.grad is not None)
        ]
        training = frozenset(n for n, network in everyone.items() if any(child.training for child in network.modules()))
        self.seen.append((where, has[0], training, has[1]))

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        self.note("step", m)
        assert not (m.a(INPUTS) + m.b(INPUTS)).requires_grad

        def loss(where: str) -> Tensor:
            self.note(where, m)
            return (m.a(INPUTS) * m.b(INPUTS) - m.teacher(INPUTS)).square().mean()

        yield Update("a", lambda: loss("a"))
        self.note("step", m)
        yield Update("b", lambda: loss("b"))
        self.note("step", m)
        yield Update(("a", "b"), lambda: loss("a+b"))
        self.note("step", m)

    def sampler(self, teacher: Any) -> Any:
        return None


def go(method: Any, steps: int = 2, micro: int = 2) -> Models:
    models = build_models(method.roles(None), "cpu")
    options = FitOptions(Budget(steps), batch=4, micro=micro)
    list(fit(method, models, ConditionsOnly(None, size=16), options, None))
    return models


@pytest.mark.parametrize("micro", [1, 2])
def test_a_role_is_open_only_inside_its_own_update(micro: int) -> None:
    method = Watchful()
    models = go(method, micro=micro)
    nobody = frozenset[str]()
    expected = {"step": nobody, "a": {"a"}, "b": {"b"}, "a+b": {"a", "b"}}
    count = dict.fromkeys(expected, 0)
    for where, is_open, training, graded in method.seen:
        assert is_open == training == expected[where], where
        # Gradients of the first micro-batch wait for the second, and only in the role that is open.
        second = where != "step" and count[where] % micro > 0
        assert graded == (expected[where] if second else nobody), where
        count[where] += 1
    assert count == {"step": 8 * micro, "a": 2 * micro, "b": 2 * micro, "a+b": 2 * micro}
    assert all(p.grad is None and not p.requires_grad for n in models.networks.values() for p in n.parameters())


def test_the_frozen_and_the_unused_stay_as_they_are() -> None:
    models = go(Watchful())
    for name, seed in (("teacher", 0), ("unused", 3)):
        before, after = net(seed).state_dict(), models.networks[name].state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before), "weights and batch statistics"
    for name, seed in (("a", 1), ("b", 2)):
        before, after = net(seed).state_dict(), models.networks[name].state_dict()
        assert all(not torch.equal(before[k], after[k]) for k in before), name
        # Two updates of its own and the joint one, two micro-batches, two steps.
    assert int(models.a[1].num_batches_tracked) == int(models.b[1].num_batches_tracked) == 8
    assert all(torch.equal(x, y) for x, y in zip(models.ema("a").buffers(), models.a.buffers(), strict=True))
    assert models.ema("b") is models.b
    with pytest.raises(AttributeError, match=r"no role 'critic'.*'teacher'"):
        _ = models.critic


def test_dropout_acts_only_in_the_open_role() -> None:
    kept: dict[str, list[Tensor]] = {"step": [], "open": [], "closed": []}

    class Drops(Watchful):
        def roles(self, teacher: Any) -> dict[str, Role]:
            with torch.random.fork_rng():
                made = {n: nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)) for n in ("a", "b")}
            return {n: Role(lambda v=v: v, SGD) for n, v in made.items()}

        def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
            ones = torch.ones(64, 1)
            kept["step"].append(m.a(ones))

            def loss() -> Tensor:
                a, b = m.a(ones), m.b(ones)
                kept["open"].append(a.detach())
                kept["closed"].append(b.detach())
                return (a + b).sum()

            yield Update("a", loss)
            kept["step"].append(m.a(ones))

    state = torch.get_rng_state()
    go(Drops())
    assert torch.equal(torch.get_rng_state(), state), "the caller's own random numbers are left alone"
    for where, outputs in kept.items():
        for out in outputs:
            assert (len(out.unique()) == 2 and 10 < int((out == 0).sum()) < 54) == (where == "open"), where
    masks = [tuple((o == 0).flatten().tolist()) for o in kept["open"]]
    assert len(set(masks)) == len(masks) == 4, "micro-batches and steps drop differently"


@pytest.mark.parametrize(("other", "longer"), [("b", False), ("a", True)])
def test_micro_batches_must_agree_on_their_updates(other: str, longer: bool) -> None:
    calls = 0

    class Unlike(Watchful):
        def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
            nonlocal calls
            calls += 1
            second = calls == 2
            yield Update(other if second else "a", lambda: m.networks["a"](INPUTS).sum())
            if longer and second:
                yield Update("a", lambda: m.a(INPUTS).sum())

    with pytest.raises(RuntimeError, match=r"Unlike.step yields differently on different micro-batches"):
        go(Unlike())


def test_an_update_of_a_role_without_an_optimizer_is_an_error() -> None:
    class Wrong(Watchful):
        def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
            yield Update("teacher", lambda: m.teacher(INPUTS).sum())

    with pytest.raises(RuntimeError, match=r"Wrong updates \['teacher'\], which have no optimizer"):
        go(Wrong())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_yields_with_everything_frozen_and_ships_one_role(name: str) -> None:
    method, start = METHODS[name], tiny()
    roles = method.roles(start)
    assert sum(role.ships for role in roles.values()) == 1
    models = build_models(roles, "cpu")
    x = torch.zeros(4, 1, 4, 4) if method.needs_data else None
    for update in method.step(models, Batch(x, {"label": torch.arange(4) % 3}), 0, Noise.of(0, 4)):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"), "no context reaches over a yield"
        assert set(update.roles) <= {n for n, r in roles.items() if r.optim is not None}
        for network in models.networks.values():
            assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
        for role in update.roles:
            models.networks[role].requires_grad_(True)
        made = update.loss()
        (made if isinstance(made, Tensor) else made["loss"]).backward()
        for role, network in models.networks.items():
            graded = [p.grad is not None for p in network.parameters()]
            assert all(graded) if role in update.roles else not any(graded), role
            network.requires_grad_(False).zero_grad()


# ---- the order of examples


@pytest.mark.parametrize(("batch", "size"), [(4, 12), (5, 12), (7, 3), (12, 12), (1, 5), (30, 7)])
def test_every_epoch_is_a_permutation(batch: int, size: int) -> None:
    ids = torch.cat([example_order(3, step, batch, size) for step in range(2 * size)])
    epochs = ids[: len(ids) // size * size].reshape(-1, size)
    assert len(epochs) >= 2 and ids.dtype == torch.int64
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand(len(epochs), size))


def test_the_order_is_a_function_of_seed_and_place_alone() -> None:
    whole = torch.cat([example_order(3, step, 1, 50) for step in range(120)])
    for batch in (3, 8, 60):
        assert torch.equal(torch.cat([example_order(3, i, batch, 50) for i in range(120 // batch)]), whole)
    assert torch.equal(example_order(3, 7, 8, 50), whole[56:64]), "no step needs the ones before it"
    assert not torch.equal(whole[:50], whole[50:100]), "epochs differ"
    assert not torch.equal(example_order(4, 0, 50, 50), whole[:50]), "seeds differ"
    assert not torch.equal(whole[:50], torch.arange(50))
