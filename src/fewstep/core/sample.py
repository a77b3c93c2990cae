"""The one loop that runs every table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.core.cond import Cond
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
) -> Tensor:
    """Runs a table from ``x`` (B, *shape), a point at ``tableau.levels[0]`` such as ``sigma_max * n``.

    The state is float32, or float64 if ``x`` is. ``on_step`` sees every point as it is reached; ``grad=True`` keeps
    the graph through all steps.

    Raises:
        InputError: the table adds noise and none was given, or the batch of ``noise`` is another.
    """
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        for step in _run(D, x, tableau, cond, noise, grad):
            if on_step is not None:
                on_step(step)
            end = step.point if step.k == tableau.rows else None
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


def _run(
    D: Denoiser, x: Tensor, tableau: Tableau, cond: Cond | None, noise: Noise | None, grad: bool
) -> Iterator[Step]:
    if tableau.noisy and noise is None:
        raise InputError(f"sampler {tableau.name!r} adds noise: pass noise=Noise.of(seed, {len(x)})")
    if noise is not None and len(noise) != len(x):
        raise InputError(f"noise has {len(noise)} sources for {len(x)} samples: they must be as many")
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    points, outputs, noises = {0: x}, dict[int, Tensor](), dict[int, Tensor]()
    for k, row in enumerate(tableau.plan):
        if row.sigma is not None:
            outputs[k] = D(points[k], row.sigma, cond).to(x.dtype)
        yield Step(k, row.level, points[k], outputs.get(k))
        if row.draw and noise is not None:
            noises[k] = noise.normal(x.shape[1:], "step", k, dtype=x.dtype).to(x.device)
        following = _combine(row, points, outputs, noises, grad)
        for i in row.drop_points:
            del points[i]
        for i in row.drop_outputs:
            del outputs[i]
        for i in row.drop_noises:
            del noises[i]
        points[k + 1] = following
    yield Step(tableau.rows, float(tableau.levels[-1]), points[tableau.rows], None)


def _combine(
    row: Row, points: dict[int, Tensor], outputs: dict[int, Tensor], noises: dict[int, Tensor], grad: bool
) -> Tensor:
    """The weighted sum of a row, in one fused operation per term."""
    terms = [(points[i], w) for i, w in row.points]
    terms += [(outputs[i], w) for i, w in row.outputs] + [(noises[i], w) for i, w in row.noises]
    if not terms:
        return torch.zeros_like(points[max(points)])
    total = terms[0][0] * terms[0][1]
    for tensor, weight in terms[1:]:
        total = torch.add(total, tensor, alpha=weight) if grad else total.add_(tensor, alpha=weight)
    return total
