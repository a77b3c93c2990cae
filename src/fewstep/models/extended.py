"""More numbers for a network to be told beside the time: a second time, a guidance scale, a number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Precond
from fewstep.core.network import build_network, describe_network, network
from fewstep.errors import InputError
from fewstep.models.lora import Shared, targets_of, tree

BANDS, TOP, SHIFT = 64, 16.0, 1e-3


@dataclass(frozen=True)
class ExtendedConfig:
    """A network that is told more.

    Attributes:
        net: the description of the network itself.
        inputs: names of the numbers, which stand in the condition as (B,) of values >= 0.
    """

    net: dict[str, Any]
    inputs: tuple[str, ...]


@network("extended", ExtendedConfig)
class Extended(nn.Module):
    """Any network whose embedding of the time gets a term for each further number.

    The terms start at 0, so that the network starts as the one it was made of; a number that the condition lacks adds
    nothing. The network must say where its embeddings are: ``net.embeds`` maps names of sub-modules to the width of
    what they return, (B, width). A number ``v`` is embedded as ``ln(v + 0.001)``, which tells noise levels from 0 to
    pure noise apart and is smooth.

    Raises:
        InputError: the network does not say where its embeddings are.
    """

    def __init__(self, config: ExtendedConfig, net: nn.Module | None = None) -> None:
        """``net`` is the network, if it is there already; otherwise it is made with fresh weights."""
        super().__init__()
        self.config = config
        self.net = build_network(config.net) if net is None else net
        embeds: dict[str, int] = getattr(self.net, "embeds", {})
        if not embeds:
            raise InputError(
                f"{type(self.net).__name__} does not say where it embeds the time, so it cannot be told "
                f"{' and '.join(config.inputs)}: give it an attribute `embeds`"
            )
        self.register_buffer("frequencies", torch.logspace(-1, math.log10(TOP), BANDS // 2), persistent=False)
        self.terms = nn.ModuleDict({name: nn.ModuleList() for name in config.inputs})
        self._told: dict[str, Tensor] = {}
        # Embeddings that are made in every block, which checkpointing runs again.
        self._inside = len(embeds) > 1
        for k, (place, width) in enumerate(embeds.items()):
            for name in config.inputs:
                self.terms[name].append(_term(width))  # type: ignore[operator]
            self.net.get_submodule(place).register_forward_hook(_Adds(self, k))
        taps: dict[str, str] = getattr(self.net, "taps", {})
        self.taps = {name: f"net.{place}" for name, place in taps.items()}
        self.embeds = {f"net.{place}": width for place, width in embeds.items()}

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape), ``time`` (B,), ``cond`` with the numbers (B,) -> (B, *shape)."""
        frequencies: Tensor = self.frequencies  # type: ignore[assignment]
        own = {name: value for name, value in cond.items() if name not in self.config.inputs}
        told: dict[str, Tensor] = {}
        for name in self.config.inputs:
            if name in cond:
                if cond[name].shape != (len(x),):
                    raise InputError(f"cond[{name!r}] must be ({len(x)},), got {tuple(cond[name].shape)}")
                phase = (cond[name].to(frequencies) + SHIFT).log()[:, None] / 4 * frequencies * math.pi
                told[name] = torch.cat([phase.cos(), phase.sin()], 1)
        try:
            self._told = told
            out: Tensor = self.net(x, time, own)
        finally:
            self._told = {}
        if self._inside and told and out.requires_grad:
            # A checkpointed block runs again in the backward pass, and must be told again what it was told now.
            out.register_hook(_Tells(self, told))
        return out

    def added(self, place: int, embedding: Tensor) -> Tensor:
        """The embedding (B, width) of place number ``place`` with the terms of all numbers that were told."""
        for name, waves in self._told.items():
            term = self.terms[name][place]  # type: ignore[index]
            embedding = embedding + term(waves.to(next(term.parameters()).dtype)).to(embedding.dtype)
        return embedding


class _Adds:
    """A hook on an embedding: an object, so that a copy of the network hooks its own."""

    def __init__(self, owner: Extended, place: int) -> None:
        self.owner, self.place = owner, place

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.owner.added(self.place, out)


class _Tells:
    """A hook on an output, whose gradient comes before the blocks run again."""

    def __init__(self, owner: Extended, told: dict[str, Tensor]) -> None:
        self.owner, self.told = owner, told

    def __call__(self, gradient: Tensor) -> None:
        self.owner._told = self.told


def _term(width: int) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(BANDS, width), nn.SiLU(), nn.Linear(width, width))
    last = made[2]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return made


def extended(denoiser: Precond, *inputs: str) -> Precond:
    """The denoiser on a network that reads ``inputs`` from the condition too; at first it ignores them.

    The weights are shared: copy it before it is trained. The denoiser itself is left as it is. A network that reads
    them already is kept. Of one that :func:`fewstep.models.lora.share` made, the terms get LoRA layers too.

    Raises:
        InputError: see :class:`Extended`.
    """
    net = denoiser.net
    if isinstance(net, Extended) and set(inputs) <= set(net.config.inputs):
        return denoiser
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # A tree of its own, because hooks on the network of the caller would stay there.
        made = Extended(ExtendedConfig(describe_network(net), tuple(inputs)), tree(net))
    told = denoiser.with_net(made.to(next(net.parameters()).device).train(net.training))
    if isinstance(told, Shared):
        # Targets that name the network's own layers would leave the terms at zero, and the number unread.
        layers = [f"net.{name}" for name in targets_of(net, told.lora)]
        told.lora = replace(told.lora, targets=(*layers, *(f"terms.{n}" for n, m in made.terms.named_modules()
                                                           if isinstance(m, nn.Linear))))  # fmt: skip
        told.requires_grad_(False)
    return told
