"""The one noun: a denoiser ``D(x, sigma, cond) -> x0`` with ``x = x0 + sigma n``, and wrappers of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.network import build_network, describe_network
from fewstep.core.path import EDM, TRIG, Path, Predicts, as64, path_config, path_from_config, widen, x0_weights
from fewstep.errors import InputError, unknown

TimeMap = Literal["native", "sigma", "log-sigma/4", "native*1000", "native*999"]
TIME_MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "native": lambda u, sigma: u,
    "sigma": lambda u, sigma: sigma,
    "log-sigma/4": lambda u, sigma: sigma.log() / 4,
    "native*1000": lambda u, sigma: u * 1000,
    "native*999": lambda u, sigma: u * 999,
}


class Denoiser(Protocol):
    """What solvers, guidance, methods and metrics know of a model, and all they know."""

    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    sigma_data: float

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """The estimate of E[x0 | x] for ``x`` (B, *shape) at ``sigma``, which broadcasts: (), (B,) or (B, 1, 1, 1)."""
        ...


class Precond(nn.Module):
    """A raw network made a denoiser by its path, what it predicts and how it is told the time.

    ``x_u = a x`` goes in times ``scale_in``; ``scale_out`` times the output is the prediction. EDM's preconditioning
    (arXiv 2206.00364, eq. 7) is the velocity of the path ``TRIG(sigma_data)`` with the sign turned: see :func:`edm`.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        *,
        path: Path = EDM,
        predicts: Predicts = "x0",
        time: TimeMap = "native",
        scale_in: float = 1.0,
        scale_out: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        taps: Mapping[str, str] | None = None,
    ) -> None:
        """``net(x, time, cond)`` maps (B, *shape), (B,) and a condition to (B, *shape).

        ``taps`` names sub-modules of ``net`` whose outputs :meth:`features` can return; by default the network's own
        ``taps``. ``sigma_min`` and ``sigma_max`` bound the levels the network was trained at.

        Raises:
            InputError: the levels are not 0 < sigma_min < sigma_max < inf, or a name is unknown.
        """
        super().__init__()
        if not 0 < sigma_min < sigma_max < math.inf:
            raise InputError(f"a denoiser needs 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}")
        if time not in TIME_MAPS:
            raise unknown("time map", time, TIME_MAPS)
        x0_weights(path, predicts, path.at(sigma_min))
        self.net = net
        self.shape = tuple(shape)
        self.path, self.predicts, self.time = path, predicts, time
        self.scale_in, self.scale_out = scale_in, scale_out
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.taps = dict(taps if taps is not None else getattr(net, "taps", {}))

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`Denoiser`. The algebra runs in the dtype of ``x``, float32 or wider."""
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        sigma = as64(sigma)
        sigma = sigma.reshape(()) if sigma.numel() == 1 else sigma
        u = self.path.at(sigma)
        c, k = x0_weights(self.path, self.predicts, u)
        a = self.path.coeffs(u).a
        time = TIME_MAPS[self.time](u, sigma)
        if time.ndim == 0:
            # Adding a number of the host copies nothing: nothing waits for the device, and a graph can capture it.
            time = torch.zeros(len(x), device=x.device) + time
        else:
            time = time.to(x.device, torch.float32).reshape(len(x), -1)[:, 0]
        x_in = (widen(a * self.scale_in, x) * x).to(next(self.net.parameters()).dtype)
        out = self.net(x_in, time, cond or {})
        return widen(c * a, x) * x + widen(k * self.scale_out, x) * out.to(x.dtype)

    def describe(self) -> dict[str, Any]:
        """JSON-able: what :func:`build_precond` makes this denoiser from, with fresh weights."""
        fields = ("shape", "predicts", "time", "scale_in", "scale_out", "sigma_min", "sigma_max", "sigma_data")
        parts = {"net": describe_network(self.net), "path": path_config(self.path)}
        return {**parts, **{name: getattr(self, name) for name in fields}}

    def features(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, taps: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The estimate and the activations at the declared ``taps``, from one forward pass.

        Raises:
            InputError: a tap that the network does not declare.
        """
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda module, args, out: found.__setitem__(name, out)

        for name in taps:
            if name not in self.taps:
                raise unknown("feature tap", name, self.taps)
        hooks = [self.net.get_submodule(self.taps[t]).register_forward_hook(keep(t)) for t in taps]
        try:
            return self(x, sigma, cond), found
        finally:
            for hook in hooks:
                hook.remove()


def edm(net: nn.Module, shape: Sequence[int], *, sigma_data: float = 0.5, **options: Any) -> Precond:
    """EDM's preconditioning: c_skip, c_out, c_in and c_noise = ln(sigma)/4 of arXiv 2206.00364, table 1."""
    return Precond(
        net,
        shape,
        path=TRIG(sigma_data),
        predicts="velocity",
        time="log-sigma/4",
        scale_in=1 / sigma_data,
        scale_out=-sigma_data,
        sigma_data=sigma_data,
        **options,
    )


def build_precond(description: Mapping[str, Any]) -> Precond:
    """The denoiser that :meth:`Precond.describe` described, with fresh weights.

    Raises:
        InputError: an unknown network or path, or fields that do not belong.
    """
    fields = dict(description)
    try:
        net, path = build_network(fields.pop("net")), path_from_config(fields.pop("path"))
        return Precond(net, fields.pop("shape"), path=path, **fields)
    except (KeyError, TypeError) as error:
        raise InputError(f"the description of a denoiser is incomplete or has unknown fields: {error}") from None


class Wrapper:
    """Base of ``Denoiser -> Denoiser`` wrappers: passes on the shape and the levels of what it wraps."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.shape = denoiser.shape
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.sigma_data = getattr(denoiser, "sigma_data", 0.5)

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`Denoiser`."""
        return self.denoiser(x, sigma, cond)

    @property
    def inner(self) -> Denoiser:
        """What lies under all wrappers."""
        return self.denoiser.inner if isinstance(self.denoiser, Wrapper) else self.denoiser

    def describe(self) -> dict[str, Any]:
        """JSON-able: this wrapper's own numbers and what it wraps."""
        plain = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str)}
        of = self.denoiser.describe() if isinstance(self.denoiser, Precond | Wrapper) else type(self.denoiser).__name__
        return {"wrapper": type(self).__name__, **plain, "of": of}


def module_of(D: Denoiser) -> nn.Module | None:
    """The network under all wrappers, or None for a denoiser without one."""
    inner = D.inner if isinstance(D, Wrapper) else D
    return inner if isinstance(inner, nn.Module) else None


class CountingDenoiser(Wrapper):
    """Counts its calls in ``nfe`` and the pictures they carried in ``images``: the honest cost of a sampler."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.nfe = 0
        self.images = 0

    @property
    def taps(self) -> Mapping[str, str]:
        """Those of what it counts."""
        return getattr(self.denoiser, "taps", {})

    def features(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, taps: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Precond.features`; one call more.

        Raises:
            InputError: what it counts has no features.
        """
        if not isinstance(self.denoiser, Precond | CountingDenoiser):
            raise InputError(f"{type(self.denoiser).__name__} has no features to read")
        self.nfe += 1
        self.images += len(x)
        return self.denoiser.features(x, sigma, cond, taps)

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`Denoiser`."""
        self.nfe += 1
        self.images += len(x)
        return self.denoiser(x, sigma, cond)
