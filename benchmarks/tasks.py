"""What methods are compared on: data, a teacher that anyone can train again, and how pictures are scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import Generator, Mixture
from fewstep.core.role import Ema, Optim
from fewstep.data import Images, load_data
from fewstep.errors import InputError, unknown
from fewstep.measure import evaluate
from fewstep.report.rows import measure_sampler
from fewstep.train import EDMTraining, train, untrained

Scores = dict[str, float]
MODES, RADIUS, SPREAD = 8, 0.7, 0.05
# Of grid25: modes along a side, and the outermost.
SIDE, REACH = 5, 0.8
# Pictures by which modes are counted, as elsewhere (arXiv 1712.04086); 4000 would hit 982 of 1000 equal ones.
COUNTED = 25_600


@dataclass(frozen=True)
class Task:
    """One problem.

    Attributes:
        data: word of :func:`fewstep.data.load_data`; empty where --data names a file, or for ``make``.
        network: of the teacher, unet or resmlp.
        size: fields of its config that differ from the usual.
        steps: of the teacher's training.
        batch: pictures per step, of the teacher's training and of every method's.
        lr: of the teacher's training.
        metrics: what pictures are scored by.
        extractor: of their features; None is the one that knows the data.
        resize: side of the pictures; None keeps them.
        make: makes the data, for tasks whose data are no files.
        score: scores pictures, where the usual metrics do not apply.
        elsewhere: the benchmark that measures this task instead.
    """

    data: str = ""
    network: str = "resmlp"
    size: dict[str, Any] = field(default_factory=dict)
    steps: int = 2500
    batch: int = 256
    lr: float = 2e-3
    metrics: tuple[str, ...] = ("fd", "pixel_fd", "precision", "recall", "accuracy")
    extractor: str | None = None
    resize: int | None = None
    make: Callable[[], Any] | None = None
    score: Callable[[Tensor, int], Scores] | None = None
    elsewhere: str | None = None

    def load(self, file: str = "") -> Any:
        """The data set; ``file`` is --data.

        Raises:
            InputError: a task that needs a file and got none, or one that has a benchmark of its own.
        """
        if self.elsewhere is not None:
            raise InputError(f"this task is measured by `python benchmarks/{self.elsewhere}`: run that")
        if self.make is not None:
            return self.make()
        if not (self.data or file):
            raise InputError("this task needs --data: the Parquet file of its pictures")
        return load_data(self.data or file, resize=self.resize)

    def teacher(self, data: Any, out: Path, *, steps: int | None = None, device: str = "cpu") -> Generator:
        """Trained in ``out``, or the finished one of an earlier call."""
        method = EDMTraining(optim=Optim(lr=self.lr, warmup=100, decay="cosine", clip=1.0), ema=Ema(power=0.08))
        if (out / "fewstep.json").is_file():
            return Generator.load(out, device=device)
        return train(
            untrained(data, self.network, **self.size), method, data, out=out, budget=steps or self.steps,
            batch=self.batch, resume=(out / "recipe.json").is_file(), device=device, progress=False,
        )  # fmt: skip

    def measure(self, made: Generator, sampler: Any, data: Any, n: int, seed: int) -> Scores:
        """The metrics of ``n`` pictures at ``seed``, and their counted evaluations as ``nfe``."""
        if self.score is not None:
            found = self.score(made.sample(n, seed=seed, sampler=sampler, batch=4000, progress=False), seed)
            return {**found, "nfe": float(sampler.nfe)}
        names = tuple(m for m in self.metrics if m != "accuracy" or made.conds is not None)
        usual = tuple(name for name in names if name != "modes")
        row = measure_sampler(
            made, sampler, data, name="", group="solver", command="", n=n, seed=seed, metrics=usual,
            extractor="pixel" if set(names) == {"pixel_fd"} else self.extractor,
        )  # fmt: skip
        found = dict(row.metrics)
        if "modes" in names:
            many = made.sample(COUNTED, seed=seed, sampler=sampler, batch=3200, progress=False)
            found |= evaluate(many, data, metrics=("modes",))
        return {**{k.partition("@")[0]: v for k, v in found.items()}, "nfe": float(row.nfe)}


def ring() -> Mixture:
    """Eight narrow Gaussians on a circle, as pictures of one row and two pixels."""
    angle = torch.arange(MODES, dtype=torch.float64) * 2 * math.pi / MODES
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(means[:, None, None, :], SPREAD**2)


def ring_data(n: int = 20_000) -> Images:
    """Draws of :func:`ring`."""
    return Images("ring", ring().draw(n, seed=5).float())


def ring_score(pictures: Tensor, seed: int) -> Scores:
    """:func:`law_score` of :func:`ring`."""
    return law_score(ring(), pictures, seed)


def grid25() -> Mixture:
    """Twenty-five narrow Gaussians on a grid, as pictures of one row and two pixels."""
    side = torch.linspace(-REACH, REACH, SIDE, dtype=torch.float64)
    return Mixture(torch.cartesian_prod(side, side)[:, None, None, :], SPREAD**2)


def grid25_data(n: int = 20_000) -> Images:
    """Draws of :func:`grid25`."""
    return Images("grid25", grid25().draw(n, seed=5).float())


def grid25_score(pictures: Tensor, seed: int) -> Scores:
    """:func:`law_score` of :func:`grid25`."""
    return law_score(grid25(), pictures, seed)


def law_score(law: Mixture, pictures: Tensor, seed: int) -> Scores:
    """Distances of points to a known law of separate modes of deviation ``SPREAD`` and equal weight.

    ``energy``: the energy distance to as many fresh draws, ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, 0 for equal laws.
    ``modes``: those with a tenth of their share within three standard deviations. ``mode_kl``: divergence in nats
    of the nearest modes from equal shares. ``precision``: points within three standard deviations of a mode (.989 of
    the law's own).
    """
    x, y = pictures.double().flatten(1), law.draw(len(pictures), seed=1000 + seed).flatten(1)

    def within(a: Tensor) -> float:
        n = len(a)
        return float(sum(torch.cdist(part, a).sum() for part in a.split(500))) / (n * (n - 1))

    between = float(sum(torch.cdist(part, y).sum() for part in x.split(500))) / (len(x) * len(y))
    modes = len(law.means)
    gap, nearest = torch.cdist(x, law.means.flatten(1)).min(1)
    inside = gap < 3 * SPREAD
    counts = torch.bincount(nearest[inside], minlength=modes)
    share = torch.bincount(nearest, minlength=modes).double() / len(x)
    return {
        "energy": 2 * between - within(x) - within(y),
        "modes": float((counts > 0.1 * len(x) / modes).sum()),
        "mode_kl": float(torch.special.xlogy(share, share * modes).sum()),
        "precision": float(inside.double().mean()),
    }


# Laws of points in two dimensions.
PLANE = Task(
    "",
    "resmlp",
    {"width": 128, "embedding": 32, "blocks": 3},
    3000,
    512,
    metrics=("energy", "modes", "mode_kl", "precision"),
)
TASKS: dict[str, Task] = {
    "digits": Task("digits", "unet", {}, 3000, lr=3e-3),
    "stacked-digits": Task(
        "stacked-digits",
        "resmlp",
        {"width": 512, "embedding": 64},
        3000,
        lr=1.5e-3,
        metrics=("fd", "pixel_fd", "precision", "recall", "modes"),
    ),
    "cifar8": Task("", "resmlp", {"width": 512, "embedding": 96}, 4000, lr=1.5e-3, extractor="cifar10-8", resize=8),
    "cifar32": Task("", "unet", {}, 60_000, lr=1e-3, extractor="cifar10-32"),
    "ring": replace(PLANE, make=ring_data, score=ring_score),
    "grid25": replace(PLANE, make=grid25_data, score=grid25_score),
    "sr-digits": Task(elsewhere="super_resolution.py"),
}


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: there is none.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
