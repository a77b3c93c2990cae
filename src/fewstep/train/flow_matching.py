"""Flow matching: a velocity from data along straight paths (arXiv 2210.02747, 2209.03003)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, drop
from fewstep.core.denoiser import Denoiser, Precond
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import FlowPath
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.loss.draw import FlowTime
from fewstep.loss.dsm import dsm
from fewstep.solve.euler import euler
from fewstep.solve.heun import heun

# The lowest level of one that is trained here, as that of FlowTime's lowest time.
LEAST = 1e-4


@dataclass(frozen=True)
class FlowMatching:
    """The velocity ``n - x0`` at ``z_t = (1 - t) x0 + t n``, for a denoiser on the flow path.

    Attributes:
        draw: the training times; a mean makes them logit-normal (arXiv 2403.03206), without one they are uniform.
        class_dropout: share of examples trained without their class, so that guidance is possible.
        steps: of the sampler, even in t.
        order: of the sampler: euler (one evaluation a step) or heun (two, in t).
        optim: of the network; the lr of arXiv 2209.03003 for CIFAR-10 is 2e-4.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = True

    draw: FlowTime = FlowTime()
    class_dropout: float = 0.1
    steps: int = 18
    order: Literal["euler", "heun"] = "heun"
    optim: Optim = Optim(lr=1e-3, warmup=100, decay="cosine", clip=1.0)
    ema: Ema = Ema(power=0.08)

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.class_dropout <= 1:
            raise InputError(f"FlowMatching needs steps >= 1 and class_dropout in [0, 1], got {self}")
        if self.order not in ("euler", "heun"):
            raise unknown("order", self.order, ("euler", "heun"))

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """One role: the student starts as a copy of the network that it is given.

        Raises:
            InputError: a network on another path.
        """
        made = teacher.network
        if not isinstance(made, Precond) or not isinstance(made.path, FlowPath):
            raise InputError(
                f"FlowMatching trains a denoiser on the flow path, got {getattr(made, 'path', type(made).__name__)}: "
                'start with untrained(data, path="flow"), or --path flow; for another path use EDMTraining'
            )
        return {"student": Role(lambda: copy.deepcopy(made), self.optim, self.ema, ships=True)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Eq. 23 of arXiv 2210.02747 and eq. 1 of 2209.03003: the mean squared error of the velocity.

        The velocity's error is that of x0 over t, which is the draw's weight.

        Raises:
            InputError: pictures of another shape than the network's.
        """
        x0, want = batch.x, tuple(m.student.shape)
        if x0 is None or tuple(x0.shape[1:]) != want:
            got = None if x0 is None else tuple(x0.shape[1:])
            raise InputError(f"FlowMatching needs pictures of {want}, as the network takes them, got {got}")
        sigma, weight = self.draw(noise, m.student.sigma_data)
        cond = drop(batch.cond, noise.uniform((), "drop") < self.class_dropout) if self.class_dropout else batch.cond
        n = noise.normal(x0.shape[1:], "n")
        yield Update("student", lambda: dsm(m.student, x0, n, sigma, weight, cond))

    def sampler(self, teacher: Generator) -> Tableau:
        """The flow's ODE in ``steps`` even steps of t from pure noise; one of Heun's less for its last evaluation."""
        return flow_sampler(teacher.denoiser, self.steps, self.order)


def flow_levels(D: Denoiser, steps: int) -> Tensor:
    """(steps + 1,) float64 levels, even in ``t = sigma / (1 + sigma)``, from the denoiser's highest to 0.

    They do not depend on the path that ``D`` was trained on.

    Raises:
        InputError: steps < 1.
    """
    if steps < 1:
        raise InputError(f"a grid needs at least 1 step, got {steps}: pass a whole number such as 4")
    top = float(D.sigma_max)
    t = top / (1 + top) * torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    levels = t / (1 - t)
    # Exactly: of t = 1 - 1e-8, hardly a digit of the level is left.
    levels[0] = top
    return levels


def flow_sampler(D: Denoiser, steps: int, order: Literal["euler", "heun"] = "euler") -> Tableau:
    """A solver of :func:`flow_levels`: ``order`` euler, or heun, which steps in flow time. Raises as they do."""
    levels = flow_levels(D, steps)
    return euler(levels) if order == "euler" else heun(levels, frame=FlowPath())
