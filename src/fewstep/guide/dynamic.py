"""Dynamic guidance: a scale that depends on the noise level, full below one time and none above another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Cond, Nulls, cat, null
from fewstep.core.denoiser import Denoiser, Wrapper, wrapper
from fewstep.core.path import widen
from fewstep.core.pipeline import TextConditions
from fewstep.errors import InputError
from fewstep.grid.own import own_shares

SCALE = "scale"


@wrapper
class DynamicGuidance(Wrapper):
    """Guidance of ``scale`` at low noise and none at high noise (arXiv 2406.14539; 2404.13040 without distillation).

    At shares of the denoiser's own time (:mod:`fewstep.grid.own`) up to ``full`` the scale is ``scale``, from ``none``
    on it is 1, and it is linear in between; ``full = none`` switches at once, guided up to and including ``full``. The
    published values are 0.7 and 0.8. With ``told`` the network is told the scale as ``cond["scale"]``, in one
    evaluation; otherwise the estimate is ``D(x, null) + s (D(x, cond) - D(x, null))``, which costs a second one where
    the scale is not 1.

    Raises:
        InputError: a scale that is negative or not finite, or shares that are not 0 <= full <= none <= 1.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float,
        full: float = 0.7,
        none: float = 0.8,
        told: bool = False,
        nulls: Nulls | Callable[[], Nulls] | None = None,
    ) -> None:
        super().__init__(denoiser)
        if not 0 <= scale < float("inf"):
            raise InputError(f"guidance needs a scale >= 0 (1 is none), got {scale!r}")
        if not 0 <= full <= none <= 1:
            raise InputError(f"dynamic guidance needs shares 0 <= full <= none <= 1, got {full} and {none}")
        self.scale, self.full, self.none, self.told, self.nulls = float(scale), float(full), float(none), told, nulls

    @classmethod
    def rebuilt(cls, denoiser: Denoiser, fields: Mapping[str, Any], conds: Any) -> DynamicGuidance:
        """See :meth:`Wrapper.rebuilt`: the null values are those of the generator's own conditions."""
        nulls = (lambda: dict(conds.nulls(""))) if isinstance(conds, TextConditions) else None
        known = {k: fields[k] for k in ("scale", "full", "none", "told")}
        return cls(denoiser, **known, nulls=nulls)

    def scale_at(self, sigma: Tensor | float) -> Tensor:
        """The scale at levels ``sigma``, float64, of their shape."""
        share = own_shares(self, sigma)
        if self.full == self.none:
            # A level that stands for the share itself must not fall to the other side by its rounding.
            part = (share <= self.full + 1e-9).to(share)
        else:
            part = ((self.none - share) / (self.none - self.full)).clamp(0, 1)
        return 1 + (self.scale - 1) * part

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        if not cond:
            return self.denoiser(x, sigma, cond)
        scale = self.scale_at(sigma)
        if self.told:
            own = scale.reshape(-1).to(x.device, torch.float32).expand(len(x))
            return self.denoiser(x, sigma, {SCALE: own, **cond})
        # A sampler's levels lie on the host, where looking at one waits for nothing.
        if scale.numel() == 1 and scale.device.type == "cpu" and float(scale) == 1:
            return self.denoiser(x, sigma, cond)
        if callable(self.nulls):
            self.nulls = self.nulls()
        return guided_at(self.denoiser, x, sigma, cond, scale.reshape(-1).to(x.device), self.nulls)


def guided_at(
    D: Denoiser, x: Tensor, sigma: Tensor | float, cond: Cond, scale: Tensor, nulls: Nulls | None = None
) -> Tensor:
    """Classifier-free guidance with a scale of its own for each sample: ``scale`` (B,) or (1,).

    ``x`` (B, ...) at ``sigma``; both estimates come from one batch of twice the size, without a condition first.

    Raises:
        InputError: a condition without a null value.
    """
    if isinstance(sigma, Tensor) and sigma.ndim and len(sigma) == len(x):
        sigma = torch.cat([sigma, sigma])
    both = D(torch.cat([x, x]), sigma, cat([null(cond, nulls), dict(cond)]))
    free, own = both.chunk(2)
    return torch.lerp(free, own, widen(scale, free).expand_as(free))
