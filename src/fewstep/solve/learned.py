"""Steps with numbers to be learned: rows whose weights can be differentiated, and their training on a teacher.

:mod:`fewstep.solve.amed` and :mod:`fewstep.solve.epd` are made of these parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond, take
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.sample import Sampler, trajectory
from fewstep.core.solver import build, check_grid
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid import grid as grid_of
from fewstep.grid import refine
from fewstep.solve.teacher import Fitted, Task, Teacher, fine_levels, follow

__all__ = ["Fitted", "Task"]

# The slope of a step from a higher level than this is taken as if the step began here: the line through the point and
# the denoised point leads down to it without an evaluation. Data are taken to be of about unit size.
HIGH = 80.0
# Below this level the slope of pure noise is too far from the denoiser's.
AFS_LOWEST = 10.0
# Times per training that the held-out trajectories are looked at.
CHECKS = 8

Weights = dict[int, Tensor]
# A solver, the factor of :func:`fewstep.grid.refine` and the solver's options.
Refined = tuple[str, int, dict[str, Any]]


class Call(NamedTuple):
    """A row: what the denoiser is told, the level of the point that the row makes, and its weights by row index."""

    sigma: Tensor
    level: Tensor
    points: Weights
    outputs: Weights


@dataclass(frozen=True)
class Training:
    """How numbers are learned.

    Attributes:
        iterations: minibatches.
        rounds: sets of trajectories as large as the task's; those above 1 are followed for the purpose.
        lr: of Adam; the paper's is 5e-3.
        minibatch: trajectories in one.
        teacher: "converged" states of the denoiser, or "refined": those of a solver on a finer grid.
        refined: that solver.

    Raises:
        InputError: a number outside its range or an unknown teacher.
    """

    iterations: int
    rounds: int
    lr: float
    minibatch: int
    teacher: str = "converged"
    refined: Refined = ("heun", 2, {})

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.rounds < 1 or self.minibatch < 1:
            raise InputError(
                "learning needs iterations >= 0, rounds >= 1 and minibatch >= 1, got "
                f"{self.iterations}, {self.rounds} and {self.minibatch}"
            )
        if not 0 < self.lr < math.inf:
            raise InputError(f"learning needs a learning rate lr > 0, got {self.lr!r}: 5e-3 is the paper's")
        if self.teacher not in ("converged", "refined"):
            raise unknown("teacher", self.teacher, ("converged", "refined"))


class Learner:
    """Steps with something to learn.

    Attributes:
        levels: (N+1,) levels of the steps.
        counts: (N,) learned evaluations of each step after its first one; 0 for an Euler step.
        afs: whether the first evaluation is saved.
        tap: the features that are read.
    """

    levels: Tensor
    counts: tuple[int, ...]
    afs: bool
    tap: str | None

    def calls(self, k: int, marks: Sequence[Tensor], feature: Tensor | None) -> list[Call]:
        """The rows of step k after points at the levels ``marks``, of which the last is ``levels[k]``."""
        raise NotImplementedError

    def weights(self) -> list[nn.Parameter]:
        """What is trained."""
        raise NotImplementedError

    def sampler(self) -> Sampler:
        """What the weights now amount to."""
        raise NotImplementedError

    def table(self, name: str, **meta: Any) -> Tableau:
        """The steps as a table, which they are without features."""
        with torch.no_grad():
            made = tabulate(len(self.counts), self.afs, self.levels, lambda k, marks: self.calls(k, marks, None))
        return made.build(name, **meta)


def slope_weights(
    marks: Sequence[Tensor], n: int, low: float | Tensor, to: Tensor, shares: Mapping[int, Tensor | float]
) -> tuple[Weights, Weights]:
    """Weights of ``x_low + (to - low) sum_j share_j eps_j``, where ``x_low = D_n + low eps_n``.

    ``eps_j = (x_j - D_j) / marks[j]``. With ``low = marks[n]`` this is the plain step from point n; a lower one starts
    further down on the line through point n and D_n.
    """
    own = (low + (to - low) * shares[n]) / marks[n]
    points, outputs = {n: own}, {n: 1 - own}
    for j, share in shares.items():
        if j != n:
            points[j] = (to - low) * share / marks[j]
            outputs[j] = -points[j]
    return points, outputs


def lowered(a: float, b: float) -> float:
    """The level at which the step from ``a`` to ``b`` is taken to begin: ``a`` itself unless that is pure noise."""
    return HIGH if a > HIGH > b else a


def plain_step(marks: Sequence[Tensor], b: Tensor) -> Call:
    """An Euler step from the newest point to ``b``."""
    n = len(marks) - 1
    return Call(marks[n], b, *slope_weights(marks, n, marks[n], b, {n: 1.0}))


def parallel_step(
    marks: Sequence[Tensor], b: Tensor, mids: Sequence[tuple[Tensor, Tensor, Tensor]], total: Tensor
) -> list[Call]:
    """Evaluations at Euler points of the step to ``b``, and the step; ``mids`` are (level, what D is told, gain).

    ``x_b = x_a + (b - a) (total eps_a + sum_j gain_j (D_a - D_j) / m_j)``: as ``y_j = D_a + m_j eps_a``, the slope
    ``(y_j - D_j) / m_j`` is ``eps_a + (D_a - D_j) / m_j``, so that a huge ``a`` costs no digits.
    """
    i = len(marks) - 1
    low = lowered(float(marks[i]), float(b))
    told = [marks[i], *(sigma for _, sigma, _ in mids)]
    calls = [Call(told[j], m, *slope_weights(marks, i, marks[i], m, {i: 1.0})) for j, (m, _, _) in enumerate(mids)]
    points, outputs = slope_weights(marks, i, low, b, {i: total})
    late = {i + 1 + j: (low - b) * gain / m for j, (m, _, gain) in enumerate(mids)}
    outputs[i] = outputs[i] - sum(late.values())
    return [*calls, Call(told[-1], b, points, {**outputs, **late})]


def without_first(call: Call, start: float) -> Call:
    """AFS: the row with the output of row 0 replaced by that of the slope ``x / sqrt(1 + start^2)``."""
    if 0 not in call.outputs:
        return call
    root = math.sqrt(1 + start**-2)
    known = start**-2 / (root * (1 + root)) * call.outputs[0]
    rest = {j: w for j, w in call.outputs.items() if j}
    return call._replace(points={**call.points, 0: call.points.get(0, 0.0) + known}, outputs=rest)


def tabulate(steps: int, afs: bool, levels: Tensor, calls: Callable[[int, Sequence[Tensor]], list[Call]]) -> Builder:
    """The table of steps whose weights do not depend on the state."""
    marks, table = [levels[0]], Builder(float(levels[0]))
    for k in range(steps):
        for call in calls(k, list(marks)):
            silent = afs and table.k == 0
            row = without_first(call, float(levels[0])) if afs else call
            weights = ({j: float(w) for j, w in group.items()} for group in (row.points, row.outputs))
            table.row(None if silent else float(call.sigma), float(call.level), *weights)
            marks.append(call.level)
    return table


def check_afs(afs: bool, levels: Tensor) -> None:
    """Raises InputError if a first slope without an evaluation is asked for at too low a level."""
    if afs and levels[0] < AFS_LOWEST:
        raise InputError(f"afs needs a grid that starts at {AFS_LOWEST:g} or above, got {float(levels[0]):g}")


def check_scales(scale_dir: float, scale_time: float) -> None:
    """Raises InputError for a scale outside [0, 1)."""
    for name, scale in (("scale_dir", scale_dir), ("scale_time", scale_time)):
        if not 0 <= scale < 1:
            raise InputError(f"{name} must be in [0, 1), the most that a factor departs from 1, got {scale!r}")


class Run:
    """A batch on its way: points, outputs and levels by row."""

    def __init__(self, D: Denoiser, x: Tensor, level: Tensor, cond: Cond | None, silent: bool) -> None:
        self.D, self.cond, self.silent = D, cond, silent
        self.points, self.outputs, self.marks = {0: x}, dict[int, Tensor](), [level]

    def begin(self, tap: str | None) -> Tensor | None:
        """Evaluates at the newest point; the features of the ``tap``, if it evaluates and they are asked for."""
        n, feature = len(self.marks) - 1, None
        x = self.points[n]
        if self.silent and n == 0:
            return None
        if tap is None:
            out = self.D(x, self.marks[n], self.cond)
        else:
            out, feature = read_tap(self.D, x, self.marks[n], self.cond, tap)
        self.outputs[n] = out.to(x.dtype)
        return feature

    def follow(self, calls: Sequence[Call]) -> Tensor:
        """Runs the rows of a step, whose first output is there; returns the new point."""
        for i, call in enumerate(calls):
            n = len(self.marks) - 1
            if i:
                self.outputs[n] = self.D(self.points[n], call.sigma, self.cond).to(self.points[n].dtype)
            row = without_first(call, float(self.marks[0])) if self.silent else call
            total = torch.zeros_like(self.points[n])
            for source, weights in ((self.points, row.points), (self.outputs, row.outputs)):
                for j, w in weights.items():
                    total = total + widen(w, total) * source[j]
            self.points[n + 1] = total
            self.marks.append(call.level)
        return total

    def trim(self, keep: int = 4) -> None:
        """Cuts the graph behind the newest point and forgets what is older than ``keep`` rows."""
        oldest = len(self.marks) - keep
        self.points = {j: v.detach() for j, v in self.points.items() if j >= oldest}
        self.outputs = {j: v.detach() for j, v in self.outputs.items() if j >= oldest}
        self.marks = [m.detach() for m in self.marks]


def read_tap(D: Denoiser, x: Tensor, sigma: Tensor, cond: Cond | None, tap: str) -> tuple[Tensor, Tensor]:
    """The estimate, and the features (B, width) of a tap: the mean over the channels of a picture, or the vector."""
    features = getattr(D, "features", None)
    if features is None:
        raise InputError(f"this sampler reads the features {tap!r} of the network, which a {type(D).__name__} hides")
    out, found = features(x, sigma, cond, (tap,))
    act = found[tap]
    return out, (act.mean(1) if act.ndim > 2 else act).flatten(1)


def chosen_levels(task: Task, kind: str, steps: int, rho: float | None) -> Tensor:
    """The task's grid, or the named one of ``steps`` steps that ends at the denoiser's ``sigma_min``.

    Raises InputError for an unknown grid or one without ``rho`` when that is given.
    """
    if task.grid is not None:
        return check_grid(task.grid)
    options: dict[str, Any] = {} if rho is None else {"rho": rho}
    top = task.D.sigma_max
    # Of pure noise, the levels are those of a grid from HIGH.
    levels = grid_of(kind, steps, task.D.sigma_min, HIGH if top > 10 * HIGH else top, to_zero=False, **options)
    levels[0] = top
    return levels


def goals(task: Task, teacher: Teacher, levels: Tensor, refined: Refined | None) -> list[Tensor]:
    """(n, *shape) states at every level of the grid: converged ones, or those of a solver on a refined grid."""
    D, start = task.D, teacher.start * float(levels[0] / teacher.levels[0])
    if refined is None and teacher.pixels is None:
        return [start, *(teacher.at(float(s)).reshape(start.shape).to(start.dtype) for s in levels[1:])]
    if refined is None:
        # The teacher kept some of the pixels only, and a student starts from whole pictures.
        table = build("dpmpp", fine_levels(D, levels), order=3, exact=True)
    else:
        table = build(refined[0], refine(levels, refined[1]), **refined[2])
    reached = [0, *(int((table.levels == s).nonzero()[-1]) for s in levels[1:] if s in table.levels)]
    found = [torch.empty_like(start) for _ in levels]
    for i in range(0, len(start), task.batch):
        rows = slice(i, i + task.batch)
        cond = take(teacher.cond, rows)
        for step in trajectory(D, start[rows], table, cond):
            if step.k in reached:
                found[reached.index(step.k)][rows] = step.point
        if len(reached) < len(levels):
            found[-1][rows] = D(step.point, table.levels[-1], cond).to(start.dtype)
    return found


def train(task: Task, student: Learner, *, own: bool, training: Training) -> dict[str, Any]:
    """One optimizer step (Adam) for every sampling step of every minibatch, as in arXiv 2312.00094.

    The loss is the squared distance to the teacher's state, summed over pixels. A step starts from the teacher's state
    or, with ``own``, from the student's. What does best on the held-out trajectories is kept, the untrained numbers
    included. Returns JSON-able facts. Raises InputError for a loss that is not finite (names the step).
    """
    pool, cond = _pool(task, student.levels, training)
    weights = student.weights()
    adam = torch.optim.Adam(weights, lr=training.lr)
    scores = [task.choose.error(task.D, student.sampler(), task.batch)]
    best, kept, losses, done = scores[0], [w.detach().clone() for w in weights], list[float](), 0
    iterations, longest = training.iterations, 0.0
    every = max(1, iterations // CHECKS)
    while done < iterations and task.clock.allows(longest):
        began = time.monotonic()
        pick = Noise.of(task.seed, 1).fold("minibatch", done).uniform((len(pool[0]),), dtype=torch.float64)[0]
        rows = pick.argsort()[: training.minibatch].to(pool[0].device)
        losses.append(_pass(task.D, student, adam, weights, [p[rows] for p in pool], take(cond, rows), own))
        done += 1
        if done % every == 0 or done == iterations:
            scores.append(task.choose.error(task.D, student.sampler(), task.batch))
            if scores[-1] < best:
                best, kept = scores[-1], [w.detach().clone() for w in weights]
            task.say(f"iteration {done}/{iterations}, held-out RMSE {best:.4g}")
        longest = max(longest, time.monotonic() - began)
    with torch.no_grad():
        for w, value in zip(weights, kept, strict=True):
            w.copy_(value)
    facts = {"iterations": done, "rounds": training.rounds, "teacher": training.teacher}
    facts |= {"loss_first": losses[0], "loss_last": losses[-1]} if losses else {}
    return facts | {"held_rmse_untrained": scores[0], "held_rmse": best}


def _pool(task: Task, levels: Tensor, training: Training) -> tuple[list[Tensor], Cond]:
    """The states to learn from and their conditions, of all rounds."""
    fit = task.fit
    refined = training.refined if training.teacher == "refined" else None
    sets = [goals(task, fit, levels, refined)]
    for i in range(1, training.rounds):
        more = follow(
            task.D, fit.levels, task.noise("round", i), fit.cond, batch=task.batch, dtype=fit.start.dtype, say=task.say
        )
        sets.append(goals(task, more, levels, refined))
    cond = {name: torch.cat([value] * training.rounds) for name, value in fit.cond.items()}
    return [torch.cat(states) for states in zip(*sets, strict=True)], cond


def _pass(
    D: Denoiser,
    student: Learner,
    adam: torch.optim.Optimizer,
    weights: list[nn.Parameter],
    states: list[Tensor],
    cond: Cond,
    own: bool,
) -> float:
    """One minibatch through all steps; returns the sum of the steps' losses."""
    run, total = Run(D, states[0], student.levels[0], cond, student.afs), 0.0
    for k, count in enumerate(student.counts):
        if k and not own:
            run = Run(D, states[k], student.levels[k], cond, False)
        with torch.no_grad():
            feature = run.begin(student.tap)
        with torch.set_grad_enabled(count > 0):
            point = run.follow(student.calls(k, list(run.marks), feature))
            loss = (point - states[k + 1]).flatten(1).square().sum(1).mean()
        run.trim()
        total += float(loss.detach())
        if not math.isfinite(total):
            raise InputError(
                f"the loss is not finite in step {k}, from sigma {float(student.levels[k]):g} to "
                f"{float(student.levels[k + 1]):g}: take a smaller lr, or check the denoiser's output there"
            )
        if count:
            # Not backward(), which would leave gradients on the denoiser's own parameters.
            for w, g in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                w.grad = g
            adam.step()
    return total


def find_tap(task: Task, tap: str | None) -> tuple[str, int] | None:
    """The tap and how many features it gives; None when there are none to be had.

    Raises InputError for a tap that is named and not declared.
    """
    taps = getattr(task.D, "taps", {})
    if tap == "auto":
        tap = "bottleneck" if "bottleneck" in taps else None
    if tap is None:
        return None
    if not taps:
        raise InputError(f"this denoiser declares no features, so tap {tap!r} cannot be read: leave tap at 'auto'")
    if tap not in taps:
        raise unknown("feature tap", tap, taps)
    x, cond = task.teacher.start[:1], {k: v[:1] for k, v in task.teacher.cond.items()}
    with torch.no_grad():
        return tap, read_tap(task.D, x, task.teacher.levels[0], cond, tap)[1].shape[1]
