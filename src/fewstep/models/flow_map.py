"""Two-time students: from a point at level t to where the trajectory is at level s, in one evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser, Precond, Wrapper, wrapper
from fewstep.core.path import widen
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.models.extended import extended

UNTIL = "until"


class FlowMap(Protocol):
    """A denoiser that reads the level where its step ends, ``cond["until"]`` (B,), between 0 and its own level.

    ``g(x, t, s)`` is the x0 with which one step of DDIM from t lands where the trajectory is at s (arXiv 2310.02279,
    eq. 5). At ``s = t`` that is the denoiser itself.
    """

    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    sigma_data: float

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        ...


def flow_map(denoiser: Precond) -> Precond:
    """The denoiser as a :class:`FlowMap`, which starts as the denoiser whatever ``until`` is.

    Raises:
        InputError: see :class:`fewstep.models.extended.Extended`.
    """
    return extended(denoiser, UNTIL)


def jump(g: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
    """``G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)`` (arXiv 2310.02279, eq. 5), exactly ``x`` at ``s = t``.

    ``x`` (B, ...) at levels ``t`` (B,) > 0; ``s`` (B,) in [0, t].
    """
    x0 = g(x, t, {**(cond or {}), UNTIL: s})
    return torch.lerp(x0.to(x.dtype), x, widen(s / t, x))


@wrapper
class Told(Wrapper):
    """A denoiser that is told a number at every call: the same one, or one for each of a sampler's levels.

    ``levels`` are those at which it is called, and ``values`` what it is told there as ``cond[name]``; a call at
    another level gets the value of the nearest. One value without levels is told everywhere. What the caller says
    itself is kept.

    Raises:
        InputError: values that are not one, and not one for each level.
    """

    def __init__(self, denoiser: Denoiser, name: str, values: Sequence[float], levels: Sequence[float] = ()) -> None:
        super().__init__(denoiser)
        if len(values) != max(1, len(levels)):
            raise InputError(f"{name} needs one value, or one for each of {len(levels)} levels, got {len(values)}")
        self.name, self.values, self.levels = name, [*map(float, values)], [*map(float, levels)]
        # Tables on each device that asked, because a copy there in every step would wait for the host.
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        own = dict(cond or {})
        if self.name not in own:
            value, known = self._on(x.device)
            if self.levels:
                at = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1)
                value = value[(at.log() - known).abs().argmin(1)]
            own[self.name] = value.expand(len(x))
        return self.denoiser(x, sigma, own)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The values, and the logarithms of the levels."""
        if device not in self._tables:
            levels = torch.tensor(self.levels, dtype=torch.float64)
            self._tables[device] = torch.tensor(self.values, device=device), levels.log().to(device)
        return self._tables[device]

    def describe(self) -> dict[str, Any]:
        """See :meth:`fewstep.core.denoiser.Wrapper.describe`."""
        return {**super().describe(), "values": self.values, "levels": self.levels}

    @classmethod
    def rebuilt(cls, denoiser: Denoiser, fields: Mapping[str, Any], conds: Any) -> Told:
        """See :meth:`fewstep.core.denoiser.Wrapper.rebuilt`."""
        return cls(denoiser, str(fields["name"]), fields["values"], fields["levels"])


def landing(g: Denoiser, table: Tableau, least: float = 0.0) -> Told:
    """A flow map that is told where each step of ``table`` ends, so that any sampler of single steps can use it.

    Where a step goes on with fresh noise, that is the level which it comes down to before the noise: ``P a`` in a row
    ``P x + (1 - P) D``. ``least`` is the lowest level that the flow map knows; a step to below it is told that.

    Raises:
        InputError: a sampler whose steps need more than their own point and output.
    """
    rows = [k for k in range(table.rows) if not bool(table.sigmas[k].isnan())]
    single = table.rows == len(rows) and not (table.P[:, 1:].any() or table.W[:, 1:].any() or table.Z[:, 1:].any())
    if not single or float((table.P[:, 0] + table.W[:, 0] - 1).abs().max()) > 1e-9:
        raise InputError(
            f"sampler {table.name!r} cannot tell a flow map where its steps end: expected single steps, such as those "
            "of euler, consistency or tcd"
        )
    ends = [max(least, float(table.P[k, 0] * table.sigmas[k])) for k in rows]
    return Told(g, UNTIL, ends, [float(table.sigmas[k]) for k in rows])


@wrapper
class Clipped(Wrapper):
    """A denoiser whose estimates are kept within [-``limit``, ``limit``], as few-step samplers of TDD do.

    Raises:
        InputError: a limit that is not positive and finite.
    """

    def __init__(self, denoiser: Denoiser, limit: float) -> None:
        super().__init__(denoiser)
        if not 0 < limit < math.inf:
            raise InputError(f"x0 is clipped to a positive limit, got {limit}")
        self.limit = float(limit)

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        return self.denoiser(x, sigma, cond).clamp(-self.limit, self.limit)

    @classmethod
    def rebuilt(cls, denoiser: Denoiser, fields: Mapping[str, Any], conds: Any) -> Clipped:
        """See :meth:`fewstep.core.denoiser.Wrapper.rebuilt`."""
        return cls(denoiser, fields["limit"])
