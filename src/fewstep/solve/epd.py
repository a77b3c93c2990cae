"""EPD-Solver (arXiv 2507.14797): the direction of a step is learned from several evaluations that run side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.core.solver import solver
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.solve.learned import (
    Call,
    Fitted,
    Learner,
    Task,
    Training,
    check_afs,
    check_scales,
    chosen_levels,
    lowered,
    parallel_step,
    plain_step,
    tabulate,
    train,
)

Table = Sequence[float] | Sequence[Sequence[float]]


@solver
def epd_table(
    sigmas: Tensor,
    *,
    r: Table = (1 / 3, 2 / 3),
    w: Table | None = None,
    o: Table | None = None,
    d: Table | None = None,
    afs: bool = False,
) -> Tableau:
    """EPD-Solver's step with given numbers (arXiv 2507.14797).

    Each table has a number for each of a step's K parallel points, the same for all steps or a row for each:
    ``m_j = b^r_j a^(1 - r_j)``, ``y_j = x + (m_j - a) eps(x, a)`` and
    ``x_b = x + (b - a) sum_j w_j o_j (y_j - D(y_j, d_j m_j)) / m_j``. The weights ``w`` of a step sum to 1 and are
    equal by default; ``o`` and ``d`` are 1 by default. A row without numbers makes the step Euler's, as one that ends
    at 0 is. K + 1 evaluations a step, of which the last K form one wave, so that :attr:`Tableau.latency` is 2 a step.
    ``afs`` saves the first one as in :func:`fewstep.solve.amed.amed_table`. Order 2 if ``sum_j w_j r_j = 1/2``.

    Raises:
        InputError: tables that do not agree or another number of rows than steps, r outside (0, 1), negative w or not
            of sum 1, o or d not above 0, ``afs`` below level 10, or a bad grid.
    """
    steps = len(sigmas) - 1
    check_afs(afs, sigmas)
    places = _rows("r", r, steps)
    shares = _rows("w", [[1 / len(row)] * len(row) if row else [] for row in places] if w is None else w, steps)
    ones = [[1.0] * len(row) for row in places]
    scales, tells = (_rows(name, ones if v is None else v, steps) for name, v in (("o", o), ("d", d)))
    for k, row in enumerate(zip(places, shares, scales, tells, strict=True)):
        _check_row(k, *row)
    tables = [
        [torch.tensor(v, dtype=torch.float64) for v in row] for row in zip(places, shares, scales, tells, strict=True)
    ]

    def calls(k: int, marks: Sequence[Tensor]) -> list[Call]:
        return _step(marks, sigmas[k + 1], tables[k])

    return tabulate(steps, afs, sigmas, calls).build("epd")


def _rows(name: str, table: Table, steps: int) -> list[list[float]]:
    """A table as a row for each step."""
    if all(isinstance(v, int | float) for v in table) and len(table):
        return [[float(v) for v in table]] * steps  # type: ignore[arg-type]
    if len(table) != steps or any(isinstance(v, int | float) for v in table):
        raise InputError(
            f"epd_table needs for {name} one row of numbers, or a row for each of {steps} steps: {table!r}"
        )
    return [[float(v) for v in row] for row in table]  # type: ignore[union-attr]


def _check_row(k: int, r: list[float], w: list[float], o: list[float], d: list[float]) -> None:
    if not len(r) == len(w) == len(o) == len(d):
        raise InputError(f"epd_table: step {k} has {len(r)} r, {len(w)} w, {len(o)} o and {len(d)} d: as many of each")
    if not all(0 < v < 1 for v in r):
        raise InputError(f"epd_table needs 0 < r < 1, got {r} in step {k}")
    if r and not (all(v >= 0 for v in w) and math.isclose(sum(w), 1, rel_tol=1e-9)):
        raise InputError(f"epd_table needs weights w >= 0 of sum 1, got {w} in step {k}")
    if not all(0 < v < math.inf for v in (*o, *d)):
        raise InputError(f"epd_table needs o > 0 and d > 0, got o={o} and d={d} in step {k}")


def _step(marks: Sequence[Tensor], b: Tensor, numbers: Sequence[Tensor]) -> list[Call]:
    """The rows of a step; ``numbers`` are r, w, o and d, (K,) each."""
    r, w, o, d = numbers
    if b == 0 or not len(r):
        return [plain_step(marks, b)]
    low = lowered(float(marks[-1]), float(b))
    mids = low * (float(b) / low) ** r
    gains = w * o
    return parallel_step(marks, b, list(zip(mids, d * mids, gains, strict=True)), gains.sum())


@dataclass(frozen=True, eq=False)
class _Learned(Learner):
    """The tables of all steps as unbounded logits, in the form that the training knows."""

    levels: Tensor
    counts: tuple[int, ...]
    logits: list[nn.Parameter]
    scale_dir: float
    scale_time: float
    afs: bool
    tap: str | None = None

    def numbers(self, k: int) -> list[Tensor]:
        """r, w, o and d of step k."""
        at = iter(self.logits)
        rows = [next(at) if count else torch.zeros(4, 0, dtype=torch.float64) for count in self.counts[: k + 1]]
        r, w, o, d = rows[k]
        o = 1 + self.scale_dir * (2 * (0.5 * o).sigmoid() - 1)
        return [r.sigmoid(), w.softmax(0), o, 1 + self.scale_time * (2 * (0.5 * d).sigmoid() - 1)]

    def calls(self, k: int, marks: Sequence[Tensor], feature: Tensor | None) -> list[Call]:
        return _step(marks, self.levels[k + 1], self.numbers(k))

    def weights(self) -> list[nn.Parameter]:
        return self.logits

    def sampler(self) -> Tableau:
        return self.table("epd")


def epd(
    task: Task,
    *,
    points: int = 2,
    iterations: int = 80,
    rounds: int = 1,
    lr: float = 5e-2,
    minibatch: int = 32,
    scale_dir: float = 0.01,
    scale_time: float = 0.0,
    afs: bool = False,
    own: bool = False,
    grid: str = "vp_time",
    rho: float | None = None,
    teacher: Literal["converged", "refined"] = "converged",
) -> Fitted:
    """EPD-Solver (arXiv 2507.14797): ``points`` parallel evaluations a step, whose places and weights are learned.

    See :func:`epd_table` for a step. Its numbers are free parameters, the same for all pictures, so the result is a
    :class:`Tableau`; run it with ``parallel=True`` to evaluate a step's points as one batch. The budget counts every
    evaluation; the facts tell the ``latency`` too, which is what the paper calls NFE. Where the budget is no multiple
    of ``points + 1``, the first steps have fewer points (0 is an Euler step). A grid given by the task is one of steps:
    it decides how many evaluations there are.

    The places start spread evenly in (0, 1) with equal weights, rather than at random as published. The loss is the
    squared distance to the teacher's states at every level, the last included, where the paper compares features of
    an Inception network. ``own`` starts a step from the student's state instead of the teacher's. ``scale_dir`` bounds
    how far the factors of the directions depart from 1 and ``scale_time`` those of the levels that the denoiser is
    told. The other options are those of :func:`fewstep.solve.amed.amed`.

    Raises:
        InputError: fewer than 2 evaluations, ``points < 1``, ``afs`` below level 10, a scale outside [0, 1), an
            unknown grid or teacher, or a setting of the training outside its range.
    """
    if points < 1:
        raise InputError(f"epd needs at least 1 parallel point a step, got points={points}")
    check_scales(scale_dir, scale_time)
    training = Training(iterations, rounds, lr, minibatch, teacher)
    counts = _budget(task, points, afs)
    levels = chosen_levels(task, grid, len(counts), rho)
    check_afs(afs, levels)
    if task.grid is not None:
        counts = [points if b > 0 else 0 for b in levels[1:]]
    if not any(counts):
        raise InputError(f"the grid {levels.tolist()} has no step that could be split: it must reach a level above 0")
    places = [[(j + 1) / (count + 1) for j in range(count)] for count in counts]
    start = epd_table(levels, r=places, afs=afs)
    logits = []
    for row in places:
        if row:
            first = torch.zeros(4, len(row), dtype=torch.float64)
            first[0] = torch.tensor(row, dtype=torch.float64).logit()
            logits.append(nn.Parameter(first))
    student = _Learned(levels, tuple(counts), logits, scale_dir, scale_time, afs)
    facts = train(task, student, own=own, training=training)
    made = student.sampler()
    facts |= {"points": counts, "steps": len(counts), "latency": made.latency, "afs": afs}
    with torch.no_grad():
        numbers = [[v.tolist() for v in student.numbers(k)] for k in range(len(counts))]
    return Fitted(made, start, facts | dict(zip("rwod", map(list, zip(*numbers, strict=True)), strict=True)))


def _budget(task: Task, points: int, afs: bool) -> list[int]:
    """Parallel points of each step, so that the evaluations add up to the budget exactly."""
    if task.grid is not None:
        return [points]
    if task.nfe + afs < 2:
        raise InputError(f"epd takes at least {2 - afs} evaluations, got {task.nfe}")
    whole = task.nfe + afs
    steps = -(-whole // (points + 1))
    spare = whole - steps
    return [spare // steps + (k >= steps - spare % steps) for k in range(steps)]
