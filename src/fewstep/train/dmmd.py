"""Deep MMD gradient flow (DMMD, arXiv 2405.06780): features that tell clean from noisy data, level by level.

No generator is trained, and nothing is played against: noisy data stand in for what a generator would make. Samples are
particles that move downhill in the features' discrepancy, see :mod:`fewstep.solve.particle_flow`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.cond import Batch, Cond
from fewstep.core.generator import Generator
from fewstep.core.network import build_network, describe_network, network
from fewstep.core.noise import Noise
from fewstep.core.options import Budget
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.data import Data
from fewstep.errors import InputError, unknown
from fewstep.grid.own import own_levels
from fewstep.models.discriminator import discriminator_config
from fewstep.models.frozen import network_under
from fewstep.solve.particle_flow import (
    Kernel,
    Pace,
    ParticleFlow,
    check_kernel,
    critic_of,
    features_of,
    mixed,
    mmd2,
    witness,
)
from fewstep.solve.step import pictures
from fewstep.train.run import train, untrained


@dataclass(frozen=True)
class FeaturesConfig:
    """A network with heads that turn its activations into features.

    Attributes:
        net: the description of the network itself.
        taps: names of the activations, as the network declares them.
        widths: of each, its channels.
        ranks: dimensions of each: 2 (B, C), 3 (B, T, C) or 4 (B, C, h, w).
        features: of each place of each activation.
    """

    net: dict[str, Any]
    taps: tuple[str, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    features: int = 64

    def __post_init__(self) -> None:
        counts = {len(self.taps), len(self.widths), len(self.ranks)}
        if not self.taps or len(counts) > 1 or min(*self.widths, self.features) < 1 or set(self.ranks) - {2, 3, 4}:
            raise InputError(
                f"features need for each tap a width >= 1 and a rank of 2, 3 or 4, and features >= 1, got {self}"
            )


@network("features", FeaturesConfig)
class Features(nn.Module):
    """A denoiser's network beside heads for :func:`features_of`; as a network it is what it was."""

    def __init__(self, config: FeaturesConfig, net: nn.Module | None = None) -> None:
        """``net`` is the network, if it is there already; otherwise it is made with fresh weights."""
        super().__init__()
        self.config = config
        self.net = build_network(config.net) if net is None else net
        taps: dict[str, str] = getattr(self.net, "taps", {})
        self.taps = {name: f"net.{place}" for name, place in taps.items()}
        for tap in config.taps:
            if tap not in self.taps:
                raise unknown("feature tap", tap, self.taps)
        sizes = zip(config.widths, config.ranks, strict=True)
        self.heads = nn.ModuleList(_head(width, rank, config.features) for width, rank in sizes)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,) -> (B, *shape): the network itself."""
        out: Tensor = self.net(x, time, cond)
        return out

    def of(self, found: Mapping[str, Tensor]) -> Tensor:
        """Features (B, d) of the activations at the taps."""
        dtype = next(self.heads.parameters()).dtype
        taps = zip(self.config.taps, self.heads, strict=True)
        return torch.cat([head(found[tap].to(dtype)).flatten(1) for tap, head in taps], 1)


def _head(width: int, rank: int, features: int) -> nn.Module:
    if rank == 4:
        groups = next(g for g in range(min(32, width), 0, -1) if width % g == 0)
        return nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, features, 1))
    return nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, features))


def featured(start: Generator, taps: Sequence[str] = (), features: int = 64, *, seed: int = 0) -> Generator:
    """``start`` with fresh heads for features beside its network, which is copied: trained or not, it is a beginning.

    ``features`` numbers for each place of each of the ``taps``; without any those that a discriminator reads. The
    conditions are left out, because a particle flow is unconditional.

    Raises:
        InputError: a network that declares no such taps, or cannot be described.
    """
    D = network_under(start.denoiser)
    size = discriminator_config(start, taps)
    config = FeaturesConfig(describe_network(D.net), size.taps, size.widths, size.ranks, features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Features(config, copy.deepcopy(D.net)).to(next(D.net.parameters()).device)
    return replace(start, denoiser=D.with_net(made), conds=None)


@dataclass(frozen=True)
class DMMD:
    """Trains noise-adaptive features by making the MMD between clean and noised data as large as it can be.

    Level by level, with the slope of the witness held near 1 between the two and the features held small. Samples
    are made by a particle flow, from the highest of ``levels`` to the lowest.

    Attributes:
        steps: passes through the network in sampling: moves at all levels together, a multiple of ``levels``.
        levels: of sampling, even in the network's own time.
        rate: length of a move in sampling, see :class:`fewstep.solve.particle_flow.ParticleFlow`.
        pace: of sampling, unit or constant.
        population: whether particles feel each other in sampling, or what noised data would do to them.
        group: pictures that share a noise level, which is what an MMD is computed on; the batch holds several groups.
        kernel: on the features: linear (the paper's for pictures), gaussian, quadratic (rational) or distance.
        widths: of the kernel.
        penalty: weight of the squared distance from 1 of the witness's slope, between clean and noised pictures.
        shrink: weight of the features' mean square norm.
        lowest: share of the network's own time above which training levels lie.
        optim: of the network.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = True

    steps: int = 100
    levels: int = 10
    rate: float = 1.0
    pace: Pace = "unit"
    population: bool = True
    group: int = 32
    kernel: Kernel = "linear"
    widths: tuple[float, ...] = (1.0,)
    penalty: float = 1.0
    shrink: float = 0.1
    lowest: float = 0.0
    optim: Optim = Optim(lr=1e-3, warmup=20, decay="cosine", clip=1.0)
    ema: Ema = Ema(power=0.08)

    def __post_init__(self) -> None:
        if self.levels < 1 or self.steps < 1 or self.steps % self.levels:
            raise InputError(f"DMMD needs steps as a multiple of levels >= 1, got {self.steps} and {self.levels}")
        if self.group < 2 or not 0 <= self.lowest < 1:
            raise InputError(f"DMMD needs group >= 2 and 0 <= lowest < 1, got {self.group} and {self.lowest}")
        if not 0 <= self.penalty < math.inf or not 0 <= self.shrink < math.inf:
            raise InputError(f"DMMD needs penalty >= 0 and shrink >= 0, finite, got {self.penalty} and {self.shrink}")
        check_kernel(self.kernel, self.widths)
        # What the flow would refuse, before there is anything to sample from.
        self.flow([1.0])

    def flow(self, levels: Sequence[float], data: Tensor | None = None) -> ParticleFlow:
        """The sampler on ``levels``, towards ``data``."""
        return ParticleFlow(
            levels,
            moves=self.steps // self.levels,
            rate=self.rate,
            pace=self.pace,
            population=self.population,
            kernel=self.kernel,
            widths=self.widths,
            data=data,
        )

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """One role: the network with its features, see :func:`featured`.

        Raises:
            InputError: a network without features.
        """
        made = critic_of(teacher.denoiser)
        return {"critic": Role(lambda: copy.deepcopy(made), self.optim, self.ema, ships=True)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """``-MMD^2 + penalty (|grad f| - 1)^2 + shrink |phi|^2``, a mean over the groups of the batch.

        Raises:
            InputError: no pictures, or a number of them that is no multiple of ``group``.
        """
        x0 = pictures("DMMD", batch, m.critic.shape)
        if len(x0) % self.group:
            raise InputError(
                f"DMMD compares groups of {self.group} pictures, and {len(x0)} do not divide into them: choose another "
                "group, or a batch whose micro-batches are a multiple of it"
            )
        # The first picture of a group says where all of it stands.
        share = noise.uniform((), "level", dtype=torch.float64)[:: self.group].repeat_interleave(self.group)
        sigma = own_levels(m.critic, self.lowest + (1 - self.lowest) * share)
        y = mixed(m.critic, x0, noise.normal(x0.shape[1:], "n"), sigma)
        place = noise.uniform((), "between").reshape(-1, *[1] * (x0.ndim - 1))
        between = torch.lerp(y, x0, place)
        yield Update("critic", lambda: self.losses(m, x0, y, between, sigma))

    def losses(self, m: Models, x0: Tensor, y: Tensor, between: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Of clean ``x0``, noised ``y`` and points ``between`` (B, ...), whose groups share a level of ``sigma``."""
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            f = features_of(m.critic, torch.cat([x0, y]), torch.cat([sigma, sigma])).float()
            clean, noised = (part.reshape(-1, self.group, part.shape[1]) for part in f.chunk(2))
            mmd = mmd2(clean, noised, self.kernel, self.widths, paired=True).mean()
            small = f.square().sum(1).mean()
            told = {"mmd": mmd.detach(), "norm": small.detach()}
            loss = self.shrink * small - mmd
            if self.penalty:
                slope = self.slopes(m, between, sigma, clean, noised)
                loss = loss + self.penalty * (slope - 1).square().mean()
                told["slope"] = slope.detach().mean()
        return {"loss": loss, **told}

    def slopes(self, m: Models, z: Tensor, sigma: Tensor, clean: Tensor, noised: Tensor) -> Tensor:
        """(B,): the norm of the witness's gradient at ``z`` (B, ...), with a graph."""
        z = z.detach().requires_grad_(True)
        f = features_of(m.critic, z, sigma).float().reshape(len(clean), self.group, -1)
        value = witness(f, noised, clean, self.kernel, self.widths)
        (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        # The small number keeps the slope of the norm finite where the gradient is 0.
        return (slope.float().flatten(1).square().sum(1) + 1e-12).sqrt()

    def sampler(self, teacher: Generator) -> ParticleFlow:
        """A flow over ``levels`` that are even in the network's own time, towards the data of ``teacher``'s flow.

        Raises:
            InputError: the sampler of ``teacher`` is no particle flow, and so says nothing of data.
        """
        D, before = teacher.denoiser, teacher.sampler
        if not isinstance(before, ParticleFlow):
            raise InputError(
                "DMMD samples towards data, and this network's sampler knows none: train it with "
                "fewstep.train.dmmd.train_dmmd, or give it a ParticleFlow with data"
            )
        places = own_levels(D, torch.linspace(1, 0, self.levels + 1, dtype=torch.float64)[:-1])
        return self.flow(places.tolist(), before.data)


def train_dmmd(
    data: Data,
    *,
    out: str | Path,
    budget: str | int | Budget,
    method: DMMD | None = None,
    start: Generator | None = None,
    net: str = "unet",
    taps: Sequence[str] = (),
    features: int = 64,
    reference: int = 4096,
    **options: Any,
) -> Generator:
    """Trains DMMD on ``data`` in the folder ``out`` and returns a generator that samples by particles.

    ``start`` is a network to begin with, such as a trained diffusion model (without one a fresh ``net``, "unet" or
    "resmlp"). At most ``reference`` pictures, evenly spaced, are what samples move towards: their mean features are
    kept for the linear kernel, the pictures for others. ``options`` are those of :func:`fewstep.train.run.train`.

    Raises:
        InputError: see :func:`featured` and :func:`fewstep.train.run.train`; or fewer than two reference pictures.
    """
    method = DMMD() if method is None else method
    if reference < 2:
        raise InputError(f"DMMD needs two reference pictures or more, got reference={reference}")
    if start is None:
        start = untrained(cast(Any, Unlabelled(data)), net, seed=int(options.get("seed", 0)))
    made = featured(start, taps, features)
    count = min(reference, len(data))
    shown = data.take(torch.arange(count) * len(data) // count).x
    if shown is None:
        raise InputError(f"data {data.name!r} hold no pictures to move towards")
    first = ParticleFlow([made.denoiser.sigma_max], data=shown, kernel=method.kernel, widths=method.widths)
    trained = train(made.with_sampler(first), method, data, out=out, budget=budget, **options)
    if method.kernel == "linear":
        flow = cast(ParticleFlow, trained.sampler)
        trained = trained.with_sampler(flow.embedded(trained.denoiser))
        trained.save(out)
    return trained


class Unlabelled:
    """What :func:`fewstep.train.run.untrained` asks of data, without their classes."""

    classes: ClassVar[int] = 0
    frequencies: ClassVar[tuple[float, ...]] = ()

    def __init__(self, data: Data) -> None:
        self.shape, self.std = data.shape, data.std
