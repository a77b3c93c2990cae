"""Every method end to end on a small mixture: its samples come close to the data, and were not close before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.exact import Mixture
from fewstep.core.generator import Generator
from fewstep.core.role import Ema, Method, Optim
from fewstep.data import Images
from fewstep.distill import SFD, SiD, distill
from fewstep.train import EDMTraining, train, untrained

SIZE = 1500
MODES = torch.tensor([[-0.6, -0.6, 0.2, 0.2], [0.6, 0.0, -0.5, 0.3], [0.1, 0.6, 0.5, -0.6]]).reshape(3, 1, 2, 2)


def mixture_data() -> Images:
    """Three narrow modes of unequal weight in the four pixels of a 1x2x2 picture."""
    drawn = Mixture(MODES, 0.01, [0.5, 0.3, 0.2]).draw(4096, seed=0)
    return Images("mixture", drawn.float().clamp(-1, 1))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|a - b| - E|a - a'| - E|b - b'|``: zero only for equal distributions."""
    a, b = a.flatten(1).double(), b.flatten(1).double()

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def distance(generator: Generator) -> float:
    """Between fresh samples and the data."""
    made = generator.sample(SIZE, seed=5, progress=False)
    return energy_distance(made, mixture_data().pixels[:SIZE])


def shares(generator: Generator) -> Tensor:
    """The share of the samples nearest each mode."""
    made = generator.sample(SIZE, seed=6, progress=False)
    return torch.bincount(torch.cdist(made.flatten(1), MODES.flatten(1)).argmin(1), minlength=3) / SIZE


@dataclass(frozen=True)
class Toy:
    """A method, how long it runs, the distance that it must reach, and how far it must have come."""

    method: Method
    steps: int
    most: float
    factor: float


TOYS = {
    "EDMTraining": Toy(EDMTraining(optim=Optim(lr=4e-3, warmup=10, decay="cosine")), 220, 0.01, 10),
    "SFD": Toy(SFD(steps=3, between=3, optim=Optim(lr=2e-3, decay="linear")), 50, 0.015, 5),
    "SiD": Toy(
        SiD(
            student=Optim(lr=1e-3, betas=(0.0, 0.99), decay="cosine"),
            fake=Optim(lr=2e-3, betas=(0.0, 0.99)),
            ema=Ema(power=0.1),
        ),
        150,
        0.02,
        10,
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Generator, Generator]]:
    """``(before, after)`` of a method by name; those that distil start from what EDMTraining made."""
    made: dict[str, tuple[Generator, Generator]] = {}

    def get(name: str) -> tuple[Generator, Generator]:
        if name in made:
            return made[name]
        toy = TOYS[name]
        out: Path = tmp_path_factory.mktemp(name) / "run"
        options: dict[str, Any] = {"budget": toy.steps, "batch": 256, "log_every": 25, "progress": False}
        if toy.method.needs_data:
            start = untrained(mixture_data(), "resmlp", width=64, embedding=32, blocks=2)
        else:
            start = get("EDMTraining")[1]
        before = copy.deepcopy(start).with_sampler(toy.method.sampler(start))
        if toy.method.needs_data:
            after = train(start, toy.method, mixture_data(), out=out, **options)
        else:
            after = distill(start, toy.method, out=out, **options)
        assert torch.equal(Generator.load(out).sample(8, progress=False), after.sample(8, progress=False))
        made[name] = before, after
        return made[name]

    return get


@pytest.mark.parametrize("name", TOYS)
def test_samples_come_close_to_the_data(name: str, trained: Callable) -> None:
    toy = TOYS[name]
    before, after = (distance(g) for g in trained(name))
    assert after < toy.most and after < before / toy.factor, (before, after)


@pytest.mark.parametrize("name", TOYS)
def test_before_training_the_threshold_is_missed(name: str, trained: Callable) -> None:
    before = distance(trained(name)[0])
    assert before > 2 * TOYS[name].most, before


@pytest.mark.parametrize("name", TOYS)
def test_no_mode_is_lost(name: str, trained: Callable) -> None:
    off = (shares(trained(name)[1]) - torch.tensor([0.5, 0.3, 0.2])).abs().max()
    assert float(off) < 0.12


def test_the_distance_is_zero_only_for_equal_distributions() -> None:
    data = mixture_data().pixels
    floor = abs(energy_distance(data[:SIZE], data[SIZE : 2 * SIZE]))
    shifted = energy_distance(data[:SIZE], data[SIZE : 2 * SIZE] + 0.1)
    one_mode = energy_distance(data[:SIZE], MODES[:1] + 0.1 * torch.randn(SIZE, 1, 2, 2))
    assert floor < 0.003 and shifted > 5 * floor and one_mode > 0.1
