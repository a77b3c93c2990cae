"""A teacher as a role: the denoiser with all that is wrapped around it, as one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from fewstep.core.cond import Cond, Nulls
from fewstep.core.denoiser import Denoiser, Precond, Wrapper, module_of, rewrapped
from fewstep.errors import InputError


def network_under(D: Denoiser) -> Precond:
    """What a student is copied from: the network without guidance or other wrappers.

    Raises:
        InputError: there is none.
    """
    found = module_of(D)
    if not isinstance(found, Precond):
        raise InputError(f"{type(found or D).__name__} has no weights to train: expected a Precond, guided or not")
    return found


def frozen(D: Denoiser) -> nn.Module:
    """The denoiser as a module that a run holds as its teacher; guidance around it stays.

    Raises:
        InputError: there is no network under it.
    """
    if isinstance(D, Wrapper):
        return Frozen(D)
    if not isinstance(D, nn.Module):
        raise InputError(f"{type(D).__name__} has no weights to train: expected a torch module")
    return D


def nulls_of(D: Any) -> Nulls | None:
    """The null values that guidance around ``D`` uses, for dropping conditions; None where only labels have one.

    Made once where guidance makes them when they are first needed.
    """
    D = D.wrapper if isinstance(D, Frozen) else D
    while isinstance(D, Wrapper):
        own: Any = getattr(D, "nulls", None)
        if callable(own):
            own = own()
            D.nulls = own  # type: ignore[attr-defined]
        if own is not None:
            return cast(Nulls, own)
        D = D.denoiser
    return None


class Frozen(nn.Module):
    """A wrapped denoiser as a module, whose weights are those of the network under it."""

    def __init__(self, wrapper: Wrapper) -> None:
        super().__init__()
        self.network = network_under(wrapper)
        self.wrapper = wrapper
        self.shape, self.sigma_data = wrapper.shape, wrapper.sigma_data
        self.sigma_min, self.sigma_max = wrapper.sigma_min, wrapper.sigma_max
        self.path, self.predicts = self.network.path, self.network.predicts
        self.unit_start = self.network.unit_start

    @property
    def taps(self) -> Mapping[str, str]:
        """Those of the network."""
        return self.network.taps

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        if module_of(self.wrapper) is not self.network:
            # Offloading puts another network here.
            self.wrapper = cast(Wrapper, rewrapped(self.wrapper, self.network))
        return self.wrapper(x, sigma, cond)

    def features(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, taps: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Those of the network, without what is wrapped around it."""
        found: Any = self.network.features(x, sigma, cond, taps)
        return cast(tuple[Tensor, dict[str, Tensor]], found)
