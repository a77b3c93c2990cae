"""Least squares: a table fitted to a handful of the teacher's own trajectories, without back-propagation.

First row by row in closed form: the weights of a row are the ridge solution that carries the sampler's *own* points
onto the teacher's next points. Then all rows at once: Gauss-Newton steps on every weight and every level, whose
Jacobian comes from running the rest of the table from slightly moved points (see :mod:`fewstep.solve.gauss_newton`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.solver import build
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError
from fewstep.grid import grid
from fewstep.grid.gits import jump_costs, shortest_path
from fewstep.solve.gauss_newton import refine
from fewstep.solve.teacher import Fitted, Task, Teacher, chunks, rmse

RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
STARTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("euler", {}),
    ("dpmpp", {"order": 2}),
    ("dpmpp", {"order": 3}),
    ("ipndm", {"order": 2}),
    ("ipndm", {"order": 3}),
    ("ipndm", {"order": 4}),
)
GRIDS: tuple[tuple[str, dict[str, Any]], ...] = (("karras", {}), ("logsnr", {}), ("ays", {"rescale": True}))
# Points and outputs of the closed-form part; a gigabyte holds 256 trajectories of a 128x128x4 latent at 8 evaluations.
MEMORY = 1 << 30


def least_squares(
    task: Task,
    *,
    ridge: float | Literal["auto"] = "auto",
    searches: int = 60,
    refinements: int = 8,
    history: int | None = None,
    weights: Callable[[float], float] | float | None = None,
) -> Fitted:
    """Grid, weights and levels fitted to the trajectories of ``task``.

    Without a given grid the levels come from dynamic programming (arXiv 2405.11326) or a standard grid, whichever fits
    better, then from coordinate descent for at most ``searches`` trials, then with the weights from ``refinements``
    Gauss-Newton steps. ``ridge="auto"`` and the damping of those steps are chosen on held-out trajectories.

    ``history`` bounds how many of the latest outputs a row weighs (all by default). ``weights`` says how much an inner
    point's distance to the teacher counts beside the end's, as a function of its level or a number for all; by default
    only the end counts, and
    inner points may leave the teacher's trajectory (``refinements=0`` keeps every row's target on it).

    Raises:
        InputError: a negative ridge, count or history.
    """
    if ridge != "auto" and (isinstance(ridge, str) or not ridge >= 0):
        raise InputError(f"ridge must be 'auto' or a number >= 0, got {ridge!r}")
    if searches < 0 or refinements < 0 or (history is not None and history < 1):
        raise InputError(
            f"least squares needs searches and refinements >= 0 and history >= 1, got {searches}, {refinements} and "
            f"{history}"
        )
    if weights is not None and not callable(weights):
        each = float(weights)
        weights = lambda sigma: each  # noqa: E731
    fit = _Rows(task, history)
    if task.grid is None:
        index = _descend(fit, _first_levels(fit, task), searches, task)
    else:
        index = [task.teacher.index(s) for s in task.grid.tolist()]
        if fit.to_zero:
            index[-1] = len(task.teacher.levels) - 1
    start = fit.choose_start(index)
    chosen = min(RIDGES, key=lambda r: fit.score(index, r)) if ridge == "auto" else float(ridge)
    table = fit.table(index, chosen)
    facts: dict[str, Any] = {"ridge": chosen, "closed_form_rmse": task.choose.error(task.D, table, task.batch)}
    if refinements:
        table, steps = refine(
            task, table, steps=refinements, move_levels=task.grid is None, history=history, weights=weights
        )
        facts["gauss_newton_steps"] = steps
    return Fitted(table, start, facts)


def _first_levels(fit: _Rows, task: Task) -> list[int]:
    """The best of several grids by the closed-form fit on each."""
    teacher, nfe = task.teacher, task.nfe
    rows = slice(0, fit.n)
    cost = jump_costs(teacher.points[:, rows], teacher.outputs[:, rows], teacher.levels)
    grids = [shortest_path(cost, nfe, c) for c in (1.0, 1.15)]
    low, high, last = float(teacher.levels[-1]), float(teacher.levels[0]), len(teacher.levels) - 1
    if nfe > 1:
        # A fitted last row jumps from a level well above sigma_min; a standard grid of one step more ends there.
        for kind, options in GRIDS:
            levels = grid(kind, nfe, low, high, to_zero=False, **options)
            wanted = [teacher.index(s) for s in levels.tolist()]
            spread = [max(i, k) for k, i in enumerate(wanted)]
            grids.append([*spread[:-1], last])
    grids = [g for g in grids if all(a < b for a, b in itertools.pairwise(g))]
    scores = []
    for g in grids:
        fit.choose_start(g)
        scores.append(fit.score(g, 1e-5))
        task.say(f"grids {len(scores)}/{len(grids)}")
    best = grids[min(range(len(grids)), key=scores.__getitem__)]
    fit.choose_start(best)
    return best


@dataclass
class _State:
    """A fitted prefix: own points and outputs, and the P and W weights of each row."""

    index: list[int]
    points: list[Tensor]
    outputs: list[Tensor]
    P: list[dict[int, float]] = field(default_factory=list)
    W: list[dict[int, float]] = field(default_factory=list)


class _Rows:
    """Fits row after row; remembers the last run so that trials that change a late level reuse its early rows."""

    def __init__(self, task: Task, history: int | None) -> None:
        self.D, self.batch, self.history = task.D, task.batch, history
        # As many trajectories as fit into memory: thousands of pixels of a dozen determine a row's handful of weights.
        each = (2 * task.nfe + 2) * task.teacher.start[0].numel() * task.teacher.start.element_size()
        room = max(8, MEMORY // each)
        self.n = min(len(task.fit), max(6, room * 3 // 4))
        held = min(task.held, max(2, room // 4))
        fitting, choice = task.fit.part(slice(0, self.n)), task.choose.part(slice(0, held))
        self.teacher = Teacher(
            fitting.levels,
            torch.cat([fitting.start, choice.start]),
            torch.cat([fitting.points, choice.points], 1),
            torch.cat([fitting.outputs, choice.outputs], 1),
            fitting.pixels,
            {k: torch.cat([v, choice.cond[k]]) for k, v in fitting.cond.items()},
        )
        self.starts = [s for s in STARTS if history is None or s[1].get("order", 1) <= history]
        self.start: tuple[str, dict[str, Any]] = STARTS[0]
        self.cache: tuple[float, _State] | None = None
        # Then the last index stands for level 0, and the target there is the denoised end.
        self.to_zero = task.grid is None or float(task.grid[-1]) == 0

    def levels(self, index: Sequence[int]) -> Tensor:
        """The grid of these indices, ending at 0 if that was asked for."""
        levels = self.teacher.levels[list(index)].clone()
        if self.to_zero:
            levels[-1] = 0
        return levels

    def choose_start(self, index: Sequence[int]) -> Tableau:
        """Takes the known solver that does best on the held-out trajectories as the table the ridge pulls towards."""
        held = self.teacher.part(slice(self.n, None))
        tables = [build(name, self.levels(index), **options) for name, options in self.starts]
        errors = [held.error(self.D, t, self.batch) for t in tables]
        best = min(range(len(tables)), key=lambda i: (math.isnan(errors[i]), errors[i]))
        if self.starts[best] != self.start:
            self.start, self.cache = self.starts[best], None
        return tables[best]

    def run(self, index: Sequence[int], ridge: float) -> _State:
        """All rows of the grid ``index``, reusing the common prefix of the last run with this ridge."""
        index = list(index)
        base = build(self.start[0], self.levels(index), **self.start[1])
        state = self._prefix(index, ridge)
        for k in range(len(state.P), len(index) - 1):
            if len(state.outputs) == k:
                out = chunks(self.D, self.batch, state.points[k], self.teacher.levels[index[k]], self.teacher.cond)
                state.outputs.append(out)
            self._fit_row(state, base, k, ridge)
        self.cache = (ridge, state)
        return state

    def _prefix(self, index: list[int], ridge: float) -> _State:
        fresh = _State(index, [self.teacher.start], [])
        if self.cache is None or self.cache[0] != ridge:
            return fresh
        old = self.cache[1]
        same = 0
        while same < min(len(index), len(old.index)) and index[same] == old.index[same]:
            same += 1
        rows = max(0, same - 1)
        # The first output depends on nothing that is fitted.
        outputs = old.outputs[: max(same, 1)] if index[0] == old.index[0] else []
        return _State(index, old.points[: rows + 1] if same else fresh.points, outputs, old.P[:rows], old.W[:rows])

    def _fit_row(self, state: _State, base: Tableau, k: int, ridge: float) -> None:
        """Adds to the base row the correction that least squares asks for, shrunk towards none by the ridge."""
        P = {k - j: w for j, w in enumerate(base.P[k].tolist()) if w}
        W = {k - j: w for j, w in enumerate(base.W[k].tolist()) if w}
        ends = self.to_zero and k == len(state.index) - 2
        target = self.teacher.end if ends else self.teacher.points[state.index[k + 1]]
        guess = sum(w * state.points[i] for i, w in P.items()) + sum(w * state.outputs[i] for i, w in W.items())
        assert isinstance(guess, Tensor)
        newest = state.outputs[k]
        first = 0 if self.history is None else max(0, k + 1 - self.history)
        # Differences from the newest output and the residual: nearly orthogonal, unlike the raw tensors.
        features = [newest, *(d - newest for d in state.outputs[first:k]), state.points[k] - newest]
        wanted = target[: self.n] - self.teacher.view(guess[: self.n])
        c = self._solve([self.teacher.view(f[: self.n]) for f in features], wanted, ridge)
        for i, w in enumerate(c[1:-1], first):
            W[i] = W.get(i, 0.0) + w
        W[k] = W.get(k, 0.0) + c[0] - sum(c[1:])
        P[k] = P.get(k, 0.0) + c[-1]
        state.P.append(P)
        state.W.append(W)
        point = sum(w * state.points[i] for i, w in P.items()) + sum(w * state.outputs[i] for i, w in W.items())
        assert isinstance(point, Tensor)
        state.points.append(point)

    def _solve(self, features: list[Tensor], target: Tensor, ridge: float) -> list[float]:
        """Normal equations in float64, streamed over the batch, each feature scaled to unit norm."""
        count = len(features)
        gram = torch.zeros(count + 1, count + 1, dtype=torch.float64)
        for i in range(0, len(target), self.batch):
            rows = torch.stack([f[i : i + self.batch].flatten() for f in [*features, target]]).double()
            gram += (rows @ rows.T).cpu()
        scale = gram.diagonal()[:count].sqrt().clamp_min(1e-30)
        unit = gram[:count, :count] / scale / scale[:, None]
        right = gram[:count, count] / scale
        # The floor keeps the system solvable when two features coincide exactly.
        return (
            torch.linalg.solve(unit + (ridge + 1e-12) * torch.eye(count, dtype=torch.float64), right) / scale
        ).tolist()

    def score(self, index: Sequence[int], ridge: float) -> float:
        """Mean of the final RMSE on the held-out and on the fitted trajectories."""
        end = self.teacher.view(self.run(index, ridge).points[-1])
        error = rmse(end, self.teacher.end if self.to_zero else self.teacher.points[index[-1]])
        found = 0.5 * float(error[self.n :].mean() + error[: self.n].mean())
        return math.inf if math.isnan(found) else found

    def table(self, index: Sequence[int], ridge: float) -> Tableau:
        """The fitted rows as a table."""
        state = self.run(index, ridge)
        levels = self.levels(index).tolist()
        made = Builder(levels[0])
        for sigma, level, P, W in zip(levels[:-1], levels[1:], state.P, state.W, strict=True):
            made.row(sigma, level, P, W)
        return made.build("calibrated")


def _descend(fit: _Rows, index: list[int], searches: int, task: Task, ridge: float = 1e-5) -> list[int]:
    """Moves one inner level at a time along the fine grid while the score falls; the step halves when nothing helps."""
    best, step, tried = fit.score(index, ridge), 4, 0
    while step and tried < searches:
        improved = False
        for k in range(len(index) - 2, 0, -1):
            for move in (-step, step):
                trial = [*index[:k], index[k] + move, *index[k + 1 :]]
                # Half of the time that is left belongs to the Gauss-Newton steps.
                spent = not task.clock.allows(0.5 * (task.clock.budget or 0.0))
                if not trial[k - 1] < trial[k] < trial[k + 1] or tried >= searches or spent:
                    continue
                score, tried = fit.score(trial, ridge), tried + 1
                task.say(f"levels {tried}/{searches}")
                if score < best:
                    best, index, improved = score, trial, True
        step = step if improved else step // 2
    return index
