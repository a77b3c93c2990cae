"""What a training method is made of: roles, optimizers and averages as values, updates as closures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from fewstep.core.cond import Batch
from fewstep.core.noise import Noise
from fewstep.errors import InputError

Losses = Tensor | Mapping[str, Tensor]
Decay = Literal["constant", "cosine", "linear", "drop"]


@dataclass(frozen=True)
class Optim:
    """Adam with decoupled weight decay, and how its learning rate runs.

    Attributes:
        lr: peak learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per step and unit of lr.
        clip: largest gradient norm; None clips nothing.
        warmup: steps of linear warm-up.
        decay: after it: constant, cosine to 0, linear to 0, or drop to a tenth at half of the budget.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    warmup: int = 0
    decay: Decay = "constant"

    def __post_init__(self) -> None:
        if not self.lr > 0 or (self.clip is not None and not self.clip > 0) or self.warmup < 0:
            raise InputError(f"an optimizer needs lr > 0, clip > 0 and warmup >= 0, got {self}")
        if self.decay not in ("constant", "cosine", "linear", "drop"):
            raise InputError(f"unknown decay {self.decay!r}: choose constant, cosine, linear or drop")

    def rate(self, step: int, progress: float) -> float:
        """The learning rate at ``step`` (0, 1, ...) when the share ``progress`` of the budget is spent."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        left = max(0.0, 1.0 - progress)
        shape = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
            "linear": left,
            "drop": 1.0 if left > 0.5 else 0.1,
        }
        return self.lr * warm * shape[self.decay]


@dataclass(frozen=True)
class Ema:
    """A running average of a role's weights.

    ``rate`` is the constant decay per step (0.999 averages about a thousand steps). ``power`` instead averages over a
    fixed *share* of the run: 0.1 is a relative standard deviation of 10 % (power function, arXiv 2312.02696).
    """

    rate: float | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.power is None):
            raise InputError(f"an average has either a rate or a power, got {self}")
        if self.rate is not None and not 0 <= self.rate < 1:
            raise InputError(f"the rate of an average must be in [0, 1), got {self.rate}")
        if self.power is not None and not 0 < self.power < 0.28:
            raise InputError(f"the relative width of a power average must be in (0, 0.28), got {self.power}")

    def decay(self, step: int, progress: float = 0.0) -> float:
        """The weight of the old average at ``step`` (0, 1, ...) when the share ``progress`` of the budget is spent."""
        if self.rate is not None:
            # The usual ramp: a young average must not remember its random start.
            return min(self.rate, (1 + step) / (10 + step))
        return (1 - 1 / (step + 1)) ** (_exponent(self.power) + 1)


# Asked for in every step.
@lru_cache
def _exponent(power: float | None) -> float:
    """The exponent whose power function has this relative standard deviation: solves a monotone cubic."""
    assert power is not None
    low, high = 0.0, 1e6
    for _ in range(200):
        mid = (low + high) / 2
        width = math.sqrt((mid + 1) / ((mid + 2) ** 2 * (mid + 3)))
        low, high = (mid, high) if width > power else (low, mid)
    return low


@dataclass(frozen=True)
class Role:
    """One network of a method.

    Attributes:
        start: makes the network, once, when training starts or resumes.
        optim: how it is trained; None keeps it frozen.
        ema: the average that is kept of it.
        target: another average, that the method's targets are made with.
        ships: whether it is (through its average, if it has one) what training is for.
    """

    start: Callable[[], nn.Module]
    optim: Optim | None = None
    ema: Ema | None = None
    target: Ema | None = None
    ships: bool = False

    def averages(self, name: str) -> dict[str, Ema]:
        """What is averaged of the role ``name``, by the name that the average has in a run."""
        kept = {name: self.ema, f"{name}.target": self.target}
        return {key: average for key, average in kept.items() if average is not None}


class Update(NamedTuple):
    """One optimizer step of ``role``: ``loss()`` is called with that role alone open for gradients.

    Attributes:
        role: the roles that step.
        loss: the objective, all of it with one graph.
        parts: the same in pieces, whose losses and gradients add up to those of ``loss``. Where there are any they run
            in its place, each with its backward pass before the next is called, so that one graph is held at a time.
    """

    role: str | tuple[str, ...]
    loss: Callable[[], Losses]
    parts: tuple[Callable[[], Losses], ...] = ()

    @classmethod
    def of(cls, role: str | tuple[str, ...], *parts: Callable[[], Losses]) -> Update:
        """The update whose objective is the sum of ``parts``, each as in :class:`Update`; they run in their order."""
        return cls(role, lambda: added([part() for part in parts]), parts)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that step."""
        return (self.role,) if isinstance(self.role, str) else self.role


def named(losses: Losses) -> dict[str, Tensor]:
    """Losses by their name; a lone tensor is the ``loss``."""
    return {"loss": losses} if isinstance(losses, Tensor) else dict(losses)


def added(parts: Iterable[Losses]) -> dict[str, Tensor]:
    """The sums of what has the same name in several parts."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in named(part).items():
            total[name] = total[name] + value if name in total else value
    return total


def portions(
    loss: Callable[[slice], Mapping[str, Tensor]], size: int, count: int
) -> tuple[Callable[[], dict[str, Tensor]], ...]:
    """A loss over ``size`` samples as at most ``count`` parts, for :class:`Update`.

    ``loss(samples)`` is made of means over those samples; each is weighted by the part's share of all. The parts are
    as even as can be, and none is empty.
    """
    count = min(size, count)
    edges = [-(-size * k // count) for k in range(count + 1)]

    def weighted(a: int, b: int) -> dict[str, Tensor]:
        return {name: (b - a) / size * value for name, value in loss(slice(a, b)).items()}

    return tuple(partial(weighted, a, b) for a, b in itertools.pairwise(edges))


class Models:
    """The live networks of a run: ``m.student``, ``m.fake``; ``m.ema("student")`` is an average.

    ``m.progress`` in [0, 1] is the share of the budget that is spent, which curricula follow; ``m.seed`` is the run's.
    """

    def __init__(
        self, roles: Mapping[str, Role], networks: Mapping[str, nn.Module], averages: Mapping[str, nn.Module]
    ) -> None:
        self.roles = dict(roles)
        self.networks = dict(networks)
        self.averages = dict(averages)
        self.progress = 0.0
        self.seed = 0

    def __getattr__(self, name: str) -> Any:
        networks = self.__dict__.get("networks", {})
        if name not in networks:
            raise AttributeError(f"this run has no role {name!r}, only {sorted(networks)}")
        return networks[name]

    def ema(self, role: str) -> Any:
        """The average of a role, or the role itself if it keeps none."""
        return self.averages.get(role, self.networks[role])

    def common(self, i: int) -> Noise:
        """One source for iteration ``i``: for draws that all samples, micro-batches and processes must share."""
        return Noise.of(self.seed, 1).fold("common", i)

    def target(self, role: str) -> Any:
        """The average that targets are made with, or the role itself if it keeps none."""
        return self.averages.get(f"{role}.target", self.networks[role])


class Method(Protocol):
    """A frozen dataclass of hyper-parameters with one generator; one yield is one optimizer step.

    ``step`` runs with every role frozen; only inside an Update's ``loss`` is a role open. A yield must not stand inside
    a grad-mode or autocast context. Three things are optional: ``run(teacher, data, out=, budget=, **options)`` is a
    whole distillation of several stages, ``ships(network)`` the denoiser that a trained network is shipped as, and
    ``check(teacher, data)`` refuses data before anything is spent.
    """

    needs_data: ClassVar[bool]

    def roles(self, teacher: Any) -> dict[str, Role]:
        """The networks, by name."""
        ...

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The updates of iteration ``i`` on one micro-batch."""
        ...

    def sampler(self, teacher: Any) -> Any:
        """How the shipped network is meant to be used."""
        ...
