"""DPM-Solver with adaptive steps (arXiv 2206.00927), with the step-size controller that k-diffusion gave it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.sample import OnStep, Step
from fewstep.errors import InputError
from fewstep.solve.euler import ancestral_split, check_stochastic

# A last step shorter than this in log sigma is taken together with the one before it.
SLIVER = 1e-5


@dataclass
class AdaptiveDPM:
    """Chooses its steps so that two solvers of neighbouring orders agree: DPM-Solver-12 (order 2) or -23 (order 3).

    A step is tried with both orders. Their difference, divided element by element by
    ``max(atol, rtol max(|lower|, |the previous step's lower|))``, has a root mean square E over all elements of the
    whole batch. A controller of proportional, integral and derivative terms in ``1/E`` multiplies the step in log sigma
    by a factor between 0.21 and 2.57; the step counts if that factor is at least ``accept_safety``, and the higher
    order goes on. All samples of a batch share their steps, so a sample depends (within the tolerance) on those it is
    drawn with. The tolerance is meant for data in about [-1, 1] and measures ``x0 + sigma n`` as it stands.

    With ``eta > 0`` each step goes to the lower level of the ancestral split and adds noise, which no order describes.
    This is no table, because the steps depend on the state.

    Attributes:
        sigma_start: noise level of the start.
        sigma_end: noise level of the result, above 0.
        order: 2 or 3: evaluations of an accepted step. A rejected one costs one less, the first output being kept.
        rtol: error allowed relative to the state, >= 0.
        atol: error allowed at least, > 0, in units of the data.
        h_init: the first step tried, in log sigma.
        pcoeff: weight of the controller's proportional term.
        icoeff: weight of its integral term; 1 with the others 0 is the textbook rule.
        dcoeff: weight of its derivative term.
        accept_safety: the least factor with which a step is accepted, in (0, 1].
        eta: 0 for the ODE; 1 for ancestral noise.
        s_noise: factor on the noise.
        max_steps: the most steps tried before giving up.
        name: what people call it.
        nfe: evaluations of the last run; 0 before the first.
        accepted: accepted steps of the last run.
        rejected: rejected steps of the last run.

    Raises:
        InputError: a field outside its range; when called, a missing ``noise`` or one of another batch, a denoiser
            whose output is not finite (names the level), or more than ``max_steps`` steps.
    """

    sigma_start: float
    sigma_end: float
    order: int = 3
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept_safety: float = 0.81
    eta: float = 0.0
    s_noise: float = 1.0
    max_steps: int = 1000
    name: str = "dpm-adaptive"
    nfe: int = field(default=0, init=False, compare=False)
    accepted: int = field(default=0, init=False, compare=False)
    rejected: int = field(default=0, init=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.sigma_end < self.sigma_start < math.inf:
            raise InputError(
                f"{self.name} needs 0 < sigma_end < sigma_start < inf, got {self.sigma_end} and {self.sigma_start}"
            )
        if self.order not in (2, 3):
            raise InputError(f"{self.name} has orders 2 and 3, got {self.order!r}")
        if not 0 <= self.rtol < math.inf or not 0 < self.atol < math.inf:
            raise InputError(f"{self.name} needs rtol >= 0 and atol > 0, got rtol={self.rtol!r} and atol={self.atol!r}")
        if not 0 < self.h_init < math.inf:
            raise InputError(f"{self.name} needs a first step h_init > 0 in log sigma, got {self.h_init!r}")
        if not 0 < self.accept_safety <= 1:
            raise InputError(f"{self.name} needs 0 < accept_safety <= 1, got {self.accept_safety!r}")
        if not all(math.isfinite(c) for c in (self.pcoeff, self.icoeff, self.dcoeff)):
            raise InputError(
                f"{self.name} needs finite pcoeff, icoeff and dcoeff, got"
                f" {self.pcoeff!r}, {self.icoeff!r} and {self.dcoeff!r}"
            )
        if self.max_steps < 1:
            raise InputError(f"{self.name} needs max_steps >= 1, got {self.max_steps!r}")
        check_stochastic(self.eta, self.s_noise)

    @property
    def start(self) -> float:
        """The noise level of the start."""
        return self.sigma_start

    @property
    def end(self) -> float:
        """The noise level of the result."""
        return self.sigma_end

    @property
    def noisy(self) -> bool:
        """Whether steps add noise."""
        return self.eta > 0

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
        """``x`` (B, *shape) at ``sigma_start`` -> the sample (B, *shape) at ``sigma_end``, float32 or float64.

        ``on_step`` sees the points of accepted steps.
        """
        if self.noisy and noise is None:
            raise InputError(f"sampler {self.name!r} adds noise: pass noise=Noise.of(seed, {len(x)})")
        if noise is not None and len(noise) != len(x):
            raise InputError(f"noise has {len(noise)} sources for {len(x)} samples: they must be as many")
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        self.nfe = self.accepted = self.rejected = 0

        def call(y: Tensor, sigma: float) -> Tensor:
            self.nfe += 1
            return D(y, sigma, cond).to(y.dtype)

        control = _Controller(self)
        a, previous, first = self.sigma_start, x, None
        while a > self.sigma_end:
            if self.accepted + self.rejected == self.max_steps:
                raise InputError(
                    f"{self.name} needs more than max_steps={self.max_steps} steps: it stands at sigma {a:g} with steps"
                    f" of {control.h:.2g} in log sigma; raise max_steps, or rtol={self.rtol:g} and atol={self.atol:g}"
                )
            if first is None:
                first = call(x, a)
                if on_step is not None:
                    on_step(Step(self.accepted, a, x, first))
            b = self._next_level(a, control.h)
            down = max(self.sigma_end, ancestral_split(a, b, self.eta)[0])
            low, high = _embedded(call, x, first, a, down, self.order)
            if not control.accepts(self._error(low, high, previous, a, down)):
                self.rejected += 1
                continue
            if down < b:
                assert noise is not None
                unit = noise.normal(x.shape[1:], "step", self.accepted, dtype=x.dtype).to(x.device)
                high = high + self.s_noise * math.sqrt((b - down) * (b + down)) * unit
            a, x, previous, first = b, high, low, None
            self.accepted += 1
        if on_step is not None:
            on_step(Step(self.accepted, self.sigma_end, x, None))
        return x

    def _next_level(self, a: float, h: float) -> float:
        left = math.log(a / self.sigma_end)
        return self.sigma_end if h > left - SLIVER else a * math.exp(-h)

    def _error(self, low: Tensor, high: Tensor, previous: Tensor, a: float, b: float) -> float:
        allowed = (self.rtol * torch.maximum(low.abs(), previous.abs())).clamp_min(self.atol)
        error = float(((low - high) / allowed).square().mean().sqrt())
        if not math.isfinite(error):
            raise InputError(f"the denoiser's output is not finite between sigma {a:g} and {b:g}")
        return error


class _Controller:
    """The step ``h`` in log sigma, multiplied after each try by a product of powers of the last three errors."""

    def __init__(self, options: AdaptiveDPM) -> None:
        self.h, self.safety = options.h_init, options.accept_safety
        p, i, d = options.pcoeff, options.icoeff, options.dcoeff
        # Noise of variance h makes the error of a step grow as h^1.5.
        order = 1.5 if options.noisy else options.order
        self.powers = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self.inverses: list[float] = []

    def accepts(self, error: float) -> bool:
        """Whether a step with this error is good enough; changes ``h`` either way."""
        inverse = 1 / (error + 1e-8)
        self.inverses = [inverse, *self.inverses[1:]] if self.inverses else [inverse] * 3
        wanted = math.prod(e**power for e, power in zip(self.inverses, self.powers, strict=True))
        factor = 1 + math.atan(wanted - 1)
        self.h *= factor
        if factor < self.safety:
            return False
        self.inverses = [inverse, *self.inverses[:2]]
        return True


def _embedded(
    call: Callable[[Tensor, float], Tensor], x: Tensor, first: Tensor, a: float, b: float, order: int
) -> tuple[Tensor, Tensor]:
    """One step from ``a`` to ``b`` with orders ``order - 1`` and ``order``, of which ``first`` is the output at ``a``.

    The noise-prediction forms of DPM-Solver-1, -2 and -3, written with differences of D: a huge ``a`` is harmless.
    """
    h = math.log(a / b)
    euler = first + (b / a) * (x - first)
    if order == 2:
        m = a * math.exp(-h / 2)
        second = call(first + (m / a) * (x - first), m) - first
        return euler, euler + ((a - b) / m) * second
    m1, m2 = a * math.exp(-h / 3), a * math.exp(-2 * h / 3)
    # (e - e0), the change of the noise prediction since ``a``, with the sign turned.
    turn = (call(first + (m1 / a) * (x - first), m1) - first) / m1
    low = euler + 1.5 * (a - b) * turn
    bend = 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1)
    point = first + (m2 / a) * (x - first) + (m2 * bend) * turn
    last = (call(point, m2) - first) / m2 - bend * turn
    return low, euler + 1.5 * b * (math.expm1(h) / h - 1) * last
