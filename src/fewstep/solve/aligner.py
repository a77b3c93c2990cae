"""The timestep aligner: the network is told another time than the solver's own (TimeTuner, arXiv 2310.09469).

One scalar per evaluation. The solver's levels stay as they are; the frozen network reads the same input under the
time ``ratio * t``, and its prediction is used as if it had been made at ``t``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core.cond import take
from fewstep.core.denoiser import Denoiser, Wrapper
from fewstep.core.path import VP, Path, Predicts, path_config, x0_weights
from fewstep.core.solver import build
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.grid.time import vp_time
from fewstep.solve.teacher import Fitted, Task, chunks

TARGETS = ("trajectory", "straight")


class Retimed(NamedTuple):
    """``D~ = keep x + gain D(scale x, level)``: a prediction made at ``level`` and used at another."""

    level: Tensor
    scale: Tensor
    keep: Tensor
    gain: Tensor


def retimed(sigma: float, level: Tensor, path: Path, predicts: Predicts) -> Retimed:
    """How the network's prediction for its input at ``sigma``, made under the time of ``level``, becomes x0.

    With ``x_u = a x`` the network's input and ``x0 = c x_u + k out`` (:func:`fewstep.core.path.x0_weights`), the same
    ``out`` is read off the denoiser at ``level`` and entered at ``sigma``. For ``predicts="noise"`` this gives
    ``x - sigma eps~`` with ``eps~ = (x' - D(x', level)) / level`` and ``x' = x a(sigma) / a(level)``.
    Differentiable in ``level``, float64.
    """
    here, there = path.at(sigma), path.at(level)
    a0, a1 = path.coeffs(here).a, path.coeffs(there).a
    (c0, k0), (c1, k1) = x0_weights(path, predicts, here), x0_weights(path, predicts, there)
    gain = k0 / k1
    return Retimed(level, a0 / a1, a0 * (c0 - gain * c1), gain)


def retime(base: Tableau, told: Sequence[float], *, path: Path = VP, predicts: Predicts = "noise") -> Tableau:
    """The table ``base`` with the network told the level ``told[k]`` on row k (its own level: nothing changes).

    A row that is told another level is preceded by a silent one, which scales the point so that the network's input
    stays the same. Evaluations and the levels of the solver's points are those of ``base``.

    Raises:
        InputError: another number of levels than rows, a level that is not positive and finite, or a ``base`` with
            silent rows or noise.
    """
    _check_base(base)
    if len(told) != base.rows or not all(0 < s < math.inf for s in told):
        raise InputError(f"retime needs {base.rows} positive levels, one per row, got {list(told)}")
    table = Builder(base.start)
    # Where the points of base are in the new table, which rows make their outputs, and what an output stands for.
    place, maker, shares = [0], list[int](), list[tuple[float, float]]()
    for k, row in enumerate(base.plan):
        sigma, level = float(base.sigmas[k]), float(told[k])
        keep, gain = 0.0, 1.0
        if level != sigma:
            made = retimed(sigma, torch.tensor(level, dtype=torch.float64), path, predicts)
            keep, gain = float(made.keep), float(made.gain)
            table.row(None, level, {place[k]: float(made.scale)}, {})
        maker.append(table.k)
        shares.append((keep, gain))
        points = {place[i]: w for i, w in row.points}
        outputs: dict[int, float] = {}
        for i, w in row.outputs:
            points[place[i]] = points.get(place[i], 0.0) + w * shares[i][0]
            outputs[maker[i]] = w * shares[i][1]
        place.append(table.row(level, float(base.levels[k + 1]), points, outputs))
    meta = {"told": [float(s) for s in told], "path": path_config(path), "predicts": predicts, "base": dict(base.meta)}
    return table.build(f"aligned-{base.name}", aligner=meta)


@torch.no_grad()
def aligner(
    task: Task,
    *,
    base: str = "euler",
    iterations: int = 100,
    lr: float = 1e-2,
    sequential: bool = True,
    target: Literal["trajectory", "straight"] = "trajectory",
    pictures: int = 32,
    predicts: Predicts | None = None,
) -> Fitted:
    """Tunes the time that the network is told at each evaluation of a fixed solver, one scalar after the other.

    The scalar multiplies the native time of the denoiser's path, the linear-beta VP time where none is known, and
    starts at 1; the told level stays within the denoiser's range. Adam with ``lr`` takes ``iterations`` steps on
    batches of ``pictures`` trajectories; the rate falls to 0 along a cosine. (The paper takes 500 steps of 2e-3, which
    go equally far.) ``sequential`` runs each step from the points of those already tuned, otherwise from the teacher's
    own. ``target="trajectory"`` matches the teacher's point at the next level, ``"straight"`` is the loss of the
    published code: the noise that the network sees at the next point is to equal the noise it sees at this one; it
    leaves the last evaluation alone. ``predicts`` is what is re-timed: by default the network's own prediction, which
    is the noise for the networks of the paper, and v for a denoiser without a path. Re-timed noise is multiplied by
    the level when it becomes x0, so that nothing can be gained from it at high noise.

    Raises:
        InputError: an unknown solver or target, a solver with noise or silent rows or with more evaluations than
            allowed, counts below 1, lr <= 0, ``sequential=False`` with a teacher that keeps only some pixels, or a
            denoiser that cannot be differentiated by its level.
    """
    if target not in TARGETS:
        raise unknown("target of aligner", str(target), TARGETS)
    if min(iterations, pictures) < 1 or not 0 < lr < math.inf:
        raise InputError(f"aligner needs iterations, pictures >= 1 and lr > 0, got {iterations}, {pictures}, {lr}")
    if not sequential and task.teacher.pixels is not None:
        raise InputError("sequential=False needs whole pictures of the teacher, which keeps some pixels: leave it True")
    start = _start(task, base)
    path, own = _frame(task.D)
    tune = _Tuner(task, start, path, predicts or own, target, sequential)
    ratios: list[float] = []
    for k in range(start.rows):
        ratio = 1.0
        if task.clock.allows() and not (target == "straight" and k == start.rows - 1):
            task.say(f"evaluation {k + 1}/{start.rows}")
            ratio = tune.fit(k, iterations, lr, pictures)
        ratios.append(ratio)
        tune.advance(k, ratio)
    told = [float(start.sigmas[k]) if r == 1 else float(tune.level(k, r)) for k, r in enumerate(ratios)]
    made = retime(start, told, path=path, predicts=tune.predicts)
    facts = {"base": base, "target": target, "sequential": sequential, "predicts": tune.predicts}
    return Fitted(made, start, {**facts, "path": path_config(path), "ratios": ratios, "told": told})


def _check_base(base: Tableau) -> None:
    if base.noisy or base.nfe != base.rows:
        raise InputError(f"the aligner needs a deterministic solver with an evaluation on each row, not {base.name!r}")


def _start(task: Task, base: str) -> Tableau:
    """The base on the given grid, or on the better of Karras' and the VP time grid."""
    if task.grid is not None:
        tables = [build(base, task.grid)]
    else:
        ends = task.D.sigma_min, float(task.teacher.levels[0])
        for steps in range(task.nfe, 0, -1):
            tables = [build(base, kind(steps, *ends)) for kind in (karras, vp_time)]
            if tables[0].nfe <= task.nfe:
                break
    if tables[0].nfe > task.nfe:
        raise InputError(f"{base!r} takes {tables[0].nfe} evaluations there, but nfe is {task.nfe}: allow more")
    _check_base(tables[0])
    return min(tables, key=lambda t: task.choose.error(task.D, t, task.batch))


def _frame(D: Denoiser) -> tuple[Path, Predicts]:
    """The path whose time is scaled, and what the network predicts there."""
    inner: Any = D.inner if isinstance(D, Wrapper) else D
    path = getattr(inner, "path", None)
    return (path, inner.predicts) if isinstance(path, Path) else (VP, "v")


class _Tuner:
    """The tuned prefix of a table: its points on all trajectories for fitting, and what the outputs stood for."""

    def __init__(
        self, task: Task, base: Tableau, path: Path, predicts: Predicts, target: str, sequential: bool
    ) -> None:
        self.task, self.base, self.path, self.predicts = task, base, path, predicts
        self.target, self.sequential = target, sequential
        self.teacher = task.fit
        self.points = [self.teacher.start * (base.start / float(self.teacher.levels[0]))]
        self.outputs: list[Tensor] = []

    def level(self, k: int, ratio: Tensor | float) -> Tensor:
        """The level that row k is told at a ratio."""
        return self.path.sigma(self.path.at(float(self.base.sigmas[k])) * ratio)

    def bounds(self, k: int) -> list[float]:
        """The ratios of row k that keep the told level in the denoiser's range; 1 is always allowed."""
        time = float(self.path.at(float(self.base.sigmas[k])))
        low, high = (float(self.path.at(s)) / time for s in (self.task.D.sigma_min, self.task.D.sigma_max))
        return [min(low, 1.0), max(high, 1.0)]

    def denoise(self, k: int, ratio: Tensor | float, rows: slice | Tensor) -> Tensor:
        """What row k takes for x0 at some of the trajectories."""
        sigma, x, cond = float(self.base.sigmas[k]), self.points[k][rows], take(self.teacher.cond, rows)
        if not isinstance(ratio, Tensor) and ratio == 1:
            return chunks(self.task.D, self.task.batch, x, self.base.sigmas[k], cond)
        how = Retimed(*(t.to(x.device) for t in retimed(sigma, self.level(k, ratio), self.path, self.predicts)))
        scaled = x * how.scale.to(x.dtype)
        out = chunks(self.task.D, self.task.batch, scaled, how.level, cond)
        return x * how.keep.to(x.dtype) + out * how.gain.to(x.dtype)

    def next(self, k: int, newest: Tensor, rows: slice | Tensor) -> Tensor:
        """The point that row k makes."""
        row = self.base.plan[k]
        made = torch.zeros_like(newest)
        for i, w in row.points:
            made = made + w * self.points[i][rows]
        for i, w in row.outputs:
            made = made + w * (newest if i == k else self.outputs[i][rows])
        return made

    def advance(self, k: int, ratio: float) -> None:
        """Adds row k with its ratio."""
        everything = slice(None)
        self.outputs.append(self.denoise(k, ratio, everything))
        level = float(self.base.levels[k + 1])
        if self.sequential or level == 0:
            self.points.append(self.next(k, self.outputs[k], everything))
        else:
            self.points.append(self.teacher.at(level).reshape(self.points[0].shape))

    def loss(self, k: int, ratio: Tensor, rows: Tensor) -> Tensor:
        """The mean square that row k's ratio is to make small."""
        made = self.next(k, self.denoise(k, ratio, rows), rows)
        level = float(self.base.levels[k + 1])
        if self.target == "trajectory":
            return (self.teacher.view(made) - self.teacher.at(level)[rows]).square().mean()
        cond, sigma, after = take(self.teacher.cond, rows), self.base.sigmas[k], self.base.sigmas[k + 1]
        with torch.no_grad():
            before = (self.points[k][rows] - self.denoise(k, 1.0, rows)) / sigma
        seen = (made - chunks(self.task.D, self.task.batch, made, after, cond)) / after
        return (seen - before).square().mean()

    def fit(self, k: int, iterations: int, lr: float, pictures: int) -> float:
        """The ratio of row k after training."""
        ratio = torch.ones((), dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([ratio], lr=lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
        draw = replace(self.task.noise("aligner", k), seeds=self.task.noise("aligner", k).seeds[:1])
        for step in range(iterations):
            if step and not self.task.clock.allows():
                break
            count = min(pictures, len(self.teacher))
            rows = draw.uniform((len(self.teacher),), step, dtype=torch.float64)[0].argsort()[:count]
            with torch.enable_grad():
                loss = self.loss(k, ratio, rows)
                if not loss.requires_grad:
                    raise InputError("the aligner needs a denoiser that can be differentiated by its level sigma")
                (slope,) = torch.autograd.grad(loss, ratio)
            if not slope.isfinite():
                raise InputError(f"the aligner's gradient is not finite at sigma {float(self.base.sigmas[k]):g}")
            ratio.grad = slope
            adam.step()
            decay.step()
            ratio.data.clamp_(*self.bounds(k))
        return float(ratio.detach())
