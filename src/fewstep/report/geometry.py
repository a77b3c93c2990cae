"""What is measured about a generator's trajectories and about one sampler on them: shape, errors, stability, order.

Lengths are root mean squares per element, so that they do not grow with the picture: in units of the data, which go
from -1 to 1 for pixels. Noise levels are sigma of ``x = x0 + sigma n``. Angles are radians.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.path import FLOW, VP
from fewstep.core.sample import Sampler, Step
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.solve.teacher import FINE, Teacher, fine_levels, follow, rmse

LEAST = 8
MEMORY = 4 << 30
# No published one-step method has more stages in a step.
STAGES = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Curves:
    """Trajectories from noise to picture as curves in the space of pictures, float64 on the CPU.

    Attributes:
        levels: (M+1,) noise levels, decreasing, the last is 0.
        points: (M+1, n, q) points there; the last are the finished samples.
        outputs: (M, n, q) the denoiser's outputs at all but the last, so that ``x - D`` is the direction there.
    """

    levels: Tensor
    points: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, teacher: Teacher, top: float = math.inf) -> Curves:
        """The teacher's trajectories from the first level that is at most ``top``, and their ends at level 0.

        Raises:
            InputError: fewer than two of the teacher's levels are at most ``top``.
        """
        first = int((teacher.levels > top).sum())
        levels = teacher.levels[first:].double().cpu()
        if len(levels) < 2:
            raise InputError(f"a curve needs two levels, and {len(levels)} of the teacher's are at most top={top:g}")
        points, outputs = (t[first:].double().cpu() for t in (teacher.points, teacher.outputs))
        return cls(torch.cat([levels, levels.new_zeros(1)]), torch.cat([points, outputs[-1:]]), outputs)

    @property
    def between(self) -> Tensor:
        """(M-1,) geometric means of neighbouring positive levels: where turns are counted."""
        return (self.levels[:-2] * self.levels[1:-1]).sqrt()


def _length(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def _unit(x: Tensor) -> Tensor:
    """Of Euclidean length 1; zero stays zero, so that what does not move has no direction and no turn."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def distance(curves: Curves) -> Tensor:
    """(M+1, n) distance of each point to the finished sample of its trajectory (arXiv 2405.11326)."""
    return _length(curves.points - curves.points[-1])


def deviation(curves: Curves) -> Tensor:
    """(M+1, n) distance of each point to the straight line through its trajectory's first point and end (2405.11326).

    0 at both ends, and everywhere for a straight trajectory: one of a point mass, or of an isotropic Gaussian.
    """
    along = _unit(curves.points[0] - curves.points[-1])
    moved = curves.points - curves.points[-1]
    return _length(moved - (moved * along).sum(-1, keepdim=True) * along)


def turning(curves: Curves) -> Tensor:
    """(M-1, n) angle in [0, pi] between the directions ``x - D`` at neighbouring positive levels."""
    u = _unit(curves.points[:-1] - curves.outputs)
    apart, together = (u[1:] - u[:-1]).norm(dim=-1), (u[1:] + u[:-1]).norm(dim=-1)
    # The arc cosine of the inner product would lose all digits of small angles.
    return 2 * torch.atan2(apart, together)


def curvature(curves: Curves) -> Tensor:
    """(M-1, n) turn of the unit direction per length of the chord, between neighbouring positive levels.

    One over the radius of the bend, in one over units of the data; exact on circles, and of second order elsewhere.
    0 where two neighbouring points coincide.
    """
    u = _unit(curves.points[:-1] - curves.outputs)
    chord = _length(curves.points[1:-1] - curves.points[:-2])
    turn = (u[1:] - u[:-1]).norm(dim=-1)
    return torch.where(chord > 0, turn / chord.clamp_min(torch.finfo(chord.dtype).tiny), 0.0)


@dataclass(frozen=True)
class Projection:
    """Trajectories in three coordinates of their own.

    Attributes:
        coordinates: (M+1, n, 3) along the displacement from end to start, and along the two principal components of
            what is left; all are 0 at the end. The signs of the latter two make their largest value positive.
        shares: (n, 3) share of a trajectory's variance over its levels that 1, 2 and 3 of them hold, in [0, 1].
    """

    coordinates: Tensor
    shares: Tensor


def project(curves: Curves) -> Projection:
    """Displacement and two principal components of the rest, for each trajectory by itself (arXiv 2405.11326).

    The variance is that over the curve's levels, each with the same weight. A trajectory that does not move at all has
    all of its (absent) variance in the first coordinate.
    """
    moved = (curves.points - curves.points[-1]).transpose(0, 1)
    numel = moved.shape[-1]
    coordinates = moved.new_zeros(*moved.shape[:2], 3)
    shares = moved.new_ones(len(moved), 3)
    for i, curve in enumerate(moved):
        along = _unit(curve[0])
        first = curve @ along
        rest = curve - first[:, None] * along
        centred = rest - rest.mean(0)
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        others = rest @ axes.T
        peaks = others.abs().argmax(0)
        others = others * others[peaks, torch.arange(len(axes))].sign()
        found = torch.cat([first[:, None], others], 1)
        total = (curve - curve.mean(0)).square().sum()
        if total > 0:
            held = (found - found.mean(0)).square().sum(0).cumsum(0) / total
            shares[i, : len(held)] = held.clamp(max=1.0)
        coordinates[:, :, : found.shape[1]][i] = found / math.sqrt(numel)
    return Projection(coordinates.transpose(0, 1), shares)


def inner_points(table: Tableau) -> tuple[bool, ...]:
    """(K+1) flags: which points are stages inside a step, that only this step uses.

    A table can be cut before a row when that row and all later ones use nothing older. Between two cuts lies a step of
    several stages if it has at most three rows and either stays on a level (as Heun's does) or is not the only such
    one; otherwise its rows are the first of a multi-step method, whose every point is a point of the trajectory.
    """
    oldest = [
        min((i for terms in (row.points, row.outputs, row.noises) for i, _ in terms), default=k)
        for k, row in enumerate(table.plan)
    ]
    cuts = [c for c in range(table.rows) if min(oldest[c:]) >= c] + [table.rows]
    spans = [(a, b) for a, b in itertools.pairwise(cuts) if 1 < b - a <= STAGES]
    inner = [False] * (table.rows + 1)
    for a, b in spans:
        if len(spans) > 1 or bool((table.levels[a : b + 1].diff() >= 0).any()):
            inner[a + 1 : b] = [True] * (b - a - 1)
    return tuple(inner)


@torch.no_grad()
def local_errors(D: Denoiser, table: Tableau, teacher: Teacher) -> Tensor:
    """(K, n) distance between what each row makes and the teacher, when all the row is given is the teacher's own.

    Row k starts from the teacher's points at the levels of the table's points, and from the denoiser's outputs at
    these; only the stages inside a step (see :func:`inner_points`) are those that the table makes from there. The
    teacher must hold all pixels, and should hold the table's levels (others are interpolated).

    Raises:
        InputError: the table adds noise, or the teacher keeps some of the pixels only.
    """
    if table.noisy:
        raise InputError(f"sampler {table.name!r} adds noise: its steps have no distance to the teacher's trajectory")
    if teacher.pixels is not None:
        raise InputError("local errors need a teacher with all pixels: follow fewer trajectories, or give more memory")
    inner = inner_points(table)
    levels, like = table.levels.tolist(), teacher.start
    stages: dict[int, Tensor] = {}
    points: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    errors = []
    for k, row in enumerate(table.plan):
        points[k] = stages.pop(k) if inner[k] else teacher.at(levels[k]).reshape(like.shape)
        if row.sigma is not None:
            outputs[k] = D(points[k], row.sigma, teacher.cond).to(like.dtype)
        made = torch.zeros_like(like)
        for held, terms in ((points, row.points), (outputs, row.outputs)):
            for i, w in terms:
                made = made + w * held[i]
        if inner[k + 1]:
            stages[k + 1] = made
        errors.append(rmse(made.flatten(1), teacher.at(levels[k + 1])))
        for i in row.drop_points:
            del points[i]
        for i in row.drop_outputs:
            del outputs[i]
    return torch.stack(errors).cpu()


@torch.no_grad()
def global_errors(D: Denoiser, sampler: Sampler, teacher: Teacher, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """(K,) levels after each step of a whole run, and (K, n) its distance to the teacher there.

    The run starts from the teacher's starts, scaled to the sampler's level; the last row is the sampler's result minus
    the teacher's point at the same level. ``noise`` is for samplers that add some: then it is a distance, not an error.
    """
    seen: list[tuple[float, Tensor]] = []

    def keep(step: Step) -> None:
        goal = teacher.at(step.level)
        seen.append((step.level, rmse(teacher.view(step.point), goal).cpu()))

    start = teacher.start * (sampler.start / float(teacher.levels[0]))
    end = sampler(D, start, teacher.cond, noise=noise, on_step=keep)
    if len(seen) < 2:
        # A sampler need not tell of its steps; its result is known all the same.
        seen = [(sampler.start, end), (sampler.end, rmse(teacher.view(end), teacher.at(sampler.end)).cpu())]
    levels, errors = zip(*seen[1:], strict=True)
    return torch.tensor(levels, dtype=torch.float64), torch.stack(errors)


def spread(table: Tableau, variances: Sequence[float] | Tensor) -> Tensor:
    """(K+1, V) standard deviation at every point of a table that samples a Gaussian, over the exact one.

    The Gaussians have mean 0 and the given variances l >= 0, their denoiser is ``l / (l + s^2) x``, and the exact
    standard deviation at level s is ``sqrt(l + s^2)``. Without noise this is the table's amplification on the linear
    test problem ``x0 = c x`` over the exact ``sqrt((l + b^2) / (l + a^2))``. 1 is exact, and large values on the way
    mean a step that is unstable. nan where the exact one is 0.

    Raises:
        InputError: a variance that is negative or not finite.
    """
    var = torch.as_tensor(variances, dtype=torch.float64).reshape(-1)
    if not var.isfinite().all() or (var < 0).any():
        raise InputError(f"variances must be finite and >= 0, got {var.tolist()}")
    # A column per source of randomness: the start, and then the noise of each row that has one.
    draws = {k: 1 + i for i, k in enumerate(k for k, row in enumerate(table.plan) if row.draw)}
    state = var.new_zeros(len(var), 1 + len(draws))
    state[:, 0] = (var + table.start**2).sqrt()
    points, outputs = [state], dict[int, Tensor]()
    for k, row in enumerate(table.plan):
        if row.sigma is not None:
            outputs[k] = (var / (var + row.sigma**2))[:, None] * points[k]
        state = torch.zeros_like(state)
        for i, w in row.points:
            state = state + w * points[i]
        for i, w in row.outputs:
            state = state + w * outputs[i]
        for i, w in row.noises:
            state[:, draws[i]] += w
        points.append(state)
    exact = (var + table.levels[:, None] ** 2).sqrt()
    found = torch.stack([p.norm(dim=1) for p in points])
    return torch.where(exact > 0, found / exact, math.nan)


def orders(table: Tableau) -> dict[str, float]:
    """The measured order of the table's solver on grids uniform in log sigma, in VP time and in flow time.

    Raises:
        InputError: the table has no order: it was fitted or cut, or it adds noise.
    """
    if table.noisy:
        raise InputError(f"{table.name!r} adds noise: the order of accuracy is that of a sampler without")
    paths = {"log sigma": None, "VP time": VP, "flow time": FLOW}
    return {name: table.order(path, steps=(64, 128)) for name, path in paths.items()}


def teacher_levels(D: Denoiser, sampler: Sampler, count: int = FINE) -> Tensor:
    """(M,) at least ``count`` positive levels from the sampler's start to the denoiser's ``sigma_min``.

    They hold every positive level of a table, so that its points are compared without interpolation.
    """
    knots = [sampler.start]
    if isinstance(sampler, Tableau):
        # Levels that differ by rounding would make steps of length nearly 0, which a multi-step teacher cannot take.
        for level in sorted({s for s in sampler.levels.tolist() if 0 < s < sampler.start}, reverse=True):
            if level < (1 - 1e-6) * knots[-1]:
                knots.append(level)
    top = top_level(D)
    if knots[0] > 2 * top and (len(knots) < 2 or knots[1] < top / 2):
        # The first step from pure noise is long in log sigma, and nothing happens in most of it.
        knots.insert(1, top)
    return fine_levels(D, torch.tensor([*knots, 0.0], dtype=torch.float64), count)


def top_level(D: Denoiser) -> float:
    """The level above which nothing happens but that the noise grows: a few hundred times the data's spread."""
    return 80.0 * max(1.0, 2 * getattr(D, "sigma_data", 0.5))


@dataclass(frozen=True)
class Geometry:
    """All that a page shows.

    Attributes:
        name: of the sampler.
        nfe: its denoiser evaluations.
        noisy: whether it adds noise.
        curves: the generator's own trajectories, from where something begins to happen.
        projection: of these.
        levels: (K,) levels that the sampler's steps reach.
        total: (K, n) the sampler's distance to the teacher at these, see :func:`global_errors`.
        converged: how far two teachers with twice and once the steps are apart at the end: what errors to trust.
        table: the sampler if it is one.
        local: (K, n) see :func:`local_errors`; None for a sampler that is no table, or adds noise.
        inner: see :func:`inner_points`.
    """

    name: str
    nfe: int
    noisy: bool
    curves: Curves
    projection: Projection
    levels: Tensor
    total: Tensor
    converged: float
    table: Tableau | None
    local: Tensor | None
    inner: tuple[bool, ...]


def measure_geometry(
    D: Denoiser, sampler: Sampler, noise: Noise, cond: Cond, *, name: str = "sampler", say: Say = lambda text: None
) -> Geometry:
    """Follows one trajectory per noise source and measures the sampler on them, in float64.

    The starts are those of :meth:`fewstep.core.generator.Generator.sample` for the same noise.

    Raises:
        InputError: fewer than 8 sources, a sampler that does not end below its start, trajectories that need more than
            4 GiB, or a denoiser whose output is not finite.
    """
    if len(noise) < LEAST:
        raise InputError(f"geometry is a mean over at least {LEAST} samples, got {len(noise)}")
    if sampler.end >= sampler.start:
        raise InputError(f"{name} leads from sigma {sampler.start:g} to {sampler.end:g}: expected one that denoises")
    start = noise.fold("start")

    def teach(levels: Tensor) -> Teacher:
        found = follow(D, levels, start, cond, batch=len(noise), dtype=torch.float64, memory=MEMORY, say=say)
        if found.pixels is not None:
            raise InputError(
                f"{len(noise)} trajectories of {math.prod(D.shape)} numbers at {len(levels)} levels take more than "
                f"{MEMORY >> 30} GiB: pass fewer --samples (at least {LEAST})"
            )
        return found

    curves = Curves.of(teach(fine_levels(D, None)), 1.001 * top_level(D))
    table = sampler if isinstance(sampler, Tableau) else None
    # A table of many rows has every level as a knot; twice as many let the coarser teacher have half of them.
    count = max(2 * FINE, 2 * table.rows) if table is not None else 2 * FINE
    teacher = teach(teacher_levels(D, sampler, count))
    coarse = teach(teacher_levels(D, sampler, count // 2))
    say("the sampler's whole run")
    levels, total = global_errors(D, sampler, teacher, noise.fold("sampler"))
    noisy = bool(getattr(sampler, "noisy", False))
    say("the sampler's single steps")
    return Geometry(
        name=name,
        nfe=sampler.nfe,
        noisy=noisy,
        curves=curves,
        projection=project(curves),
        levels=levels,
        total=total,
        converged=float(rmse(teacher.end, coarse.end).mean()),
        table=table,
        local=None if table is None or noisy else local_errors(D, table, teacher),
        inner=() if table is None else inner_points(table),
    )
