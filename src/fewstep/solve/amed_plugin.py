"""AMED-Plugin (arXiv 2312.00094): the learned intermediate levels of AMED put into the steps of known solvers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.errors import unknown
from fewstep.solve.amed import (
    BASES,
    HIGH,
    Call,
    Fitted,
    Split,
    Task,
    Training,
    learn,
    lowered,
    parallel_step,
    slope_weights,
)

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _dpm2(marks: Sequence[Tensor], s: Split) -> list[Call]:
    """``x_b = x_a + c (b - a) (eps_m / (2r) + (1 - 1/(2r)) eps_a)``."""
    return parallel_step(marks, s.b, [(s.m, s.told, s.c / (2 * s.r))], s.c)


def _multistep(marks: Sequence[Tensor], s: Split, order: int) -> list[Call]:
    """Two steps of iPNDM, to ``m`` and to ``b``; the mean slope of the second one is scaled."""
    a, both = lowered(float(marks[-1]), float(s.b)), [*marks, s.m]
    first = slope_weights(marks, len(marks) - 1, a, s.m, _shares(len(marks), order))
    scaled = {j: s.c * share for j, share in _shares(len(both), order).items()}
    return [Call(marks[-1], s.m, *first), Call(s.told, s.b, *slope_weights(both, len(marks), s.m, s.b, scaled))]


def _shares(count: int, order: int) -> dict[int, float]:
    """The weights of equal steps for the newest of ``count`` slopes, by row."""
    return {count - 1 - j: w for j, w in enumerate(ADAMS_BASHFORTH[min(order, count) - 1])}


def _euler(marks: Sequence[Tensor], s: Split) -> list[Call]:
    return _multistep(marks, s, 1)


def _ipndm(marks: Sequence[Tensor], s: Split) -> list[Call]:
    return _multistep(marks, s, s.order)


def _dpmpp2m(marks: Sequence[Tensor], s: Split) -> list[Call]:
    """Two steps of DPM-Solver++(2M), to ``m`` and to ``b``; what the second one adds to ``(b/m) x_m`` is scaled."""
    a = torch.as_tensor(lowered(float(marks[-1]), float(s.b)), dtype=torch.float64)
    first = _dpmpp_row(marks, a, s.m, 1.0)
    return [Call(marks[-1], s.m, *first), Call(s.told, s.b, *_dpmpp_row([*marks, s.m], s.m, s.b, s.c))]


def _dpmpp_row(
    marks: Sequence[Tensor], low: Tensor, to: Tensor, scale: Tensor | float
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    n = len(marks) - 1
    adds = scale * (1 - to / low)
    points, outputs = {n: to / marks[n]}, {n: to / low - to / marks[n] + adds}
    if n:
        before = marks[n - 1] if marks[n - 1].ndim else marks[n - 1].clamp(max=max(HIGH, float(low.detach().max())))
        slope = 0.5 * (low / to).log() / (before / low).log()
        outputs = {n: outputs[n] + adds * slope, n - 1: -adds * slope}
    return points, outputs


PLUGINS = {"dpm2": (_dpm2, False), "euler": (_euler, True), "ipndm": (_ipndm, True), "dpmpp2m": (_dpmpp2m, True)}
BASES |= PLUGINS


def amed_plugin(
    task: Task,
    *,
    base: str = "ipndm",
    order: int = 3,
    iterations: int = 80,
    rounds: int = 1,
    lr: float = 5e-3,
    minibatch: int = 32,
    scale_dir: float = 0.01,
    scale_time: float = 0.0,
    afs: bool = False,
    tap: str | None = "auto",
    grid: str = "vp_time",
    rho: float | None = None,
    teacher: Literal["converged", "refined"] = "converged",
) -> Fitted:
    """AMED-Plugin (arXiv 2312.00094): "euler", "ipndm" (with ``order``), "dpmpp2m" or "dpm2" on learned levels.

    Every step of the grid is split at a learned level: the base takes two steps instead of one, the second scaled by a
    learned number; "dpm2" takes its one step with the learned level inside. The multistep bases go on from the
    student's own states in training, "dpm2" from the teacher's. Budgets, ``afs``, features, grids and training are
    those of :func:`fewstep.solve.amed.amed`. ``teacher="refined"`` follows the base itself with two levels put between
    two of the student's ("dpm2": Heun's method with one).

    Raises:
        InputError: an unknown base, an order outside 1..4, or what :func:`fewstep.solve.amed.amed` raises it for.
    """
    if base not in PLUGINS:
        raise unknown("base", base, PLUGINS)
    own = (base, 3, {"order": order} if base == "ipndm" else {})
    training = Training(iterations, rounds, lr, minibatch, teacher, refined=("heun", 2, {}) if base == "dpm2" else own)
    scales = scale_dir, scale_time
    return learn(task, base, order, training, grid=grid, rho=rho, afs=afs, tap=tap, scales=scales)
