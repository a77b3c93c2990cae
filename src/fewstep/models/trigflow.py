"""A trained denoiser seen in the coordinates of another path, without retraining: TrigFlow, and flow matching's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.denoiser import TIME_MAPS, Precond
from fewstep.core.path import PURE_NOISE, TRIG, Path, weights_from, widen, x0_weights
from fewstep.errors import InputError


class View:
    """The velocity ``da x0 + db n`` of ``path`` that a denoiser's estimate stands for, at points ``x_u = a x``.

    On ``TRIG(sigma_data)`` this is TrigFlow's ``dx_t/dt = sigma_data F`` (arXiv 2410.11081, section 3), with which
    ``D = cos(t) x_t - sin(t) sigma_data F``; on ``FLOW`` it is the velocity ``n - x0`` of flow matching. For a
    :class:`Precond` it is a linear combination of ``x_u`` and the network's own output, whose weights are formed in
    float64 and stay finite at ``t -> 0``, so nothing is lost by going through x0; for a flow model on TRIG it is
    SANA-Sprint's conversion (arXiv 2503.09641, section 3.1). Anything else that is a denoiser, such as a guided
    one, goes through x0, whose rounding grows as one over the time.

    A network that predicts x0 has a velocity that is infinite at time 0, in any coordinates.
    """

    def __init__(self, denoiser: Any, path: Path) -> None:
        """``denoiser`` is a :class:`fewstep.core.denoiser.Denoiser`; the view holds no weights of its own."""
        self.denoiser, self.path = denoiser, path

    def weights(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(p, q, scale, sigma)`` float64: ``velocity = p x_u + q out``, ``out`` of the network at ``scale x_u``."""
        return self._weights(u)[:4]

    def _weights(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`weights` gives, and the denoiser's own time (B,).

        Coefficients are formed once: in a forward-mode pass every operation on these few numbers costs as much as one
        on small pictures.
        """
        D, coeffs = self.denoiser, self.path.coeffs(u)
        c, k = weights_from(coeffs, "velocity")
        sigma = coeffs.b / coeffs.a
        own = D.path.at(sigma)
        on_x, on_out = D.weights(own, sigma)
        return (on_x / coeffs.a - c) / k, on_out / k, D.path.coeffs(own).a * D.scale_in / coeffs.a, sigma, own

    def __call__(self, x: Tensor, u: Tensor, cond: Cond | None = None) -> Tensor:
        """The velocity (B, ...) at ``x`` (B, ...), times ``u`` (B,) > 0 of the path; differentiable in both."""
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        u = u.to(torch.float64)
        D = self.denoiser
        if not isinstance(D, Precond):
            coeffs = self.path.coeffs(u)
            c, k = weights_from(coeffs, "velocity")
            estimate = D(widen(1 / coeffs.a, x) * x, coeffs.b / coeffs.a, cond)
            return (estimate.to(x.dtype) - widen(c, x) * x) * widen(1 / k, x)
        p, q, scale, sigma, own = self._weights(u)
        time = TIME_MAPS[D.time](D.path, own, sigma).to(x.device, torch.float32)
        out = D.net((widen(scale, x) * x).to(next(D.net.parameters()).dtype), time, cond or {})
        return widen(p, x) * x + widen(q, x) * out.to(x.dtype)

    def x0(self, x: Tensor, velocity: Tensor, u: Tensor) -> Tensor:
        """The estimate that ``velocity`` stands for at ``x`` (both (B, ...)) and times ``u`` (B,): exactly D's."""
        c, k = x0_weights(self.path, "velocity", u)
        return widen(c, x) * x + widen(k, x) * velocity


def trigflow(denoiser: Any, sigma_data: float | None = None) -> View:
    """The view in TrigFlow's coordinates ``x_t = cos(t) x``, ``t = atan(sigma / sigma_data)`` (arXiv 2410.11081).

    ``sigma_data`` > 0 is the spread of the data; None is the denoiser's own.

    Raises:
        InputError: it is not positive and finite.
    """
    d = float(denoiser.sigma_data if sigma_data is None else sigma_data)
    if not 0 < d < math.inf:
        raise InputError(f"TrigFlow needs a finite sigma_data > 0, got {d}")
    return View(denoiser, TRIG(d))


def smooth(denoiser: Precond) -> Precond:
    """The denoiser itself, if its network is told a time that varies smoothly with the level.

    Raises:
        InputError: it is told the nearest of its trained levels, whose derivative in time is 0 or infinite.
    """
    if denoiser.time == "nearest":
        raise InputError(
            "this network is told the nearest of its trained levels, which cannot be differentiated in time: "
            "make its Precond with time='native', which tells it the fraction between two levels"
        )
    return denoiser


class LogVariance(nn.Module):
    """A learned ``ln variance`` of the loss at each level (arXiv 2410.11081, section 4.2): 0 at first."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 0.5, width // 2), persistent=False)
        self.leave = nn.Linear(width, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        """Levels (B,) > 0 -> (B,)."""
        phase = (sigma.clamp(max=PURE_NOISE).log() / 4).float()[:, None] * self.frequencies * math.pi  # type: ignore[operator]
        out: Tensor = self.leave(torch.cat([phase.cos(), phase.sin()], 1))
        return out[:, 0]
