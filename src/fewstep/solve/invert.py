"""Inversion: from a picture back to the noise that Euler's method (DDIM) makes it from.

Euler's step from a to b < a is ``x_b = x_a + (b - a) eps(x_a, a)`` with ``eps = (x - D) / sigma``. Run backwards it is
an equation for ``x_a``. DDIM inversion (arXiv 2010.02502) puts what is known in the place of x_a inside eps; AIDI
(arXiv 2309.04907) solves the equation by fixed-point iteration, ``z <- x_b + (a - b) eps(z, a)``.

These are no samplers: they start at the last level of a grid and end at its first. Hence they are not in ``SOLVERS``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.path import VP, Path, path_config
from fewstep.core.sample import OnStep, Step
from fewstep.core.solver import check_grid
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown


def ddim_invert(sigmas: Tensor, *, at: Literal["here", "next"] = "here", frame: Path = VP) -> Tableau:
    """The table that carries a point at the last level of the decreasing grid ``sigmas`` up to its first.

    ``x_a = x_b + (a - b) eps``, one evaluation a step. ``at="here"`` takes ``eps(x_b, b)``. ``at="next"`` shows the
    network the state that it has, but tells it the level to come, as inversion with latent diffusion models does: for
    the state ``alpha x`` of ``frame`` that is ``eps(x', a)`` with ``x' = x_b alpha_b / alpha_a``, a point that a row
    without an evaluation makes. Level 0 has no noise to estimate: a step from there is that of ``at="next"``.
    The result differs from the true inverse of Euler's method by a first-order error in the steps.

    Raises:
        InputError: an unknown ``at`` or a bad grid.
    """
    if at not in ("here", "next"):
        raise unknown("place of ddim_invert", str(at), ("here", "next"))
    grid = check_grid(sigmas).flip(0).tolist()
    table = Builder(grid[0])
    for b, a in itertools.pairwise(grid):
        base = table.k
        if at == "here" and b > 0:
            table.row(b, a, {base: a / b}, {base: 1 - a / b})
            continue
        table.row(None, a, {base: _alpha(frame, b) / _alpha(frame, a)}, {})
        gain = 1 - b / a
        table.row(a, a, {base: 1.0, base + 1: gain}, {base + 1: -gain})
    options = {"at": at, "frame": path_config(frame)}
    return table.build("ddim-invert", inverts="euler", options=options)


def aidi(sigmas: Tensor, *, iterations: int = 5, average: bool = False) -> Tableau:
    """Fixed-point inversion of Euler's method from the last level of the decreasing grid ``sigmas`` to its first.

    Each step takes ``iterations`` evaluations, all at the level that it ends at, and starts from the explicit step with
    the last output of the step before, which costs none; the first step starts from ``x_b`` itself.
    ``average=True`` is the published AIDI_E: each iterate is the mean of the map at the last two. It helps where the
    slope of the map is strongly negative, as under strong guidance, and slows the iteration down elsewhere. The map
    contracts by ``(1 - b/a) (1 - dD/dx)``: fast for short steps, slowly for long ones at high noise, where
    :class:`Aidi` is far better.

    Raises:
        InputError: ``iterations`` below 1 or a bad grid.
    """
    _check_count("aidi", "iterations", iterations, 1)
    grid = check_grid(sigmas).flip(0).tolist()
    table = Builder(grid[0])
    for b, a in itertools.pairwise(grid):
        base, gain = table.k, 1 - b / a
        if base > 0:
            table.row(None, a, {base: a / b}, {base - 1: 1 - a / b})
        for i in range(iterations):
            newest = table.k
            used, share = ((newest, newest - 1), 0.5 * gain) if average and i > 0 else ((newest,), gain)
            points = {base: 1.0}
            for j in used:
                points[j] = points.get(j, 0.0) + share
            table.row(a, a, points, dict.fromkeys(used, -share))
    options = {"iterations": iterations, "average": average}
    return table.build("aidi-average" if average else "aidi", inverts="euler", options=options)


def _alpha(frame: Path, sigma: float) -> float:
    """The factor that turns ``x`` at ``sigma`` into the state of ``frame``."""
    return float(frame.coeffs(frame.at(sigma)).a)


@dataclass(frozen=True, eq=False)
class Aidi:
    """Inversion of Euler's method by fixed-point iteration with Anderson acceleration (arXiv 2309.04907), a Sampler.

    ``sigmas`` is the usual decreasing grid; the start is a point at its last level, the result one at its first.
    Of the last ``memory + 1`` iterates the combination with the least residual is carried through the map, for each
    sample on its own; ``memory=0`` is plain iteration, :func:`aidi`. The weights depend on the state, so this is no
    table. Raises InputError for ``iterations`` below 1, ``memory`` below 0 or a bad grid.
    """

    sigmas: Tensor
    iterations: int = 5
    memory: int = 2
    name: str = "aidi-anderson"

    def __post_init__(self) -> None:
        _check_count("Aidi", "iterations", self.iterations, 1)
        _check_count("Aidi", "memory", self.memory, 0)
        object.__setattr__(self, "sigmas", check_grid(self.sigmas))

    @property
    def start(self) -> float:
        """The noise level that the inversion starts from: the last of the grid."""
        return float(self.sigmas[-1])

    @property
    def end(self) -> float:
        """The noise level of the result: the first of the grid."""
        return float(self.sigmas[0])

    @property
    def nfe(self) -> int:
        """Denoiser evaluations."""
        return self.iterations * (len(self.sigmas) - 1)

    @torch.no_grad()
    def __call__(
        self,
        D: Denoiser,
        x: Tensor,
        cond: Cond | None = None,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """``x`` (B, *shape) at level ``start`` -> the point (B, *shape) at level ``end``; ``noise`` is not used.

        The state is float32, or float64 if ``x`` is. ``on_step`` sees every iterate with the denoiser's output there.
        """
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        levels = self.sigmas.flip(0)
        done, last = 0, None
        for b, a in itertools.pairwise(levels):
            base, points, images = x, list[Tensor](), list[Tensor]()
            if last is not None:
                x = last + float(a / b) * (x - last)
            for _ in range(self.iterations):
                last = denoised = D(x, a, cond).to(x.dtype)
                if on_step is not None:
                    on_step(Step(done, self.start if done == 0 else float(a), x, denoised))
                points.append(x)
                images.append(base + float(1 - b / a) * (x - denoised))
                points, images = points[-self.memory - 1 :], images[-self.memory - 1 :]
                x = _anderson(points, images)
                done += 1
        if on_step is not None:
            on_step(Step(done, self.end, x, None))
        return x


def _anderson(points: list[Tensor], images: list[Tensor]) -> Tensor:
    """The next iterate from points (oldest first) and their images under the map, all (B, *shape)."""
    if len(points) == 1:
        return images[0]
    residuals = torch.stack([f - z for z, f in zip(points, images, strict=True)]).flatten(2)
    change = residuals.diff(dim=0)
    # Weights (B, m) of the changes that cancel as much as possible of the newest residual.
    gram = torch.einsum("ibn,jbn->bij", change, change).double().cpu()
    right = torch.einsum("ibn,bn->bi", change, residuals[-1]).double().cpu()
    # Changes that have died out or repeat each other get no weight.
    weights = (torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ right[..., None])[..., 0]
    weights = weights.to(images[-1])
    step = torch.einsum("bi,ibn->bn", weights, torch.stack(images).flatten(2).diff(dim=0))
    return images[-1] - step.reshape_as(images[-1])


def _check_count(name: str, what: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} needs a whole number of {what} >= {least}, got {value!r}")
