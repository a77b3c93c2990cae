"""The one loop that runs every table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.core.cond import Cond, cat
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.tableau import Row, Tableau
from fewstep.errors import InputError


class Step(NamedTuple):
    """Where a sampler stands: ``point`` at ``level`` after ``k`` rows, and the denoiser's output there, if asked."""

    k: int
    level: float
    point: Tensor
    denoised: Tensor | None


OnStep = Callable[[Step], None]


class Sampler(Protocol):
    """Anything that turns a start at noise level ``start`` into a sample with ``nfe`` evaluations; a Tableau is one."""

    @property
    def start(self) -> float:
        """The noise level of the start."""
        ...

    @property
    def end(self) -> float:
        """The noise level of the result, 0 for a picture."""
        ...

    @property
    def nfe(self) -> int:
        """Denoiser evaluations."""
        ...

    def __call__(
        self,
        D: Denoiser,
        x: Tensor,
        cond: Cond | None = None,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """``x`` (B, *shape) at the sampler's first level -> the sample at its last."""
        ...


def sample(
    D: Denoiser,
    x: Tensor,
    tableau: Tableau,
    cond: Cond | None = None,
    *,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    grad: bool = False,
    parallel: bool = False,
) -> Tensor:
    """Runs a table from ``x`` (B, *shape), a point at ``tableau.levels[0]`` such as ``sigma_max * n``.

    The state is float32, or float64 if ``x`` is. ``on_step`` sees every point as it is reached; ``grad=True`` keeps
    the graph through all steps; ``parallel=True`` evaluates points that do not wait for each other as one larger batch
    (see :attr:`Tableau.waves`), which trades memory for latency.

    Raises:
        InputError: the table adds noise and none was given, or the batch of ``noise`` is another.
    """
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        if on_step is None and not parallel:
            return _straight(D, tableau, cond, _Held.of(x, tableau, noise, grad))
        for step in _run(D, x, tableau, cond, noise, grad, parallel):
            if on_step is not None:
                on_step(step)
            end = step.point if step.k == len(tableau.plan) else None
            del step  # it would keep a point and an output alive through the next evaluation
    assert end is not None
    return end


def trajectory(
    D: Denoiser, x: Tensor, tableau: Tableau, cond: Cond | None = None, *, noise: Noise | None = None
) -> Iterator[Step]:
    """Yields each point of :func:`sample` with the denoiser's output there; the last one is the sample."""
    steps = _run(D, x, tableau, cond, noise, False)
    while True:
        # The grad mode is set around each step, not the loop: a generator must not hold it while its caller runs.
        with torch.no_grad():
            step = next(steps, None)
        if step is None:
            return
        yield step
        del step


def _straight(D: Denoiser, tableau: Tableau, cond: Cond | None, held: _Held) -> Tensor:
    """The loop that nobody watches: per step, the network and the row's weighted sum are all there is."""
    points, outputs, dtype = held.points, held.outputs, held.dtype
    for k, row in enumerate(tableau.plan):
        if row.sigma is not None:
            outputs[k] = D(points[k], row.sigma, cond).to(dtype)
        points[k + 1] = held.follow(k, row)
    return points[len(tableau.plan)]


def _run(
    D: Denoiser, x: Tensor, tableau: Tableau, cond: Cond | None, noise: Noise | None, grad: bool, parallel: bool = False
) -> Iterator[Step]:
    held = _Held.of(x, tableau, noise, grad)
    if parallel and max(tableau.waves) > 1:
        yield from _run_waves(D, tableau, cond, held)
    else:
        for k, row in enumerate(tableau.plan):
            if row.sigma is not None:
                held.outputs[k] = D(held.points[k], row.sigma, cond).to(held.dtype)
            yield Step(k, row.level, held.points[k], held.outputs.get(k))
            held.points[k + 1] = held.follow(k, row)
    yield Step(len(tableau.plan), tableau.end, held.points[tableau.rows], None)


def _run_waves(D: Denoiser, tableau: Tableau, cond: Cond | None, held: _Held) -> Iterator[Step]:
    """The rows of a wave do not wait for each other's outputs: their points are formed first and evaluated as one."""
    k = 0
    while k < tableau.rows:
        wave = range(k, k + tableau.waves[k])
        rows = [tableau.plan[i] for i in wave]
        for i, row in zip(wave[:-1], rows[:-1], strict=True):
            held.points[i + 1] = held.combine(row)
        calls = [i for i, row in zip(wave, rows, strict=True) if row.sigma is not None]
        if calls:
            points = [held.points[i] for i in calls]
            sigmas = torch.stack([tableau.sigmas[i] for i in calls]).repeat_interleave(len(points[0]))
            many = cat([cond] * len(calls)) if cond else cond
            outs = D(torch.cat(points), sigmas.to(points[0].device), many).to(held.dtype).split(len(points[0]))
            held.outputs.update(zip(calls, outs, strict=True))
        for i, row in zip(wave, rows, strict=True):
            yield Step(i, row.level, held.points[i], held.outputs.get(i))
        following = held.follow(wave[-1], rows[-1])
        for row in rows[:-1]:
            held.forget(row)
        held.points[wave[-1] + 1] = following
        k = wave[-1] + 1


class _Held:
    """What a run still needs: points, outputs and noises by row."""

    def __init__(self, x: Tensor, noise: Noise | None, grad: bool) -> None:
        self.dtype, self.noise, self.grad = x.dtype, noise, grad
        self.points: dict[int, Tensor] = {0: x}
        self.outputs: dict[int, Tensor] = {}
        self.noises: dict[int, Tensor] = {}

    @classmethod
    def of(cls, x: Tensor, tableau: Tableau, noise: Noise | None, grad: bool) -> _Held:
        """At the start of a run; raises what :func:`sample` says."""
        if tableau.noisy and noise is None:
            raise InputError(f"sampler {tableau.name!r} adds noise: pass noise=Noise.of(seed, {len(x)})")
        if noise is not None and len(noise) != len(x):
            raise InputError(f"noise has {len(noise)} sources for {len(x)} samples: they must be as many")
        return cls(x if x.dtype in (torch.float32, torch.float64) else x.float(), noise, grad)

    def combine(self, row: Row) -> Tensor:
        """The weighted sum of a row without its noises, in one fused operation per term."""
        if row.mix is not None:
            return torch.lerp(self.outputs[row.outputs[0][0]], self.points[row.points[0][0]], row.mix)
        total: Tensor | None = None
        for source, weights in ((self.points, row.points), (self.outputs, row.outputs)):
            for i, w in weights:
                total = source[i] * w if total is None else self._add(total, source[i], w)
        return torch.zeros_like(next(iter(self.points.values()))) if total is None else total

    def follow(self, k: int, row: Row) -> Tensor:
        """The next point; forgets what no later row needs before it draws the row's noise."""
        total = self.combine(row)
        for i in row.drop_points:
            del self.points[i]
        for i in row.drop_outputs:
            del self.outputs[i]
        if not row.noises and not row.draw:
            return total
        if row.draw and self.noise is not None:
            drawn = self.noise.normal(total.shape[1:], "step", k, dtype=total.dtype)
            self.noises[k] = drawn.to(total.device)
        for i, w in row.noises:
            total = self._add(total, self.noises[i], w)
        for i in row.drop_noises:
            del self.noises[i]
        return total

    def forget(self, row: Row) -> None:
        """Drops the points and outputs that ``row`` is the last to need."""
        for i in row.drop_points:
            del self.points[i]
        for i in row.drop_outputs:
            del self.outputs[i]

    def _add(self, total: Tensor, term: Tensor, weight: float) -> Tensor:
        return torch.add(total, term, alpha=weight) if self.grad else total.add_(term, alpha=weight)
