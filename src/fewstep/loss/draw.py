"""Training noise levels: a draw returns each level together with its weight, because neither means much alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fewstep.core.noise import Noise
from fewstep.errors import InputError


class Draw(Protocol):
    """A density over noise levels and the weight of the squared x0 error at each."""

    def __call__(self, noise: Noise, sigma_data: float) -> tuple[Tensor, Tensor]:
        """``(sigma, weight)``, both (B,) float32."""
        ...


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2``: unit loss at the start (arXiv 2206.00364, table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


@dataclass(frozen=True)
class LogNormal:
    """``ln sigma ~ N(mean, std^2)`` with EDM's weight (arXiv 2206.00364, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise InputError(f"a log-normal draw needs std > 0, got {self.std}")

    def __call__(self, noise: Noise, sigma_data: float) -> tuple[Tensor, Tensor]:
        """See :class:`Draw`."""
        sigma = (noise.normal((), "sigma") * self.std + self.mean).exp()
        return sigma, edm_weight(sigma, sigma_data)


@dataclass(frozen=True)
class KarrasUniform:
    """Uniform in Karras' coordinate ``sigma^(1/rho)``, over the share [``bottom``, ``top``], where 0 is the data."""

    top: float = 0.8
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    bottom: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.bottom < self.top <= 1 or not 0 < self.sigma_min < self.sigma_max:
            raise InputError(f"a Karras draw needs 0 <= bottom < top <= 1 and 0 < sigma_min < sigma_max, got {self}")

    def __call__(self, noise: Noise, sigma_data: float) -> tuple[Tensor, Tensor]:
        """See :class:`Draw`; the weight is 1."""
        u = self.bottom + noise.uniform((), "sigma") * (self.top - self.bottom)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = (low + u * (high - low)) ** self.rho
        return sigma, sigma.new_ones(len(sigma))


@dataclass(frozen=True)
class FlowTime:
    """``t = sigma / (1 + sigma)``, uniform in [0, 1) or logit-normal, with the weight of the velocity's square error.

    An error ``e`` of x0 is an error ``e / t`` of the velocity ``n - x0`` (arXiv 2209.03003), so the weight is
    ``t^-2``. ``mean`` and ``std`` are those of ``ln sigma = logit t`` (arXiv 2403.03206, eq. 19); None is uniform.
    ``least`` <= t <= 1 - ``least``.
    """

    mean: float | None = None
    std: float = 1.0
    least: float = 1e-4

    def __post_init__(self) -> None:
        if not self.std > 0 or not 0 < self.least < 0.5:
            raise InputError(f"a draw of flow times needs std > 0 and 0 < least < 0.5, got {self}")

    def __call__(self, noise: Noise, sigma_data: float) -> tuple[Tensor, Tensor]:
        """See :class:`Draw`."""
        if self.mean is None:
            t = noise.uniform((), "sigma")
        else:
            t = (noise.normal((), "sigma") * self.std + self.mean).sigmoid()
        t = t.clamp(self.least, 1 - self.least)
        return t / (1 - t), t**-2
