"""The one noun: a denoiser ``D(x, sigma, cond) -> x0`` with ``x = x0 + sigma n``, and wrappers of it."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.network import build_network, describe_network
from fewstep.core.path import EDM, TRIG, Path, Predicts, as64, path_config, path_from_config, weights_from, widen
from fewstep.errors import InputError, unknown

TimeMap = Literal[
    "native",
    "nearest",
    "sigma",
    "log-sigma/4",
    "log(sigma/2)",
    "250*log(sigma)",
    "native*1000",
    "native*999",
    "vp*999 in float32",
]
# What a network is told of the time, from the path, the native time and the noise level.
TIME_MAPS: dict[str, Callable[[Path, Tensor, Tensor], Tensor]] = {
    "native": lambda path, u, sigma: u,
    "nearest": lambda path, u, sigma: path.nearest(sigma),
    "sigma": lambda path, u, sigma: sigma,
    "log-sigma/4": lambda path, u, sigma: sigma.log() / 4,
    "log(sigma/2)": lambda path, u, sigma: (sigma / 2).log(),
    "250*log(sigma)": lambda path, u, sigma: sigma.log() * 250,
    "native*1000": lambda path, u, sigma: u * 1000,
    "native*999": lambda path, u, sigma: u * 999,
    "vp*999 in float32": lambda path, u, sigma: _vp_time(path, sigma.float()) * 999,
}


def _vp_time(path: Any, sigma: Tensor) -> Tensor:
    """:meth:`VPPath.at` as EDM's VP networks were told it: its rounding is large enough to be seen in their output."""
    grown = path.beta_min**2 + 2 * path.beta_d * (1 + sigma**2).log()
    return (grown.sqrt() - path.beta_min) / path.beta_d


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
    A subclass with another preconditioning overrides :meth:`weights` and registers with :func:`preconditioning`.
    """

    kind: ClassVar[str] = "path"

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
        unit_start: bool = False,
        taps: Mapping[str, str] | None = None,
    ) -> None:
        """``net(x, time, cond)`` maps (B, *shape), (B,) and a condition to (B, *shape).

        ``taps`` names sub-modules of ``net`` whose outputs :meth:`features` can return; by default the network's own
        ``taps``. ``sigma_min`` and ``sigma_max`` bound the levels the network was trained at. ``unit_start`` says that
        the network is used from pure unit noise at ``sigma_max``, as variance-preserving models are: see
        :func:`start_std`.

        Raises:
            InputError: the levels are not 0 < sigma_min < sigma_max < inf, or a name is unknown.
        """
        super().__init__()
        if not 0 < sigma_min < sigma_max < math.inf:
            raise InputError(f"a denoiser needs 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}")
        if time not in TIME_MAPS:
            raise unknown("time map", time, TIME_MAPS)
        weights_from(path.coeffs(path.at(sigma_min)), predicts)
        self.net = net
        self.shape = tuple(shape)
        self.path, self.predicts, self.time = path, predicts, time
        self.scale_in, self.scale_out = scale_in, scale_out
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.unit_start = unit_start
        self.taps = dict(taps if taps is not None else getattr(net, "taps", {}))

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`Denoiser`. The algebra runs in the dtype of ``x``, float32 or wider."""
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        sigma = as64(sigma)
        sigma = sigma.reshape(()) if sigma.numel() == 1 else sigma
        u = self.path.at(sigma)
        on_x, on_out = self.weights(u, sigma)
        a = self.path.coeffs(u).a
        time = TIME_MAPS[self.time](self.path, u, sigma)
        if time.ndim == 0:
            # Adding a number of the host copies nothing: nothing waits for the device, and a graph can capture it.
            time = torch.zeros(len(x), device=x.device) + time
        else:
            time = time.to(x.device, torch.float32).reshape(len(x), -1)[:, 0]
        x_in = (widen(a * self.scale_in, x) * x).to(next(self.net.parameters()).dtype)
        out = self.net(x_in, time, cond or {})
        return widen(on_x, x) * x + widen(on_out, x) * out.to(x.dtype)

    def weights(self, u: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of ``x`` and of the network's output in the estimate, float64, shaped like ``sigma``."""
        coeffs = self.path.coeffs(u)
        c, k = weights_from(coeffs, self.predicts)
        return c * coeffs.a, k * self.scale_out

    def describe(self) -> dict[str, Any]:
        """JSON-able: what :func:`build_precond` makes this denoiser from, with fresh weights."""
        fields = ("shape", "predicts", "time", "scale_in", "scale_out", "sigma_min", "sigma_max", "sigma_data")
        parts: dict[str, Any] = {"net": describe_network(self.net), "path": path_config(self.path)}
        # Written only where they say something, so that older folders keep their fingerprints.
        parts |= {"kind": self.kind} if self.kind != "path" else {}
        parts |= {"unit_start": True} if self.unit_start else {}
        return {**parts, **{name: getattr(self, name) for name in fields}}

    def with_net(self, net: nn.Module) -> Precond:
        """The same preconditioning around another network, with that network's own taps; nothing is copied."""
        made = copy.copy(self)
        made._modules = {**self._modules, "net": net}
        made.taps = dict(getattr(net, "taps", {}))
        return made

    def features(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, taps: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The estimate and the activations at the declared ``taps``, from one forward pass.

        Raises:
            InputError: a tap that the network does not declare.
        """
        with self._tapped(taps) as found:
            return self(x, sigma, cond), found

    def activations(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, taps: Sequence[str]
    ) -> dict[str, Tensor]:
        """The activations at the declared ``taps``; the forward pass ends where the last of them is reached.

        Raises:
            InputError: a tap that the network does not declare.
        """
        with self._tapped(taps, stop=True) as found, contextlib.suppress(_Reached):
            self(x, sigma, cond)
        return found

    @contextlib.contextmanager
    def _tapped(self, taps: Sequence[str], stop: bool = False) -> Iterator[dict[str, Tensor]]:
        """Hooks that fill the mapping as the network runs; with ``stop`` it is left when all are there."""
        found: dict[str, Tensor] = {}
        own = threading.get_ident()

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, args: Any, out: Tensor) -> None:
                # Another thread may run the same network, such as the one that fetches data.
                if threading.get_ident() != own:
                    return
                found[name] = out
                if stop and len(found) == len(set(taps)):
                    raise _Reached

            return hook

        for name in taps:
            if name not in self.taps:
                raise unknown("feature tap", name, self.taps)
        hooks = [self.net.get_submodule(self.taps[t]).register_forward_hook(keep(t)) for t in taps]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


class _Reached(Exception):
    """Ends a forward pass of which nothing more is needed."""


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


PRECONDITIONINGS: dict[str, type[Precond]] = {"path": Precond}
P = TypeVar("P", bound=type[Precond])


def preconditioning(kind: str) -> Callable[[P], P]:
    """Class decorator: a subclass of :class:`Precond` with the same constructor is known to files under ``kind``."""

    def add(cls: P) -> P:
        cls.kind = kind
        PRECONDITIONINGS[kind] = cls
        return cls

    return add


def start_std(D: Denoiser, level: float) -> float:
    """The standard deviation of the pure noise that a sampler starts from at ``level``.

    ``level`` itself, the noise of ``x = x0 + sigma n``; for a model with ``unit_start`` at its ``sigma_max``, what
    makes the network's own input ``x / sqrt(1 + sigma^2)`` unit noise.
    """
    inner = D.inner if isinstance(D, Wrapper) else D
    at_top = level >= (1 - 1e-6) * inner.sigma_max
    return math.hypot(1.0, level) if getattr(inner, "unit_start", False) and at_top else float(level)


def end_scale(D: Denoiser, level: float) -> float:
    """What a result at ``level`` is multiplied by before it is decoded: 1, and 1 for any result at level 0.

    The pipelines of models with ``unit_start`` hand on the network's own state ``x / sqrt(1 + sigma^2)``, also where
    their sampler stops short of 0.
    """
    inner = D.inner if isinstance(D, Wrapper) else D
    return 1 / math.hypot(1.0, level) if getattr(inner, "unit_start", False) else 1.0


def build_precond(description: Mapping[str, Any]) -> Precond:
    """The denoiser that :meth:`Precond.describe` described, with fresh weights.

    Raises:
        InputError: an unknown network or path, or fields that do not belong.
    """
    fields = dict(description)
    kind = fields.pop("kind", "path")
    if kind not in PRECONDITIONINGS:
        raise unknown("preconditioning", str(kind), PRECONDITIONINGS)
    try:
        net, path = build_network(fields.pop("net")), path_from_config(fields.pop("path"))
        return PRECONDITIONINGS[kind](net, fields.pop("shape"), path=path, **fields)
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

    @classmethod
    def rebuilt(cls, denoiser: Denoiser, fields: Mapping[str, Any], conds: Any) -> Wrapper:
        """From what :meth:`describe` told of this wrapper's own numbers, around ``denoiser``."""
        return cls(denoiser, **fields)

    @property
    def inner(self) -> Denoiser:
        """What lies under all wrappers."""
        return self.denoiser.inner if isinstance(self.denoiser, Wrapper) else self.denoiser

    def describe(self) -> dict[str, Any]:
        """JSON-able: this wrapper's own numbers and what it wraps."""
        plain = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str)}
        of = self.denoiser.describe() if isinstance(self.denoiser, Precond | Wrapper) else type(self.denoiser).__name__
        return {"wrapper": type(self).__name__, **plain, "of": of}


W = TypeVar("W", bound=type[Wrapper])
WRAPPERS: dict[str, type[Wrapper]] = {}


def wrapper(cls: W) -> W:
    """Class decorator: files may hold this wrapper; its ``rebuilt(D, fields, conds)`` makes it from its description."""
    WRAPPERS[cls.__name__] = cls
    return cls


def unsaved(D: Denoiser) -> str | None:
    """The first wrapper around a denoiser that files cannot hold, by name."""
    while isinstance(D, Wrapper):
        if type(D).__name__ not in WRAPPERS:
            return type(D).__name__
        D = D.denoiser
    return None


def build_denoiser(description: Mapping[str, Any], conds: Any = None) -> Denoiser:
    """The denoiser that ``describe`` described, wrappers and all, with fresh weights.

    ``conds`` are the generator's conditions, which guidance takes its null values from.

    Raises:
        InputError: an unknown wrapper, network or path, or fields that do not belong.
    """
    if "wrapper" not in description:
        return build_precond(description)
    fields = dict(description)
    kind, of = str(fields.pop("wrapper")), fields.pop("of", None)
    if kind not in WRAPPERS:
        raise unknown("wrapper of a denoiser", kind, WRAPPERS)
    if not isinstance(of, Mapping):
        raise InputError(f"the description of a {kind} lacks what it wraps")
    try:
        return WRAPPERS[kind].rebuilt(build_denoiser(of, conds), fields, conds)
    except (KeyError, TypeError) as error:
        raise InputError(f"the description of a {kind} is incomplete or has unknown fields: {error}") from None


def rewrapped(D: Denoiser, inner: Denoiser) -> Denoiser:
    """``inner`` within the wrappers that stand around ``D``."""
    if not isinstance(D, Wrapper):
        return inner
    made = copy.copy(D)
    made.denoiser = rewrapped(D.denoiser, inner)
    return made


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
