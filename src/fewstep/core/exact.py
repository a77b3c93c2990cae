"""A problem whose denoiser and trajectories are known: what solvers, conversions and methods are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.path import Path, as64
from fewstep.core.sample import sample
from fewstep.core.solver import SOLVERS, build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError


class Mixture:
    """Gaussian mixture with diagonal covariances, and its exact denoiser ``E[x0 | x0 + sigma n = x]``.

    ``means`` (K, *shape), ``variances`` broadcastable to it, ``weights`` (K,). Everything is float64. One component is
    a Gaussian, whose probability flow :meth:`flow` gives in closed form.
    """

    def __init__(
        self,
        means: Tensor,
        variances: Tensor | float,
        weights: Sequence[float] | Tensor | None = None,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        self.means = means.double()
        self.variances = torch.as_tensor(variances, dtype=torch.float64).expand_as(self.means)
        mass = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        self.log_weights = (mass.double() / mass.double().sum()).log()
        self.shape = tuple(means.shape[1:])
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.sigma_data = float((self.variances.mean() + self.means.var(0, correction=0).mean()).sqrt())

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """The posterior mean (B, *shape), in the dtype of ``x``; a ``label`` >= 0 picks one component."""
        sigma = as64(sigma)
        flat, means, variances = x.double().flatten(1), self.means.flatten(1), self.variances.flatten(1)
        noise = (sigma**2).reshape(-1, 1, 1)
        total = variances + noise
        distance = (flat[:, None] - means) ** 2 / total + total.log()
        logits = self.log_weights - 0.5 * distance.sum(2)
        label = (cond or {}).get("label")
        if label is not None:
            hidden = (label[:, None] >= 0) & (label[:, None] != torch.arange(len(means)))
            logits = logits.masked_fill(hidden, -math.inf)
        gain = variances / total
        each = means + gain * (flat[:, None] - means)
        return (logits.softmax(1)[..., None] * each).sum(1).reshape(x.shape).to(x.dtype)

    def draw(self, n: int, seed: int = 0) -> Tensor:
        """(n, *shape) samples."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        unit = torch.randn((n, *self.shape), generator=generator, dtype=torch.float64)
        return self.means[k] + self.variances[k].sqrt() * unit

    def flow(self, x: Tensor, start: float, end: float, steps: int = 400) -> Tensor:
        """The probability-flow ODE carried from level ``start`` to ``end`` > 0.

        Closed form for one component, otherwise the classical Runge-Kutta method in log sigma (error about steps^-4).
        """
        if len(self.means) == 1:
            gain = ((self.variances[0] + end**2) / (self.variances[0] + start**2)).sqrt()
            return self.means[0] + gain * (x.double() - self.means[0])
        x, u, h = x.double(), math.log(start), math.log(end / start) / steps
        for i in range(steps):
            at = u + i * h
            k1 = x - self(x, math.exp(at))
            y = x + h / 2 * k1
            k2 = y - self(y, math.exp(at + h / 2))
            y = x + h / 2 * k2
            k3 = y - self(y, math.exp(at + h / 2))
            y = x + h * k3
            k4 = y - self(y, math.exp(at + h))
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x


def bimodal() -> Mixture:
    """A one-dimensional, smooth but non-linear problem for measuring orders."""
    return Mixture(torch.tensor([[-1.0], [1.5]]), torch.tensor([[0.5], [0.8]]), [0.4, 0.6])


@cache
def _known(start: float, end: float) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2.0, 2.0, 33, dtype=torch.float64)[:, None] * start
    return x, bimodal().flow(x, start, end)


def measured_order(tableau: Tableau, path: Path | None, steps: Sequence[int]) -> float:
    """See :meth:`Tableau.order`."""
    made = tableau.meta.get("solver")
    if made not in SOLVERS:
        raise InputError(f"{tableau.name!r} has no order to measure: it was fitted or cut, not made by a named solver")
    if tableau.noisy:
        raise InputError(f"{tableau.name!r} adds noise: it has no order on an ordinary differential equation")
    problem, start, end = bimodal(), min(tableau.start, 10.0), 0.05
    x, exact = _known(start, end)
    errors = []
    for n in steps:
        if path is None:
            grid = torch.linspace(math.log(start), math.log(end), n + 1, dtype=torch.float64).exp()
        else:
            u0, u1 = float(path.at(start)), float(path.at(end))
            grid = path.sigma(torch.linspace(u0, u1, n + 1, dtype=torch.float64))
        built = build(made, grid, **tableau.meta.get("options", {}))
        errors.append(float((sample(problem, x, built) - exact).abs().max()))
    return math.log2(errors[-2] / errors[-1]) / math.log2(steps[-1] / steps[-2])
