"""Gauss-Newton on a whole table: all weights and all levels at once, for the error at the end of the trajectory.

The Jacobian needs no derivative of the network: a weight of row k moves the point that row makes along one known
tensor, so a column is the difference of two runs of the remaining rows. Normal equations are summed over batches and
over a part of the pixels, so nothing grows with the number of trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.cond import Cond, take
from fewstep.core.denoiser import module_of
from fewstep.core.tableau import Builder, Tableau
from fewstep.solve.teacher import Task, Teacher

DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# A sample's squared error is weighed by the inverse of its RMSE, so that the sum is of RMSEs and outliers count less;
# at most by this factor against a sample of mean RMSE, so that samples that are already exact do not take over.
MOST_WEIGHT = 20.0


class Column(NamedTuple):
    """A parameter: the logarithm of the level of row ``row`` (feature -1), or the weight of a feature of that row."""

    row: int
    feature: int


@dataclass
class Table:
    """A table in the making: levels that the denoiser is told, and weights by absolute index."""

    sigmas: list[float]
    end: float
    P: list[dict[int, float]]
    W: list[dict[int, float]]

    @classmethod
    def of(cls, made: Tableau) -> Table:
        """From a tableau whose rows all call the denoiser and add no noise."""
        P = [{k - j: w for j, w in enumerate(row) if w} for k, row in enumerate(made.P.tolist())]
        W = [{k - j: w for j, w in enumerate(row) if w} for k, row in enumerate(made.W.tolist())]
        return cls(made.sigmas.tolist(), made.end, P, W)

    def tableau(self) -> Tableau:
        """As a tableau."""
        made = Builder(self.sigmas[0])
        for sigma, level, P, W in zip(self.sigmas, [*self.sigmas[1:], self.end], self.P, self.W, strict=True):
            made.row(sigma, level, P, W)
        return made.build("calibrated")

    def moved(self, columns: list[Column], delta: list[float], history: int | None) -> Table | None:
        """With the parameters moved by ``delta``; None when the levels would no longer decrease."""
        made = Table(list(self.sigmas), self.end, [dict(p) for p in self.P], [dict(w) for w in self.W])
        for (k, feature), d in zip(columns, delta, strict=True):
            if feature < 0:
                made.sigmas[k] *= math.exp(min(0.5, max(-0.5, d)))
                continue
            first = _first(k, history)
            W, P = made.W[k], made.P[k]
            # Features as in _features: the newest output, differences of older ones from it, the residual.
            W[k] = W.get(k, 0.0) + (d if feature == 0 else -d)
            if feature == k - first + 1:
                P[k] = P.get(k, 0.0) + d
            elif feature > 0:
                W[first + feature - 1] = W.get(first + feature - 1, 0.0) + d
        falling = all(a > b for a, b in zip(made.sigmas, [*made.sigmas[1:], self.end], strict=True))
        return made if falling else None


def refine(
    task: Task,
    start: Tableau,
    *,
    steps: int,
    move_levels: bool,
    history: int | None = None,
    weights: Callable[[float], float] | None = None,
) -> tuple[Tableau, int]:
    """At most ``steps`` Gauss-Newton steps from ``start``; returns the table and how many were taken.

    Each step tries several dampings and keeps what does best on fitted and held-out trajectories together; it ends when
    nothing improves or the time is over.
    """
    table, taken = Table.of(start), 0
    best = _score(task, table)
    for i in range(steps):
        began = task.clock.spent
        task.say(f"all rows together, step {i + 1}/{steps}, error {best:.4g}")
        columns, gram, right = _equations(task, table, move_levels, history, weights)
        trials = []
        scale = gram.diagonal().sqrt().clamp_min(1e-30)
        unit = gram / scale / scale[:, None]
        for damping in DAMPINGS:
            eye = torch.eye(len(scale), dtype=torch.float64)
            delta = torch.linalg.solve(unit + damping * eye, right / scale) / scale
            trial = table.moved(columns, delta.tolist(), history)
            if trial is not None and trial.sigmas[-1] >= task.D.sigma_min:
                trials.append((_score(task, trial), damping, trial))
        finite = [t for t in trials if math.isfinite(t[0])]
        if not finite:
            break
        score, _, trial = min(finite, key=lambda t: t[0])
        if score >= 0.999 * best:
            break
        table, best, taken = trial, score, taken + 1
        if not task.clock.allows(task.clock.spent - began):
            break
    return table.tableau(), taken


def _first(k: int, history: int | None) -> int:
    return 0 if history is None else max(0, k + 1 - history)


def _features(k: int, points: list[Tensor], outputs: list[Tensor], history: int | None) -> list[Tensor]:
    newest = outputs[k]
    return [newest, *(d - newest for d in outputs[_first(k, history) : k]), points[k] - newest]


def _run(task: Task, table: Table, points: list[Tensor], outputs: list[Tensor], cond: Cond) -> None:
    """Continues a run in place: the point of the first row to be run is the last of ``points``."""
    for k in range(len(points) - 1, len(table.sigmas)):
        if len(outputs) == k:
            sigma = torch.tensor(table.sigmas[k], dtype=torch.float64)
            outputs.append(task.D(points[k], sigma, cond).to(points[k].dtype))
        terms = [(points[i], w) for i, w in table.P[k].items()] + [(outputs[i], w) for i, w in table.W[k].items()]
        total = terms[0][0] * terms[0][1]
        for tensor, w in terms[1:]:
            total.add_(tensor, alpha=w)
        points.append(total)


def _score(task: Task, table: Table) -> float:
    """Mean of the errors on fitted and on held-out trajectories."""
    made = table.tableau()
    return 0.5 * (task.fit.error(task.D, made, task.batch) + task.choose.error(task.D, made, task.batch))


def _equations(
    task: Task, table: Table, move_levels: bool, history: int | None, weights: Callable[[float], float] | None
) -> tuple[list[Column], Tensor, Tensor]:
    """Columns, and the normal equations ``gram delta = right`` summed over the fitted trajectories."""
    count = len(table.sigmas)
    columns = [
        Column(k, f)
        for k in range(count)
        for f in (*([-1] if move_levels and k else []), *range(k - _first(k, history) + 2))
    ]
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    right = torch.zeros(len(columns), dtype=torch.float64)
    fit = task.fit
    goals = _goals(fit, table, weights)
    typical = fit.error(task.D, table.tableau(), task.batch)
    for i in range(0, len(fit), task.batch):
        rows = slice(i, i + task.batch)
        cond = take(fit.cond, rows)
        points, outputs = [fit.start[rows]], list[Tensor]()
        _run(task, table, points, outputs, cond)
        residuals = [(k, w, goal[rows] - fit.view(points[k])) for k, w, goal in goals]
        own = residuals[-1][2].double().square().mean(1).sqrt().clamp_min(1e-12)
        sample_weight = (typical / own).clamp_max(MOST_WEIGHT)
        moved = [_column(task, table, c, points, outputs, cond, history) for c in columns]
        for k, w, residual in residuals:
            zero = torch.zeros_like(residual)
            J = torch.stack([fit.view(m[k]) if k in m else zero for m in moved]).double()
            weighted = J * (w * sample_weight[:, None])
            gram += (weighted.flatten(1) @ J.flatten(1).T).cpu()
            right += (weighted.flatten(1) @ residual.double().flatten()).cpu()
        task.say(f"Jacobian, trajectories {i}/{len(fit)}")
    return columns, gram, right


def _goals(fit: Teacher, table: Table, weights: Callable[[float], float] | None) -> list[tuple[int, float, Tensor]]:
    """Which points are compared with the teacher: index, weight and target; the end is the last."""
    inner = [] if weights is None else [(k, float(weights(s)), s) for k, s in enumerate(table.sigmas) if k]
    return [(k, w, fit.at(s)) for k, w, s in inner if w > 0] + [(len(table.sigmas), 1.0, fit.at(table.end))]


def _column(
    task: Task,
    table: Table,
    column: Column,
    points: list[Tensor],
    outputs: list[Tensor],
    cond: Cond,
    history: int | None,
) -> dict[int, Tensor]:
    """Derivative of every later point with respect to one parameter, by index."""
    k, feature = column
    step = max(1e-3, _rounding(task) ** 0.5)
    if feature < 0:
        near = Table([*table.sigmas], table.end, table.P, table.W)
        near.sigmas[k] *= math.exp(step)
        moved, outs = points[: k + 1], outputs[:k]
        _run(task, near, moved, outs, cond)
    else:
        along = _features(k, points, outputs, history)[feature]
        if k == len(table.sigmas) - 1:
            return {k + 1: along}
        # Moved by a fraction of the noise in the point, the scale on which a denoiser changes.
        step = step * table.sigmas[k + 1] / max(float(along.square().mean().sqrt()), 1e-30)
        moved, outs = [*points[: k + 1], points[k + 1] + step * along], outputs[: k + 1]
        _run(task, table, moved, outs, cond)
    return {i: (moved[i] - points[i]) / step for i in range(k + 1, len(points))}


def _rounding(task: Task) -> float:
    """The relative precision of the network's numbers."""
    module = module_of(task.D)
    dtype = torch.float32 if module is None else next((p.dtype for p in module.parameters()), torch.float32)
    return torch.finfo(dtype).eps
