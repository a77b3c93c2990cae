"""Tables expanded to dense weights, and the comparison of two tables that rests on it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.tableau import Tableau


class Dense(NamedTuple):
    """Every point of a table as weights of what it is made of, all float64.

    ``start`` (K + 1,), ``outputs`` (K + 1, C) of the C calls in order and ``noises`` (K + 1, M) of the M noises that
    are drawn, in order; row k belongs to the point y[k]. ``calls`` (C,) and ``draws`` (M,) are the rows of each.
    """

    start: Tensor
    outputs: Tensor
    noises: Tensor
    calls: list[int]
    draws: list[int]


def dense(tableau: Tableau) -> Dense:
    """The dense weights of every point of a table over its start, its outputs and its noises."""
    rows, plan = tableau.rows, tableau.plan
    calls = [k for k, row in enumerate(plan) if row.sigma is not None]
    draws = [k for k, row in enumerate(plan) if row.draw]
    output = {k: 1 + c for c, k in enumerate(calls)}
    noise = {k: 1 + len(calls) + m for m, k in enumerate(draws)}
    weights = torch.zeros(rows + 1, 1 + len(calls) + len(draws), dtype=torch.float64)
    weights[0, 0] = 1
    for k, row in enumerate(plan):
        for i, w in row.points:
            weights[k + 1] += w * weights[i]
        for i, w in row.outputs:
            weights[k + 1, output[i]] += w
        for i, w in row.noises:
            weights[k + 1, noise[i]] += w
    start, outputs, noises = weights.split([1, len(calls), len(draws)], 1)
    return Dense(start[:, 0], outputs, noises, calls, draws)


class RowDifference(NamedTuple):
    """How two samplers differ at the start, at one call of the denoiser, or at the end.

    Attributes:
        where: "start", "call 0", "call 1", ... or "end".
        level_a: the noise level of the first sampler's point there; None where it makes no such call.
        level_b: the same of the second.
        weight: the largest difference of the points' weights, infinite where one makes no such call. The start counts
            at its standard deviation (the level, at least 1), and noises by their covariance with all earlier points,
            so that two ways to draw the same noise are no difference.
    """

    where: str
    level_a: float | None
    level_b: float | None
    weight: float

    def within(self, tolerance: float) -> bool:
        """Whether weights agree to ``tolerance``, and levels to ``tolerance`` relative to the larger of 1 and both."""
        if self.level_a is None or self.level_b is None:
            return False
        near = abs(self.level_a - self.level_b) <= tolerance * max(1.0, self.level_a, self.level_b)
        return near and self.weight <= tolerance


def compare(a: Tableau, b: Tableau) -> list[RowDifference]:
    """Row by row, how far two tables are from being the same sampler, however each is written.

    The points compared are the start, those at which the denoiser is called (the k-th of one with the k-th of the
    other) and the end. Two tables with all differences 0 give the same samples, in distribution if they add noise.
    """
    first, second = dense(a), dense(b)
    calls = max(len(first.calls), len(second.calls))
    (xa, ca), (xb, cb) = (_called(d, t.start, calls) for d, t in ((first, a), (second, b)))
    sa, sb = ca.diagonal().sqrt(), cb.diagonal().sqrt()
    found = [RowDifference("start", a.start, b.start, 0.0)]
    for k in [*range(calls), calls]:
        where = f"call {k}" if k < calls else "end"
        level_a, level_b = (_level(t, d.calls, k, calls) for t, d in ((a, first), (b, second)))
        if level_a is None or level_b is None:
            found.append(RowDifference(where, level_a, level_b, math.inf))
            continue
        # By the spread of the other point: that of this one may be next to nothing, as at the end of a sampler.
        lean = (ca[k, :k] - cb[k, :k]).abs() / torch.maximum(sa, sb)[:k].clamp(min=1e-12)
        noise = max(float((sa[k] - sb[k]).abs()), float(lean.max()) if k else 0.0)
        found.append(RowDifference(where, level_a, level_b, max(float((xa[k] - xb[k]).abs().max()), noise)))
    return found


def _called(weights: Dense, start: float, calls: int) -> tuple[Tensor, Tensor]:
    """(calls + 1, 1 + calls) weights of start and outputs at the calls and the end, and their noises' covariance.

    Rows of calls that the table does not make are zero.
    """
    rows = torch.cat([weights.start[:, None] * math.hypot(1.0, start), weights.outputs, weights.noises], 1)
    picked = torch.zeros(calls + 1, rows.shape[1], dtype=torch.float64)
    picked[: len(weights.calls)] = rows[weights.calls]
    picked[calls] = rows[-1]
    fixed = torch.zeros(calls + 1, 1 + calls, dtype=torch.float64)
    fixed[:, : 1 + len(weights.calls)] = picked[:, : 1 + len(weights.calls)]
    noises = picked[:, 1 + len(weights.calls) :]
    return fixed, noises @ noises.T


def _level(tableau: Tableau, called: list[int], k: int, calls: int) -> float | None:
    if k == calls:
        return float(tableau.levels[-1])
    return float(tableau.sigmas[called[k]]) if k < len(called) else None
