"""Consistency functions: denoisers that are the identity at their lowest level, made from those that are not."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fewstep.core.denoiser import Precond, preconditioning
from fewstep.core.path import TrigPath
from fewstep.errors import InputError
from fewstep.models.lora import Shared, share


@preconditioning("consistency")
class ConsistencyPrecond(Precond):
    """EDM's preconditioning moved so that the denoiser is the identity at ``sigma_min`` (arXiv 2303.01469, app. C).

    ``D = c_skip x + c_out net(c_in x)`` with ``c_skip = d^2 / ((sigma - m)^2 + d^2)``, ``c_out = (sigma - m) d / r``,
    ``c_in = 1 / r``, ``r^2 = sigma^2 + d^2``, ``d = sigma_data`` and ``m = sigma_min``; ``m = 0`` is EDM's. The path
    and the scales must be those of :func:`fewstep.core.denoiser.edm`, which give ``c_in``: see :func:`anchored`.
    """

    def weights(self, u: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`fewstep.core.denoiser.Precond.weights`."""
        m, d = self.sigma_min, self.sigma_data
        return d * d / ((sigma - m) ** 2 + d * d), (sigma - m) * d / (sigma**2 + d * d).sqrt()


@preconditioning("consistency-jump")
class JumpPrecond(Precond):
    """Any preconditioning made the identity at ``m = sigma_min``: ``(m / sigma) x + (1 - m / sigma) D(x, sigma)``.

    This is Euler's step from ``sigma`` to ``m`` (the jump of arXiv 2310.02279 with its end held at ``m``), so
    a teacher's weights start as the teacher's own one-step sampler, whatever its path and prediction.
    """

    def weights(self, u: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`fewstep.core.denoiser.Precond.weights`."""
        on_x, on_out = super().weights(u, sigma)
        kept = self.sigma_min / sigma
        return kept + (1 - kept) * on_x, (1 - kept) * on_out


def anchored(denoiser: nn.Module, sigma_min: float) -> Precond:
    """A consistency function on the same network, the identity at ``sigma_min`` (> 0, in units of the data).

    In EDM's preconditioning it is a :class:`ConsistencyPrecond`, in any other a :class:`JumpPrecond`. The weights are
    shared: copy it before it is trained. What :func:`fewstep.models.lora.share` made stays shared.

    Raises:
        InputError: no Precond, a preconditioning of its own kind, or ``sigma_min`` not below the top level.
    """
    if not isinstance(denoiser, Precond) or denoiser.kind not in ("path", "consistency", "consistency-jump"):
        kind = denoiser.kind if isinstance(denoiser, Precond) else type(denoiser).__name__
        raise InputError(f"no consistency function can be made of a {kind}: expected a Precond on a path")
    # A jump of a consistency function would be the identity twice; such a teacher keeps its formula, at the new level.
    kept = {"consistency": ConsistencyPrecond, "consistency-jump": JumpPrecond}.get(denoiser.kind)
    made = (kept or (ConsistencyPrecond if is_edm(denoiser) else JumpPrecond))(
        denoiser.net,
        denoiser.shape,
        path=denoiser.path,
        predicts=denoiser.predicts,
        time=denoiser.time,
        scale_in=denoiser.scale_in,
        scale_out=denoiser.scale_out,
        sigma_min=sigma_min,
        sigma_max=denoiser.sigma_max,
        sigma_data=denoiser.sigma_data,
        unit_start=denoiser.unit_start,
        taps=denoiser.taps,
    ).train(denoiser.training)
    return share(made, denoiser.lora) if isinstance(denoiser, Shared) else made


def is_edm(denoiser: Precond) -> bool:
    """Whether the path and the scales are those of :func:`fewstep.core.denoiser.edm`."""
    path, d = denoiser.path, denoiser.sigma_data
    if not isinstance(path, TrigPath) or denoiser.predicts != "velocity":
        return False
    pairs = ((path.scale, d), (denoiser.scale_in, 1 / d), (denoiser.scale_out, -d))
    return all(math.isclose(own, published) for own, published in pairs)
