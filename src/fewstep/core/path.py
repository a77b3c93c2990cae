"""Paths: how a model mixes picture and noise, and the one table that turns any prediction into x0.

A path is ``x_u = a(u) x0 + b(u) n`` with its own time ``u``; its noise level is ``sigma = b / a``. All else
works on ``x = x0 + sigma n = x_u / a`` and never sees ``u``. Coefficients are float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.errors import InputError, unknown

Predicts = Literal["x0", "noise", "velocity", "v"]
Time = Tensor | float
# The level that stands for the infinite one of pure noise, from which flow models start.
PURE_NOISE = 1e8
# Above every level that a model with pictures in its noise is used from (iDDPM: 2e4), below those of pure noise.
HIGHEST_PICTURED = 1e5


class Coeffs(NamedTuple):
    """``x_u = a x0 + b n`` and the derivatives of both weights with respect to ``u``."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


def as64(u: Time) -> Tensor:
    """``u`` as a float64 tensor, on its own device."""
    return torch.as_tensor(u, dtype=torch.float64)


@dataclass(frozen=True)
class Path:
    """Base of all paths. Calling an instance with fields makes a variant: ``FLOW(shift=3.0)``, ``TRIG(0.5)``."""

    def __call__(self, *args: Any, **fields: Any) -> Path:
        """The same kind of path with other parameters."""
        names = [f for f in self.__dataclass_fields__ if self.__dataclass_fields__[f].init]
        if len(args) > len(names):
            raise InputError(f"{type(self).__name__} takes at most {len(names)} parameters {names}, got {len(args)}")
        return replace(self, **dict(zip(names, args, strict=False)), **fields)

    def coeffs(self, u: Time) -> Coeffs:
        """The four weights at native time ``u`` (any shape), float64."""
        raise NotImplementedError

    def sigma(self, u: Time) -> Tensor:
        """The noise level ``b / a`` at ``u``; infinite where ``a`` is 0."""
        c = self.coeffs(u)
        return c.b / c.a

    def at(self, sigma: Time) -> Tensor:
        """The native time of noise level ``sigma``: the inverse of :meth:`sigma`."""
        raise NotImplementedError

    def nearest(self, sigma: Time) -> Tensor:
        """The index of the trained level nearest to ``sigma``, for paths that are a table.

        Raises:
            InputError: the path is continuous.
        """
        raise InputError(f"{type(self).__name__} is continuous: only a DDPM path has a table of trained levels")


@dataclass(frozen=True)
class EDMPath(Path):
    """Variance exploding: ``x_u = x0 + u n``, the time is the noise level (arXiv 2206.00364)."""

    def coeffs(self, u: Time) -> Coeffs:
        """See :meth:`Path.coeffs`."""
        u = as64(u)
        one = torch.ones_like(u)
        return Coeffs(one, u, torch.zeros_like(u), one)

    def at(self, sigma: Time) -> Tensor:
        """See :meth:`Path.at`."""
        return as64(sigma)


@dataclass(frozen=True)
class VPPath(Path):
    """Variance preserving with linear beta: ``1 + sigma^2 = exp(beta_d u^2 / 2 + beta_min u)`` (arXiv 2011.13456)."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    def coeffs(self, u: Time) -> Coeffs:
        """See :meth:`Path.coeffs`."""
        u = as64(u)
        log_a = -0.25 * self.beta_d * u**2 - 0.5 * self.beta_min * u
        a, b = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()
        da = -0.5 * (self.beta_d * u + self.beta_min) * a
        return Coeffs(a, b, da, -a * da / b)

    def at(self, sigma: Time) -> Tensor:
        """See :meth:`Path.at`."""
        y = torch.log1p(as64(sigma) ** 2)
        return 2 * y / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * y).sqrt())


@dataclass(frozen=True)
class TrigPath(Path):
    """``x_u = cos(u) x0 + scale sin(u) n``, ``u`` in [0, pi/2]; ``scale`` is TrigFlow's sigma_data (arXiv 2410.11081).

    With ``scale=1`` its velocity is the v of v-prediction.
    """

    scale: float = 1.0

    def coeffs(self, u: Time) -> Coeffs:
        """See :meth:`Path.coeffs`."""
        u = as64(u)
        cos, sin = u.cos(), u.sin()
        return Coeffs(cos, self.scale * sin, -sin, self.scale * cos)

    def at(self, sigma: Time) -> Tensor:
        """See :meth:`Path.at`."""
        return torch.atan(as64(sigma) / self.scale)


@dataclass(frozen=True)
class CosinePath(Path):
    """Cosine schedule with the log-SNR clipped to +-``logsnr_max``, ``u`` in [0, 1] (arXiv 2202.00512, appendix)."""

    logsnr_max: float = 20.0

    def _angle(self, u: Tensor) -> tuple[Tensor, float]:
        low = math.atan(math.exp(-0.5 * self.logsnr_max))
        rate = math.atan(math.exp(0.5 * self.logsnr_max)) - low
        return low + rate * u, rate

    def coeffs(self, u: Time) -> Coeffs:
        """See :meth:`Path.coeffs`."""
        angle, rate = self._angle(as64(u))
        cos, sin = angle.cos(), angle.sin()
        return Coeffs(cos, sin, -rate * sin, rate * cos)

    def at(self, sigma: Time) -> Tensor:
        """See :meth:`Path.at`."""
        low, rate = math.atan(math.exp(-0.5 * self.logsnr_max)), self._angle(as64(0.0))[1]
        return (torch.atan(as64(sigma)) - low) / rate


@dataclass(frozen=True)
class FlowPath(Path):
    """``x_u = (1 - t) x0 + t n``, ``t = shift u / (1 + (shift - 1) u)``, ``u`` in [0, 1] (arXiv 2209.03003).

    ``shift > 1`` spends more of the time at high noise (arXiv 2403.03206, eq. 23). u = 1 is pure noise, which the rest
    of the library writes as the finite level ``sigma_max = 1e8``.
    """

    shift: float = 1.0

    def coeffs(self, u: Time) -> Coeffs:
        """See :meth:`Path.coeffs`."""
        u = as64(u)
        bottom = 1 + (self.shift - 1) * u
        rate = self.shift / bottom**2
        return Coeffs((1 - u) / bottom, self.shift * u / bottom, -rate, rate)

    def at(self, sigma: Time) -> Tensor:
        """See :meth:`Path.at`."""
        sigma = as64(sigma)
        return sigma / (sigma + self.shift)


@dataclass(frozen=True)
class DDPMPath(Path):
    """A discrete table of betas (arXiv 2006.11239): ``u`` is the step index 0 .. T-1, log sigma linear in between."""

    betas: tuple[float, ...] = field(default_factory=lambda: tuple(torch.linspace(1e-4, 0.02, 1000).tolist()))

    def __post_init__(self) -> None:
        if not isinstance(self.betas, tuple):
            object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        if len(self.betas) < 2 or not all(0 < b < 1 for b in self.betas):
            raise InputError(f"DDPM betas must be at least two numbers in (0, 1), got {self.betas[:4]}...")
        kept = torch.cumprod(1 - torch.tensor(self.betas, dtype=torch.float64), 0)
        object.__setattr__(self, "_log_sigma", 0.5 * torch.log((1 - kept) / kept))

    @property
    def levels(self) -> Tensor:
        """The noise levels (T,) that the network was trained at, increasing."""
        return self.__dict__["_log_sigma"].exp()

    def coeffs(self, u: Time) -> Coeffs:
        """See :meth:`Path.coeffs`."""
        u = as64(u)
        table = self.__dict__["_log_sigma"].to(u.device)
        low = u.floor().long().clamp(0, len(table) - 2)
        slope = table[low + 1] - table[low]
        sigma = (table[low] + (u - low) * slope).exp()
        a = (1 + sigma**2).rsqrt()
        return Coeffs(a, sigma * a, -slope * sigma**2 * a**3, slope * sigma * a**3)

    def at(self, sigma: Time) -> Tensor:
        """See :meth:`Path.at`."""
        log = as64(sigma).log()
        table = self.__dict__["_log_sigma"].to(log.device)
        low = (torch.searchsorted(table, log.contiguous()) - 1).clamp(0, len(table) - 2)
        return low + (log - table[low]) / (table[low + 1] - table[low])

    def nearest(self, sigma: Time) -> Tensor:
        """See :meth:`Path.nearest`."""
        sigma = as64(sigma)
        levels = self.levels.to(sigma.device)
        low = (torch.searchsorted(levels, sigma.contiguous()) - 1).clamp(0, len(levels) - 2)
        return low + (levels[low + 1] - sigma < sigma - levels[low]).to(torch.float64)


EDM = EDMPath()
VP = VPPath()
COSINE = CosinePath()
FLOW = FlowPath()
TRIG = TrigPath()
DDPM = DDPMPath()
PATHS: dict[str, Path] = {"edm": EDM, "vp": VP, "cosine": COSINE, "flow": FLOW, "trig": TRIG, "ddpm": DDPM}


def x0_weights(path: Path, predicts: Predicts, u: Time) -> tuple[Tensor, Tensor]:
    """``(c, k)`` with ``x0 = c x_u + k out``: the one conversion table, float64, shaped like ``u``.

    Raises:
        InputError: ``predicts`` is not x0, noise, velocity (``da x0 + db n``) or v (``a n - b x0``).
    """
    return weights_from(path.coeffs(u), predicts)


def weights_from(coeffs: Coeffs, predicts: Predicts) -> tuple[Tensor, Tensor]:
    """:func:`x0_weights` at a time whose coefficients are known.

    Raises:
        InputError: see :func:`x0_weights`.
    """
    a, b, da, db = coeffs
    if predicts == "x0":
        return torch.zeros_like(a), torch.ones_like(a)
    if predicts == "noise":
        return 1 / a, -b / a
    if predicts == "velocity":
        bottom = a * db - b * da
        return db / bottom, -b / bottom
    if predicts == "v":
        bottom = a * a + b * b
        return a / bottom, -b / bottom
    raise unknown("prediction type", predicts, ("x0", "noise", "velocity", "v"))


def to_x0(path: Path, predicts: Predicts, x_u: Tensor, out: Tensor, u: Time) -> Tensor:
    """x0 from what a network printed: ``x_u`` and ``out`` (B, ...), ``u`` a number or (B,), in the dtype of ``x_u``."""
    c, k = x0_weights(path, predicts, u)
    return widen(c, x_u) * x_u + widen(k, x_u) * out.to(x_u.dtype)


def widen(value: Tensor, like: Tensor) -> Tensor:
    """A level or weight of shape (), (B,) or broadcastable, in the dtype of ``like`` and ready to multiply it."""
    if value.ndim == 0:
        return value.to(like.dtype)
    value = value.to(like.device, like.dtype)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim == 1 else value


def path_config(path: Path) -> dict[str, Any]:
    """JSON-able description of a path, for files."""
    kind = next(name for name, base in PATHS.items() if type(base) is type(path))
    return {"kind": kind, **asdict(path)}


def path_from_config(config: Mapping[str, Any]) -> Path:
    """The path that :func:`path_config` described.

    Raises:
        InputError: an unknown kind or parameter.
    """
    fields = dict(config)
    kind = fields.pop("kind", None)
    if kind not in PATHS:
        raise unknown("path", str(kind), PATHS)
    try:
        return PATHS[kind](**fields)
    except TypeError as error:
        raise InputError(f"path {kind!r} cannot take {fields}: {error}") from None
