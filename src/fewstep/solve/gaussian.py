"""A Gaussian start: the outline of a picture comes first, and comes for free (arXiv 2303.02490, 2412.09726).

At high noise a trained denoiser acts as that of one Gaussian with the data's mean and covariance. Its probability flow
is known in closed form, so the sampler jumps to a lower level without a call and spends its evaluations below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.sample import OnStep, Step, sample
from fewstep.core.solver import build
from fewstep.core.stored import stored
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.grid.logsnr import logsnr
from fewstep.solve.teacher import Fitted, Task, Teacher, rmse

GRIDS = {"karras": karras, "logsnr": logsnr}
REMAINDERS = ("isotropic", "zero")
PARTS = ("mean", "basis", "variances", "remainder")


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Means and covariances ``sum_i variances_i u_i u_i^T + remainder (1 - U U^T)`` of one or several groups.

    Attributes:
        mean: (G, numel).
        basis: (G, k, numel) orthonormal rows.
        variances: (G, k), >= 0, along the rows of ``basis``.
        remainder: (G,) variance in all other directions.

    With G > 1, group ``i < G - 1`` is class ``i`` and the last one is all data, for samples of no class. float64.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor
    remainder: Tensor

    def __post_init__(self) -> None:
        groups, rank, numel = self.basis.shape
        shapes = (groups, numel), (groups, rank, numel), (groups, rank), (groups,)
        for name, shape in zip(PARTS, shapes, strict=True):
            part = getattr(self, name)
            if part.shape != shape or not part.isfinite().all():
                raise InputError(f"a Gaussian's {name} must be finite and {shape}, got {tuple(part.shape)}")
        if (self.variances < 0).any() or (self.remainder < 0).any():
            raise InputError("a Gaussian's variances and remainder must be >= 0")

    @classmethod
    def of(
        cls,
        pictures: Tensor,
        rank: int | None = None,
        *,
        remainder: str = "isotropic",
        labels: Tensor | None = None,
    ) -> Gaussian:
        """The Gaussian of ``pictures`` (n, *shape): the ``rank`` largest principal components and what is left.

        ``rank`` is by default half of the pictures, at most all directions. The variance that is left is spread
        evenly over the other directions ("isotropic"), or dropped ("zero"). ``labels`` (n,) gives each class its own;
        a class with fewer than 4 pictures takes that of all data.

        Raises:
            InputError: fewer than 4 pictures, non-finite ones, a rank that they do not determine, or an unknown
                ``remainder``.
        """
        flat = pictures.flatten(1).double()
        if len(flat) < 4 or not flat.isfinite().all():
            raise InputError(f"a Gaussian needs at least 4 finite pictures, got {len(flat)}")
        if remainder not in REMAINDERS:
            raise unknown("remainder", str(remainder), REMAINDERS)
        most = min(len(flat) - 1, flat.shape[1])
        use = min(flat.shape[1], len(flat) // 2) if rank is None else rank
        if not 0 <= use <= most:
            raise InputError(f"{len(flat)} pictures of {flat.shape[1]} numbers have rank 0 to {most}, got {rank!r}")
        whole = _principal(flat, use, remainder)
        if labels is None:
            return cls(*(part[None] for part in whole))
        groups = []
        for label in range(int(labels.max()) + 1):
            own = flat[labels == label]
            kept = min(use, len(own) - 1 if rank is not None else len(own) // 2)
            groups.append(_principal(own, kept, remainder, use) if len(own) >= 4 else whole)
        return cls(*(torch.stack(parts) for parts in zip(*groups, whole, strict=True)))

    def flow(self, x: Tensor, start: float, end: float, label: Tensor | None = None) -> Tensor:
        """``x`` (B, *shape) at level ``start`` carried to level ``end`` by the exact probability flow.

        ``label`` (B,) picks each sample's group, -1 that of all data; without it all samples take the last group.
        """
        flat, scale = x.flatten(1), float(start) ** 2
        index = torch.full((len(x),), -1) if label is None else label.to("cpu", torch.int64)
        made = torch.empty_like(flat)
        for group in index.unique().tolist():
            if not -1 <= group < max(1, len(self.mean) - 1):
                raise InputError(f"label {group} has no Gaussian: there are {len(self.mean) - 1} classes, and -1")
            rows = (index == group).to(x.device)
            own = group if len(self.mean) > 1 else 0
            gains = ((self.variances[own] + end**2) / (self.variances[own] + scale)).sqrt()
            rest = float(((self.remainder[own] + end**2) / (self.remainder[own] + scale)).sqrt())
            mean, basis, change = (p.to(flat) for p in (self.mean[own], self.basis[own], gains - rest))
            away = flat[rows] - mean
            made[rows] = mean + rest * away + (away @ basis.T * change) @ basis
        return made.reshape(x.shape)


def _principal(flat: Tensor, rank: int, remainder: str, width: int | None = None) -> tuple[Tensor, ...]:
    """Mean, basis, variances and remainder of one group; the basis is padded with zero rows up to ``width``."""
    mean = flat.mean(0)
    away = flat - mean
    _, singular, rows = torch.linalg.svd(away, full_matrices=flat.shape[1] <= len(flat))
    spectrum = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
    spectrum[: len(singular)] = singular**2 / (len(flat) - 1)
    free = flat.shape[1] - rank
    left = float(spectrum[rank:].sum()) / free if remainder == "isotropic" and free else 0.0
    basis, variances = rows[:rank], spectrum[:rank]
    if width is not None and width > rank:
        basis = torch.cat([basis, basis.new_zeros(width - rank, flat.shape[1])])
        variances = torch.cat([variances, variances.new_full((width - rank,), left)])
    return mean.cpu(), basis.cpu(), variances.cpu(), torch.tensor(left, dtype=torch.float64)


@stored("gaussian")
@dataclass(frozen=True, eq=False)
class GaussianStart:
    """A sampler: the closed-form jump of a Gaussian to the first level of a table, then the table.

    Attributes:
        gaussian: what the jump takes the data for.
        start: the noise level of the start.
        rest: the table that goes on below; its own start is where the jump ends.
        name: what people call it.
        meta: JSON-able facts.

    Raises:
        InputError: ``start`` does not lie above the table's.
    """

    gaussian: Gaussian
    start: float
    rest: Tableau
    name: str = "gaussian"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rest.start < self.start < math.inf:
            raise InputError(f"a jump goes down: its start {self.start:g} must lie above {self.rest.start:g}")

    @property
    def end(self) -> float:
        """The noise level of the result."""
        return self.rest.end

    @property
    def nfe(self) -> int:
        """Denoiser evaluations; the jump takes none."""
        return self.rest.nfe

    def __call__(
        self,
        D: Denoiser,
        x: Tensor,
        cond: Cond | None = None,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """See :class:`fewstep.core.sample.Sampler`; step 0 is the jump, the table's steps count from 1."""
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if on_step is not None:
            on_step(Step(0, self.start, x, None))
        label = (cond or {}).get("label") if len(self.gaussian.mean) > 1 else None
        below = self.gaussian.flow(x, self.start, self.rest.start, label)
        later = None if on_step is None else lambda step: on_step(step._replace(k=step.k + 1))
        return sample(D, below, self.rest, cond, noise=noise, on_step=later)

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields and tensors, see :mod:`fewstep.core.stored`."""
        fields = {"name": self.name, "meta": dict(self.meta), "start": self.start}
        table = json.loads(self.rest.to_json())
        return {**fields, "rest": table}, {name: getattr(self.gaussian, name).contiguous() for name in PARTS}

    @classmethod
    def from_parts(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GaussianStart:
        """The inverse of :meth:`parts`."""
        rest = Tableau.from_json(json.dumps(fields["rest"]))
        gaussian = Gaussian(*(tensors[name].double() for name in PARTS))
        return cls(gaussian, float(fields["start"]), rest, str(fields["name"]), dict(fields["meta"]))


@torch.no_grad()
def gaussian(
    task: Task,
    *,
    solver: str = "ipndm3",
    jump: float | Literal["auto"] = "auto",
    rank: int | None = None,
    remainder: Literal["isotropic", "zero"] = "isotropic",
    data: Tensor | None = None,
    per_class: bool = False,
) -> Fitted:
    """Jumps by the data's Gaussian to a level ``jump`` and runs ``solver`` from there with all evaluations.

    Mean and covariance come from ``data`` (n, *shape), else from the teacher's own end points; for ``rank`` and
    ``remainder`` see :meth:`Gaussian.of`. One Gaussian serves all classes unless ``per_class``, which needs the
    teacher's labels and its own end points. "auto" tries 12 levels and then refines the best, with Karras' grid and
    the geometric one below, on ``task.choose``. It starts from the same solver on the better of these grids from the
    highest level. On a given grid the jump ends at one of the grid's own levels, "auto" at the best one, and the
    evaluations above it are saved.

    Raises:
        InputError: an unknown solver, a jump outside the denoiser's range (or off a given grid), more evaluations than
            allowed, pictures of another shape, or ``per_class`` with ``data`` or without labels.
    """
    D, top = task.D, float(task.teacher.levels[0])
    if jump != "auto" and not D.sigma_min < float(jump) < top:
        raise InputError(f"a jump ends inside the denoiser's range, {D.sigma_min:g} to {top:g}, got {jump!r}")
    if per_class and (data is not None or "label" not in task.fit.cond):
        raise InputError("per_class needs a teacher with labels and no data: leave one of them out")
    if data is not None and tuple(data.shape[1:]) != tuple(D.shape):
        raise InputError(f"data must be (n, {', '.join(map(str, D.shape))}), got {tuple(data.shape)}")
    search = _Search(task, solver, top)
    start = search.start()
    pictures = end_points(task) if data is None else data
    labels = task.fit.cond["label"] if per_class else None
    own = Gaussian.of(pictures, rank, remainder=remainder, labels=labels)
    best, error = search.best(own, jump)
    facts = {
        "jump": best.rest.start,
        "grid": "given" if task.grid is not None else search.grids[best.rest.start],
        "rank": own.variances.shape[1],
        "pictures": len(pictures),
        "groups": len(own.mean),
        "choose_rmse": error,
        "nfe": best.nfe,
        "tried": len(search.tried),
    }
    return Fitted(best, start, facts)


class _Search:
    """Tries levels for the end of the jump and grids below it."""

    def __init__(self, task: Task, solver: str, top: float) -> None:
        self.task, self.solver, self.top = task, solver, top
        self.tried: dict[float, tuple[float, GaussianStart]] = {}
        self.grids: dict[float, str] = {}

    def tables(self, level: float) -> dict[str, Tableau]:
        """The solver from ``level`` down: on what is left of a given grid, else on each kind of grid."""
        task = self.task
        if task.grid is not None:
            return {"given": self.check(build(self.solver, task.grid[task.grid <= level]))}
        for steps in range(task.nfe, 0, -1):
            found = {n: build(self.solver, g(steps, task.D.sigma_min, level)) for n, g in GRIDS.items()}
            if found["karras"].nfe <= task.nfe:
                return found
        raise InputError(f"one step of {self.solver!r} takes more than nfe={task.nfe} evaluations: allow more")

    def check(self, table: Tableau) -> Tableau:
        """The table. Raises InputError if it takes too many evaluations."""
        if table.nfe > self.task.nfe:
            raise InputError(f"{self.solver!r} takes {table.nfe} evaluations on the grid, but nfe is {self.task.nfe}")
        return table

    def start(self) -> Tableau:
        """The solver from the highest level."""
        return min(
            self.tables(self.top).values(), key=lambda t: self.task.choose.error(self.task.D, t, self.task.batch)
        )

    def attempt(self, gaussian: Gaussian, level: float) -> float:
        """The error of jumping to ``level``, with the better grid below."""
        if level not in self.tried:
            for kind, table in self.tables(level).items():
                made = GaussianStart(gaussian, self.top, table, f"gaussian-{table.name}")
                error = self.task.choose.error(self.task.D, made, self.task.batch)
                if level not in self.tried or error < self.tried[level][0]:
                    self.tried[level], self.grids[level] = (error, made), kind
            self.task.say(f"jump to {level:.3g}")
        return self.tried[level][0]

    def best(self, gaussian: Gaussian, jump: float | str) -> tuple[GaussianStart, float]:
        """The best jump and its error."""
        D, given = self.task.D, self.task.grid
        inside = [] if given is None else [s for s in given.tolist() if 0 < s < self.top]
        if given is not None and (not inside or (jump != "auto" and jump not in inside)):
            raise InputError(f"on a given grid the jump ends at one of its levels {inside}, got {jump!r}")
        if jump != "auto":
            self.attempt(gaussian, float(jump))
        else:
            high, low = min(0.9 * self.top, 40 * D.sigma_data), max(0.25 * D.sigma_data, 2 * D.sigma_min)
            ratio = (low / high) ** (1 / 11)
            for level in inside or [high * ratio**i for i in range(12)]:
                self.attempt(gaussian, level)
                if not self.task.clock.allows():
                    break
            while not inside and ratio < 0.93 and self.task.clock.allows():
                ratio **= 0.5
                middle = min(self.tried, key=lambda s: self.tried[s][0])
                for level in (middle * ratio, middle / ratio):
                    if D.sigma_min < level < self.top:
                        self.attempt(gaussian, level)
        error, made = min(self.tried.values(), key=lambda pair: pair[0])
        return made, error


def end_points(task: Task, steps: int = 24) -> Tensor:
    """(n, *shape) where the trajectories for fitting end: the teacher's, or made again if it keeps some pixels only."""
    teacher, D = task.fit, task.D
    if teacher.pixels is None:
        return teacher.end.reshape(teacher.start.shape)
    table = build("dpmpp", karras(steps, D.sigma_min, float(teacher.levels[0])), order=3, exact=True)
    parts = []
    for i in range(0, len(teacher), task.batch):
        part = teacher.part(slice(i, i + task.batch))
        parts.append(sample(D, part.start, table, part.cond))
    return torch.cat(parts)


def gaussian_error(
    teacher: Teacher, gaussian: Gaussian | None = None, *, levels: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """How long a Gaussian predicts the trajectories: mean RMSE to the teacher's points, by level.

    The Gaussian, by default that of the teacher's own end points, carries the starts to each of ``levels`` (by default
    the teacher's). Returns (levels, errors), both (M,) float64. Raises InputError if the teacher keeps only some
    pixels and no Gaussian of whole pictures is given.
    """
    if gaussian is None:
        if teacher.pixels is not None:
            raise InputError("the teacher keeps some pixels only: pass the Gaussian of whole pictures")
        gaussian = Gaussian.of(teacher.end.reshape(teacher.start.shape))
    top = float(teacher.levels[0])
    wanted = teacher.levels.tolist() if levels is None else [float(s) for s in levels]
    label = teacher.cond.get("label") if len(gaussian.mean) > 1 else None
    errors = [
        float(rmse(teacher.view(gaussian.flow(teacher.start, top, level, label)), teacher.at(level)).mean())
        for level in wanted
    ]
    return torch.tensor(wanted, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
