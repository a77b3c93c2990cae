"""Calibration: fits a sampler's table to a handful of the teacher's own trajectories, in closed form.

Row by row, the weights of the denoiser outputs so far (and of the current point) are the ridge least-squares solution
that carries the calibrated sampler's *own* points onto the teacher's next points. Nothing is back-propagated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from fewstep.core.cond import Cond, take
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.sample import sample, trajectory
from fewstep.core.solver import build, check_grid
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError
from fewstep.grid.gits import jump_costs, shortest_path
from fewstep.grid.karras import karras

FINE = 96
RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
STARTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("euler", {}),
    ("dpmpp", {"order": 2}),
    ("ipndm", {"order": 2}),
    ("ipndm", {"order": 3}),
    ("ipndm", {"order": 4}),
)


@torch.no_grad()
def calibrate(
    D: Denoiser,
    *,
    nfe: int | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    trajectories: int = 256,
    seed: int = 0,
    cond: Cond | None = None,
    ridge: float | Literal["auto"] = "auto",
    batch: int = 1024,
    progress: bool = False,
    searches: int = 60,
    device: torch.device | str | None = None,
) -> Tableau:
    """A fitted table for ``D`` with ``nfe`` evaluations, ending at level 0, or on the grid ``sigmas``.

    With ``nfe`` the levels are chosen too: dynamic programming over the teacher's trajectories (arXiv 2405.11326), then
    coordinate descent on the error of a quarter of the trajectories, which the weights do not see, for at most
    ``searches`` trials. ``ridge="auto"`` is chosen on the same quarter. ``cond`` is a condition of any batch size, its
    rows are used in turn. ``D`` needs ``shape``, ``sigma_min`` and ``sigma_max``.

    ``trajectories // 4`` further trajectories, used for nothing else, decide whether the fitted table or the solver it
    started from is returned, so that the result is never worse there; ``meta["calibration"]`` reports both errors.

    Raises:
        InputError: neither or both of nfe and sigmas, nfe < 1, a bad grid, fewer than 8 trajectories, a negative
            ridge, or a denoiser whose output is not finite (names the level).
    """
    grid = check_request(nfe, sigmas, trajectories, ridge)
    if device is None:
        device = next((p.device for p in D.parameters()), "cpu") if isinstance(D, torch.nn.Module) else "cpu"
    held, check = trajectories // 4, trajectories // 4
    with _Progress(progress) as say:
        levels, place = _fine_levels(D, grid), torch.device(device)
        teacher = _Teacher.draw(D, levels, trajectories + check, seed, cond, batch, place, say)
        work, fresh = teacher.part(slice(0, trajectories)), teacher.part(slice(trajectories, None))
        fit = _Fitter(D, work, trajectories - held, batch, to_zero=grid is None or float(grid[-1]) == 0)
        if grid is None:
            assert nfe is not None
            cost = jump_costs(work.points[:, : fit.n], work.outputs[:, : fit.n], work.levels)
            index = shortest_path(cost, nfe)
            fit.choose_start(index)
            index = _descend(fit, index, searches, say)
        else:
            index = [int((work.levels - s).abs().argmin()) for s in grid.tolist()]
            if grid[-1] == 0:
                index[-1] = len(work.levels) - 1
        start = fit.choose_start(index)
        choice = min(RIDGES, key=lambda r: fit.score(index, r)) if ridge == "auto" else float(ridge)
        fitted = fit.table(index, choice)
    errors = {"start": fresh.error(D, start, batch), "fitted": fresh.error(D, fitted, batch)}
    kept = fitted if errors["fitted"] <= errors["start"] else start
    report = {
        "nfe": fitted.nfe,
        "trajectories": trajectories,
        "check_trajectories": check,
        "seed": seed,
        "ridge": choice,
        "started_from": start.name,
        "check_rmse_start": errors["start"],
        "check_rmse_fitted": errors["fitted"],
        "kept": "fitted" if kept is fitted else "start",
        "sigma_min": D.sigma_min,
        "sigma_max": D.sigma_max,
        "shape": list(D.shape),
    }
    return replace(kept, name=f"calibrated-{fitted.nfe}", meta={**kept.meta, "calibration": report})


def check_request(
    nfe: int | None, sigmas: Tensor | Sequence[float] | None, trajectories: int, ridge: float | str
) -> Tensor | None:
    """The given grid, checked, or None; raises what :func:`calibrate` says it raises for its arguments."""
    if (nfe is None) == (sigmas is None):
        raise InputError("calibrate takes either nfe (the grid is chosen) or sigmas (the grid is given)")
    if nfe is not None and (isinstance(nfe, bool) or not isinstance(nfe, int) or not 1 <= nfe <= FINE // 2):
        raise InputError(f"calibrate needs a whole number of evaluations from 1 to {FINE // 2}, got nfe={nfe!r}")
    if trajectories < 8:
        raise InputError(f"calibrate needs at least 8 trajectories, got {trajectories}; 256 is a good number")
    if ridge != "auto" and (isinstance(ridge, str) or not ridge >= 0):
        raise InputError(f"ridge must be 'auto' or a number >= 0, got {ridge!r}")
    return None if sigmas is None else check_grid(torch.as_tensor(sigmas, dtype=torch.float64))


def _fine_levels(D: Denoiser, grid: Tensor | None) -> Tensor:
    """The positive levels the teacher is followed through: dense, and holding the wanted grid if there is one."""
    if grid is None:
        # Above a few hundred standard deviations of the data nothing happens; 1e8 is one step from there.
        top = min(D.sigma_max, 80.0 * max(1.0, 2 * getattr(D, "sigma_data", 0.5)))
        fine = karras(FINE, D.sigma_min, top, to_zero=False)
        return fine if top == D.sigma_max else torch.cat([fine.new_tensor([D.sigma_max]), fine])
    knots = [s for s in grid.tolist() if s > 0]
    if grid[-1] == 0 and knots[-1] > D.sigma_min:
        knots.append(D.sigma_min)
    if len(knots) < 2:
        raise InputError(f"the grid {grid.tolist()} lies below the denoiser's sigma_min {D.sigma_min:g}")
    each = math.ceil(FINE / (len(knots) - 1))
    ramp = torch.linspace(0, 1, each + 1, dtype=torch.float64)
    parts = [torch.exp(math.log(a) + ramp * math.log(b / a)) for a, b in itertools.pairwise(knots)]
    for part, a in zip(parts, knots[:-1], strict=True):
        part[0] = a
    return torch.cat([p[:-1] for p in parts] + [torch.tensor(knots[-1:], dtype=torch.float64)])


def _chunks(D: Denoiser, batch: int, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    parts = [D(x[i : i + batch], sigma, take(cond, slice(i, i + batch))) for i in range(0, len(x), batch)]
    return torch.cat(parts).to(x.dtype)


@dataclass(frozen=True)
class _Teacher:
    """Converged trajectories: ``points`` and ``outputs`` (M, n, *shape) at ``levels`` (M,)."""

    levels: Tensor
    points: Tensor
    outputs: Tensor
    cond: dict[str, Tensor]

    @property
    def end(self) -> Tensor:
        """The denoised last point: where the trajectories end at level 0."""
        return self.outputs[-1]

    @classmethod
    def draw(
        cls,
        D: Denoiser,
        levels: Tensor,
        n: int,
        seed: int,
        cond: Cond | None,
        batch: int,
        device: torch.device,
        say: _Progress,
    ) -> _Teacher:
        """Follows ``n`` trajectories with the third-order DPM-Solver++ through all ``levels``."""
        conds = {}
        if cond:
            rows = torch.arange(n) % len(next(iter(cond.values())))
            conds = {k: v[rows.to(v.device)].to(device) for k, v in cond.items()}
        x = Noise.of(seed, n, device).fold("calibrate").normal(D.shape) * float(levels[0])
        table = build("dpmpp", levels, order=3, exact=True)
        parts = []
        for i in range(0, n, batch):
            own = take(conds, slice(i, i + batch))
            points, outputs = [], []
            for step in trajectory(D, x[i : i + batch], table, own):
                denoised = (
                    D(step.point, levels[-1], own).to(x.dtype).detach() if step.denoised is None else step.denoised
                )
                if not denoised.isfinite().all():
                    raise InputError(f"the denoiser's output is not finite at sigma {float(levels[step.k]):g}")
                points.append(step.point)
                outputs.append(denoised)
                say(f"teacher {step.k}/{len(levels) - 1}")
            parts.append((torch.stack(points), torch.stack(outputs)))
        return cls(levels, torch.cat([p for p, _ in parts], 1), torch.cat([d for _, d in parts], 1), conds)

    def part(self, index: slice) -> _Teacher:
        """Some of the trajectories."""
        return _Teacher(self.levels, self.points[:, index], self.outputs[:, index], take(self.cond, index))

    def error(self, D: Denoiser, tableau: Tableau, batch: int) -> float:
        """Mean over trajectories of the RMSE between the sampler's end and the teacher's."""
        first = int((self.levels - tableau.levels[0]).abs().argmin())
        last = (
            self.end if tableau.levels[-1] == 0 else self.points[int((self.levels - tableau.levels[-1]).abs().argmin())]
        )
        total = 0.0
        for i in range(0, last.shape[0], batch):
            rows = slice(i, i + batch)
            found = sample(D, self.points[first, rows], tableau, take(self.cond, rows))
            total += float(_rmse(found, last[rows]).sum())
        return total / last.shape[0]


def _rmse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).double().square().mean(1).sqrt()


@dataclass
class _State:
    """A fitted prefix: own points, outputs, and the P and W weights of each row."""

    index: list[int]
    points: list[Tensor]
    outputs: list[Tensor]
    P: list[dict[int, float]] = field(default_factory=list)
    W: list[dict[int, float]] = field(default_factory=list)


class _Fitter:
    """Fits rows to a teacher; remembers the last run so that trials that change a late level reuse its early rows."""

    def __init__(self, D: Denoiser, teacher: _Teacher, n: int, batch: int, to_zero: bool) -> None:
        self.D, self.teacher, self.n, self.batch = D, teacher, n, batch
        self.start: tuple[str, dict[str, Any]] = STARTS[0]
        self.cache: tuple[float, _State] | None = None
        # Then the last index stands for level 0, and the target there is the denoised end.
        self.to_zero = to_zero

    def levels(self, index: Sequence[int]) -> Tensor:
        """The grid of these indices, ending at 0 if that was asked for."""
        grid = self.teacher.levels[list(index)].clone()
        if self.to_zero:
            grid[-1] = 0
        return grid

    def choose_start(self, index: Sequence[int]) -> Tableau:
        """Takes the known solver that does best on the held-out trajectories as the table the ridge pulls towards."""
        held = self.teacher.part(slice(self.n, None))
        tables = [build(name, self.levels(index), **options) for name, options in STARTS]
        errors = [held.error(self.D, t, self.batch) for t in tables]
        best = min(range(len(tables)), key=errors.__getitem__)
        if STARTS[best] != self.start:
            self.start, self.cache = STARTS[best], None
        return tables[best]

    def run(self, index: Sequence[int], ridge: float) -> _State:
        """All rows of the grid ``index``, reusing the common prefix of the last run with this ridge."""
        index = list(index)
        base = build(self.start[0], self.levels(index), **self.start[1])
        state = self._prefix(index, ridge)
        for k in range(len(state.P), len(index) - 1):
            if len(state.outputs) == k:
                out = _chunks(self.D, self.batch, state.points[k], self.teacher.levels[index[k]], self.teacher.cond)
                state.outputs.append(out)
            self._fit_row(state, base, k, ridge)
        self.cache = (ridge, state)
        return state

    def _prefix(self, index: list[int], ridge: float) -> _State:
        fresh = _State(index, [self.teacher.points[index[0]]], [])
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
        newest = state.outputs[k]
        # Differences from the newest output and the residual: nearly orthogonal, unlike the raw tensors.
        features = [newest, *(d - newest for d in state.outputs[:k]), state.points[k] - newest]
        c = self._solve([f[: self.n] for f in features], (target - guess)[: self.n], ridge)
        for i, w in enumerate(c[1 : k + 1]):
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
        state = self.run(index, ridge)
        ends = self.teacher.end if self.to_zero else self.teacher.points[index[-1]]
        error = _rmse(state.points[-1], ends)
        return 0.5 * float(error[self.n :].mean() + error[: self.n].mean())

    def table(self, index: Sequence[int], ridge: float) -> Tableau:
        """The fitted rows as a table."""
        state = self.run(index, ridge)
        levels = self.levels(index).tolist()
        made = Builder(levels[0])
        for sigma, level, P, W in zip(levels[:-1], levels[1:], state.P, state.W, strict=True):
            made.row(sigma, level, P, W)
        return made.build("calibrated")


def _descend(
    fit: _Fitter, index: list[int], searches: int, say: Callable[[str], None], ridge: float = 1e-5
) -> list[int]:
    """Moves one inner level at a time along the fine grid while the score falls; the step halves when nothing helps."""
    best, step, tried = fit.score(index, ridge), 4, 0
    while step and tried < searches:
        improved = False
        for k in range(len(index) - 2, 0, -1):
            for move in (-step, step):
                trial = [*index[:k], index[k] + move, *index[k + 1 :]]
                if not trial[k - 1] < trial[k] < trial[k + 1] or tried >= searches:
                    continue
                score, tried = fit.score(trial, ridge), tried + 1
                say(f"levels {tried}/{searches}")
                if score < best:
                    best, index, improved = score, trial, True
        step = step if improved else step // 2
    return index


class _Progress:
    """A spinner line while it works, on a terminal and only when asked for."""

    def __init__(self, shown: bool) -> None:
        self.status = Console(stderr=True).status("calibrate") if shown else None

    def __enter__(self) -> _Progress:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, text: str) -> None:
        """Shows ``text``."""
        if self.status is not None:
            self.status.update(f"calibrate: {text}")
