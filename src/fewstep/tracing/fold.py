"""Folding: the dense weights of every point become the recurrence with the shortest history.

A dense row says how a point depends on the start, on all outputs and on all noises so far. The same point is also a
combination of a few recent points, outputs and noises, which is what a sampler holds in memory. The outputs and
noises of a window are coordinates of their own, so that a window of rows is long enough exactly when the coordinates
outside it can be had from the points inside it: a small linear system per row, solved in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.tableau import Builder

# Weights far above the points they make would trade a short history for rounding errors.
MOST_GROWTH = 1e4


class Record(NamedTuple):
    """What a sampler is, densely.

    ``points`` (C + 1, 1 + C + M) float64 holds, for each of the C calls and for the result, the weights of the start,
    of the C outputs and of M unit noises; ``sigmas`` are the levels of the calls, ``start`` and ``end`` the others.
    """

    points: Tensor
    sigmas: list[float]
    start: float
    end: float


class Folded(NamedTuple):
    """A table in the making, and of which draws each row's noise is made: row -> {draw: weight}, of unit norm."""

    builder: Builder
    mixes: dict[int, dict[int, float]]


class _Noise(NamedTuple):
    """Draws that are always used in one proportion: their common column, the row of its first use, and the mix."""

    column: Tensor
    first: int
    mix: dict[int, float]


class _Rows(NamedTuple):
    """The rows before their weights are known: ``states`` one longer than the others, None where there is nothing."""

    states: list[Tensor]
    levels: list[float]
    calls: list[int | None]
    noises: list[int | None]


def fold(record: Record, tolerance: float = 1e-12) -> Folded:
    """The recurrence of a record, exact to ``tolerance`` relative to each point, with the shortest history.

    A point that the sampler only adds noise to, and further noises of one step, become rows without a call.
    """
    calls = len(record.sigmas)
    scaled = record.points.clone()
    # Each coordinate counts at its own standard deviation: 1 for outputs and noises, the level for the start.
    unit = math.hypot(1.0, record.start)
    scaled[:, 0] *= unit
    noises = _merge(scaled[:, 1 + calls :])
    columns = [scaled[:, : 1 + calls], *(n.column[:, None] for n in noises)]
    rows = _lay_out(torch.cat(columns, 1), noises, record, unit, tolerance)
    made, mixes = Builder(record.start), dict[int, dict[int, float]]()
    fitter = _Fitter(rows, 1 + calls, tolerance)
    for r in range(len(rows.calls)):
        call, noise = rows.calls[r], rows.noises[r]
        made.row(None if call is None else record.sigmas[call], rows.levels[r + 1], *fitter.weights(r))
        if noise is not None:
            mixes[r] = noises[noise].mix
    return Folded(made, mixes)


def _merge(columns: Tensor) -> list[_Noise]:
    """Draws as independent unit noises: those never used left out, those always used in one proportion made one."""
    found: list[_Noise] = []
    by_first: dict[int, list[int]] = {}
    for m, column in enumerate(columns.T):
        norm = float(column.norm())
        if norm == 0:
            continue
        first = int(column.nonzero()[0, 0])
        for i in by_first.setdefault(first, []):
            other, length = found[i], float(found[i].column.norm())
            cosine = float(other.column @ column) / (length * norm)
            if float((column / norm - cosine * other.column / length).norm()) < 1e-12:
                total = math.hypot(length, norm)
                mix = {k: c * length / total for k, c in other.mix.items()} | {m: cosine * norm / total}
                found[i] = _Noise(other.column * (total / length), first, mix)
                break
        else:
            by_first[first].append(len(found))
            found.append(_Noise(column, first, {m: 1.0}))
    return found


def _lay_out(points: Tensor, noises: list[_Noise], record: Record, unit: float, tolerance: float) -> _Rows:
    """Which row makes which point, calls the denoiser where, and draws which noise (at most one)."""
    start = torch.zeros_like(points[0])
    start[0] = unit
    rows = _Rows([start], [record.start], [], [])
    levels = [*record.sigmas, record.end]
    called: int | None = None
    for i, target in enumerate(points):
        if i == 0 and float((target - start).abs().max()) <= tolerance * unit:
            called = 0
            continue
        new = [n for n, noise in enumerate(noises) if noise.first == i]
        for n in new[:-1]:
            # A row draws one noise: each further one comes from a row that only copies the point.
            _add(rows, rows.states[-1], rows.levels[-1], None, n)
        _add(rows, target, levels[i], called, new[-1] if new else None)
        called = i
    return rows


def _add(rows: _Rows, state: Tensor, level: float, call: int | None, noise: int | None) -> None:
    rows.states.append(state)
    rows.levels.append(level)
    rows.calls.append(call)
    rows.noises.append(noise)


class _Fitter:
    """Finds the weights of each row in the shortest window of rows that holds what the row needs.

    A row may use as long a window as the longest row must, if that lets it do with one point.
    """

    def __init__(self, rows: _Rows, first_noise: int, tolerance: float) -> None:
        self.rows, self.first_noise, self.tolerance = rows, first_noise, tolerance
        self.states = torch.stack(rows.states)
        found = [self._shortest(r) for r in range(len(rows.calls))]
        deepest = max(depth for depth, _ in found)
        self.found = [self._with_one(r, depth, deepest, points) for r, (depth, points) in enumerate(found)]

    def weights(self, r: int) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
        """The weights of row r on points, outputs and noises, by index."""
        depth, points = self.found[r]
        target = self.states[r + 1]
        rest = target - sum((w * self.states[i] for i, w in points.items()), torch.zeros_like(target))
        outputs, noises = self._columns(r, depth)
        # What is left of a sum that cancels is rounding, and no weight.
        least = 1e-15 * _largest(target)
        each = [{i: float(rest[c]) for i, c in columns.items()} for columns in (outputs, noises)]
        return points, *({i: w for i, w in found.items() if abs(w) > least} for found in each)  # type: ignore[return-value]

    def _columns(self, r: int, depth: int) -> tuple[dict[int, int], dict[int, int]]:
        """The coordinates of the outputs and the noises of the last ``depth`` rows, by row."""
        window = range(r, r - depth, -1)
        calls = [(i, self.rows.calls[i]) for i in window]
        noises = [(i, self.rows.noises[i]) for i in window]
        return (
            {i: 1 + c for i, c in calls if c is not None},
            {i: self.first_noise + n for i, n in noises if n is not None},
        )

    def _shortest(self, r: int) -> tuple[int, dict[int, float]]:
        for depth in range(1, r + 2):
            points = self._points(r, depth)
            if points is not None:
                return depth, points
        raise AssertionError("with the whole history, the first point alone holds the start")

    def _with_one(self, r: int, depth: int, deepest: int, points: dict[int, float]) -> tuple[int, dict[int, float]]:
        if len(points) > 1:
            for longer in range(depth + 1, min(deepest, r + 1) + 1):
                one = self._one(r, longer)
                if one is not None:
                    return longer, one
        return depth, points

    def _one(self, r: int, depth: int) -> dict[int, float] | None:
        found = (self._solve(r, depth, [i]) for i in range(r, r - depth, -1))
        return next((points for points in found if points is not None), None)

    def _points(self, r: int, depth: int) -> dict[int, float] | None:
        """Weights of the points of a window that leave nothing outside it: none, one, or as few as it takes."""
        window = list(range(r, r - depth, -1))
        for found in (self._solve(r, depth, []), self._one(r, depth)):
            if found is not None:
                return found
        found = self._solve(r, depth, window) if depth > 1 else None
        if found is None:
            return None
        for i in reversed(window):
            found = self._solve(r, depth, [j for j in found if j != i]) or found
        return found

    def _solve(self, r: int, depth: int, indices: list[int]) -> dict[int, float] | None:
        """Least-squares weights of some points for the coordinates outside a window, if they fit and are not wild."""
        outside = torch.ones(self.states.shape[1], dtype=torch.bool)
        for columns in self._columns(r, depth):
            outside[list(columns.values())] = False
        size = _largest(self.states[r + 1])
        wanted = self.states[r + 1][outside]
        if not indices:
            return {} if _largest(wanted) <= self.tolerance * size else None
        basis = self.states[indices][:, outside].T
        if not basis.numel():
            return None
        scale = basis.abs().amax(0).clamp_min(1e-300)
        weights = torch.linalg.lstsq(basis / scale, wanted[:, None], driver="gelsd").solution[:, 0] / scale
        growth = float((weights.abs() * self.states[indices].abs().amax(1)).max())
        if _largest(wanted - basis @ weights) > self.tolerance * size or growth > MOST_GROWTH * size:
            return None
        return dict(zip(indices, weights.tolist(), strict=True))


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if len(values) else 0.0
