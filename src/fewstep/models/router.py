"""Several networks as one, each sample through that of its class (arXiv 2410.23274); and networks made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond, take
from fewstep.core.denoiser import Precond
from fewstep.core.network import build_network, describe_network, network
from fewstep.errors import InputError

# What the networks here call the number that their size grows with, and what it must be a multiple of.
SIZES, UNIT = ("channels", "width"), 8


@dataclass(frozen=True)
class RoutedConfig:
    """Which networks there are, and which class goes to which.

    Attributes:
        nets: the descriptions of the networks.
        routes: the number of the network of every class.

    Raises:
        InputError: a class without a network, or a network without a class.
    """

    nets: tuple[dict[str, Any], ...]
    routes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "routes", tuple(self.routes))
        check_routes(self.routes, len(self.nets))


def check_routes(routes: Sequence[int], count: int) -> None:
    """Raises InputError unless every class has one of ``count`` networks, and every network a class."""
    wrong = [k for k in routes if not 0 <= k < count]
    if wrong or not routes or count < 1:
        raise InputError(f"routes need for every class the number of a network, 0 to {count - 1}, got {tuple(routes)}")
    idle = sorted(set(range(count)) - set(routes))
    if idle:
        raise InputError(f"network {idle[0]} of {count} has no class: every network needs one, got {tuple(routes)}")


@network("routed", RoutedConfig)
class Routed(nn.Module):
    """Each sample through the one network of its class, so that a picture costs what one network costs.

    The samples of a network are gathered, run as one batch and put back; how many there are is known to the host only
    after it has waited for the device, once a call.
    """

    routes: Tensor

    def __init__(self, config: RoutedConfig, nets: Sequence[nn.Module] | None = None) -> None:
        """``nets`` are the networks, if they are there already; otherwise they are made with fresh weights."""
        super().__init__()
        self.config = config
        self.nets = nn.ModuleList([build_network(net) for net in config.nets] if nets is None else nets)
        self.register_buffer("routes", torch.tensor(config.routes, dtype=torch.int64), persistent=False)
        needs = getattr(self.nets[0], "needs", None)
        if needs is not None:
            self.needs = needs

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,), ``cond["label"]`` (B,) int64 -> (B, *shape).

        Raises:
            InputError: no label, a label of no class (-1), or one that is out of range.
        """
        places = self.places(cond)
        found = [(k, rows) for k, rows in enumerate(places) if len(rows)]
        if len(found) == 1:
            whole: Tensor = self.nets[found[0][0]](x, time, cond)
            return whole
        parts = [self.nets[k](x.index_select(0, r), time.index_select(0, r), take(cond, r)) for k, r in found]
        joined = torch.cat(parts)
        return torch.empty_like(joined).index_copy(0, torch.cat([rows for _, rows in found]), joined)

    def places(self, cond: Cond) -> list[Tensor]:
        """For every network the numbers of its samples, in order: each sample is in one of them.

        Raises:
            InputError: see :meth:`forward`.
        """
        label = cond.get("label")
        if label is None:
            raise InputError("several students are chosen among by the label, and the condition has none: pass one")
        last = len(self.routes) - 1
        known = (label >= 0) & (label <= last)
        # Labels out of range count as one more network, so that one transfer tells of them too.
        route = torch.where(known, self.routes[label.clamp(0, last)], len(self.nets))
        order = route.argsort(stable=True)
        counts = torch.bincount(route, minlength=len(self.nets) + 1).tolist()
        if counts[-1]:
            raise InputError(
                f"several students are chosen among by the label, and {counts[-1]} of {len(label)} labels are of no "
                f"class: give each sample one from 0 to {last}"
            )
        return list(order.split(counts)[: len(self.nets)])


def routed(denoisers: Sequence[Precond], routes: Sequence[int]) -> Precond:
    """One denoiser that sends each sample to the denoiser of its class; ``routes`` has a number for every class.

    The weights are shared with the denoisers, which may differ in their networks alone.

    Raises:
        InputError: a class without a denoiser, one without a class, or different preconditionings or shapes.
    """
    check_routes(routes, len(denoisers))
    told = [{**D.describe(), "net": None} for D in denoisers]
    for k, description in enumerate(told):
        if description != told[0]:
            wrong = [key for key in description if description[key] != told[0].get(key)]
            raise InputError(
                f"one denoiser needs one preconditioning: number {k} differs from number 0 in {', '.join(wrong)}"
            )
    nets = [D.net for D in denoisers]
    config = RoutedConfig(tuple(describe_network(net) for net in nets), tuple(routes))
    made = Routed(config, nets).to(next(nets[0].parameters()).device)
    return denoisers[0].with_net(made.train(nets[0].training))


def shrunk(D: Precond, size: float) -> Precond:
    """The same preconditioning around a network with ``size`` times the channels, rounded to 8, and fresh weights.

    Raises:
        InputError: a network without such a number, one that cannot be built so, or one that would stay as it is.
    """
    told = describe_network(D.net)
    name = next((key for key in SIZES if key in told), None)
    if name is None:
        raise InputError(f"a {type(D.net).__name__} cannot be made smaller: it has no {' or '.join(SIZES)}: use size 1")
    number = max(UNIT, round(told[name] * size / UNIT) * UNIT)
    if number >= told[name]:
        raise InputError(f"size {size:g} leaves {told[name]} {name} as they are: choose a smaller one, or 1")
    return D.with_net(build_network({**told, name: number}))
