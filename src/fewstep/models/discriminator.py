"""A discriminator on the features of a denoiser: small heads on declared taps; the denoiser stays as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.cond import Classes, Cond
from fewstep.core.denoiser import Precond
from fewstep.core.generator import Generator
from fewstep.core.network import network
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.errors import InputError, unknown
from fewstep.grid.own import picked
from fewstep.loss.gan import ADVERSARIAL, r1
from fewstep.models.frozen import Frozen, network_under

Penalised = Literal["features", "pictures"]
DIMENSIONS = {2: "(B, C)", 3: "(B, T, C)", 4: "(B, C, h, w)"}


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Size of a discriminator.

    Attributes:
        taps: names of the features, as the denoiser declares them.
        widths: of each feature, its channels.
        ranks: dimensions of each feature: 2 (B, C), 3 (B, T, C) or 4 (B, C, h, w).
        hidden: width of each head.

    Raises:
        InputError: no taps, one twice, a width and rank missing for one, or a size below 1.
    """

    taps: tuple[str, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    hidden: int = 128

    def __post_init__(self) -> None:
        counts = {len(self.taps), len(self.widths), len(self.ranks), len(set(self.taps))}
        if len(counts) > 1 or not self.taps or min(*self.widths, self.hidden) < 1 or set(self.ranks) - {*DIMENSIONS}:
            raise InputError(
                "a discriminator needs for each of its different taps a width >= 1 and a rank of 2, 3 or 4, and "
                f"hidden >= 1, got {self}"
            )


@network("discriminator", DiscriminatorConfig)
class Discriminator(nn.Module):
    """One head for each tap; it judges every place of a feature map, or every token, by itself."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        # A list, because a tap may be called what a module must not be, such as "pop" or "a.b".
        self.heads = nn.ModuleList(
            _head(width, rank, config.hidden) for width, rank in zip(config.widths, config.ranks, strict=True)
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, n), high for real, of the activations at the taps."""
        dtype = next(self.parameters()).dtype
        taps = zip(self.config.taps, self.heads, strict=True)
        return torch.cat([head(features[tap].to(dtype)).flatten(1) for tap, head in taps], 1)


def _head(width: int, rank: int, hidden: int) -> nn.Module:
    if rank == 4:
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if hidden % g == 0)
        return nn.Sequential(
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.GroupNorm(groups, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, 1, 1),
        )
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, 1))


def usual_taps(D: Precond) -> tuple[str, ...]:
    """What a discriminator reads where nobody says: the bottleneck, or the middle one of a network's blocks.

    Raises:
        InputError: the network declares no features.
    """
    if not D.taps:
        raise InputError(f"{type(D.net).__name__} declares no features: a discriminator on them cannot be made")
    return ("bottleneck",) if "bottleneck" in D.taps else ([*D.taps][(len(D.taps) - 1) // 2],)


def discriminator(teacher: Generator, taps: Sequence[str] = ("bottleneck",), hidden: int = 128) -> Discriminator:
    """A fresh discriminator for features of the network under ``teacher``; see :func:`discriminator_config`."""
    return Discriminator(discriminator_config(teacher, taps, hidden))


def discriminator_config(teacher: Generator, taps: Sequence[str] = (), hidden: int = 128) -> DiscriminatorConfig:
    """The size of a discriminator for features of the network under ``teacher``; no ``taps`` are :func:`usual_taps`.

    The sizes of the features come from a forward pass on tensors without contents, which costs nothing.

    Raises:
        InputError: a tap that the network does not declare, or features of an unknown kind.
    """
    D = network_under(teacher.denoiser)
    taps = tuple(taps) or usual_taps(D)
    for tap in taps:
        if tap not in D.taps:
            raise unknown("feature tap", tap, D.taps)
    widths, ranks = [], []
    for tap, shape in _shapes(D, example_cond(teacher), taps).items():
        if len(shape) not in DIMENSIONS:
            raise InputError(f"feature {tap!r} is {shape}, expected {', '.join(DIMENSIONS.values())}")
        widths.append(shape[2 if len(shape) == 3 else 1])
        ranks.append(len(shape))
    return DiscriminatorConfig(taps, tuple(widths), tuple(ranks), hidden)


def example_cond(teacher: Generator) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what the network under ``teacher`` must be told of one picture.

    From what the network says that it needs, so that no text encoder is loaded and no prompt drawn.
    """
    needs: Mapping[str, Any] = getattr(network_under(teacher.denoiser).net, "needs", {})
    made = {
        name: ((1, *(n or 1 for n in need.shape)), torch.float32 if need.kind == "floating" else torch.int64)
        for name, need in needs.items()
        if not need.optional
    }
    return made or ({"label": ((1,), torch.int64)} if isinstance(teacher.conds, Classes) else {})


def _shapes(
    D: Precond, told: Mapping[str, tuple[tuple[int, ...], torch.dtype]], taps: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """The sizes of the features, from fake tensors: nothing is computed, whatever the device of ``D``."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        memo: dict[int, Any] = {}
        for p in D.parameters():
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
        for b in D.buffers():
            memo[id(b)] = torch.empty(b.shape, dtype=b.dtype)
        net = copy.deepcopy(D.net, memo)
        cond = {
            # One number known as such, because a network may look whether there is a label.
            name: torch.tensor([0]) if dtype == torch.int64 and shape == (1,) else torch.zeros(shape, dtype=dtype)
            for name, (shape, dtype) in told.items()
        }
        found: dict[str, tuple[int, ...]] = {}
        for tap in taps:
            net.get_submodule(D.taps[tap]).register_forward_hook(_notes(found, tap))
        dtype = next(net.parameters()).dtype
        net(torch.zeros(1, *D.shape, dtype=dtype), torch.ones(1), cond)
    return {tap: found[tap] for tap in taps}


def _notes(found: dict[str, tuple[int, ...]], tap: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        found[tap] = tuple(out.shape)

    return hook


def check_game(method: str, game: str, judged_at: Sequence[float], hidden: int, **weights: float) -> None:
    """Checks what a method says of its adversarial term, before any work: for its ``__post_init__``.

    Raises:
        InputError: an unknown game, places that are none or not within [0, 1), ``hidden`` below 1, or a weight that is
            negative or not finite.
    """
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{method} needs {name} >= 0 and finite, got {value}")
    if not judged_at or not all(0 <= place < 1 for place in judged_at):
        raise InputError(f"{method}(judged_at=...) takes places within [0, 1), got {judged_at}")
    if not hidden >= 1:
        raise InputError(f"{method} needs hidden >= 1, the width of the discriminator's heads, got {hidden}")
    if game not in ADVERSARIAL:
        raise unknown("adversarial loss", game, ADVERSARIAL)


def judging(noise: Noise, levels: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """How a discriminator sees each sample: a level (B,), float64, one of ``levels`` drawn alike, and noise of it.

    The noise (B, ...), of the shape and dtype of ``like``, is to be added to the real and to the made picture alike.
    """
    sigma = picked(noise.integers(0, len(levels), (), "judged"), levels)
    return sigma, widen(sigma, like) * noise.normal(like.shape[1:], "judged", dtype=like.dtype)


def read(D: Any, heads: Any, x: Tensor, sigma: Tensor, cond: Cond) -> dict[str, Tensor]:
    """The activations that ``heads`` judge, of ``x`` (B, ...) at level ``sigma`` (B,); guidance takes no part in them.

    The forward pass of the network ends at the last of them.
    """
    net: Any = D.network if isinstance(D, Frozen) else D
    found: dict[str, Tensor] = net.activations(x, sigma, cond, heads.config.taps)
    return found


def judged(D: Any, heads: Any, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """Logits (B, n) of ``x`` (B, ...), noised to ``sigma`` (B,): the features of ``D`` in front of ``heads``."""
    logits: Tensor = heads(read(D, heads, x, sigma, cond))
    return logits


def discriminator_loss(
    D: Any,
    heads: Any,
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    cond: Cond,
    *,
    game: str = "hinge",
    gamma: float = 0.0,
    penalised: Penalised = "features",
) -> dict[str, Tensor]:
    """The discriminator's side on pictures (B, ...) noised to ``sigma`` (B,), with ``gamma`` times R1 on the real ones.

    R1 is that of the logits' gradient with respect to the features (arXiv 2311.17042), which costs two passes through
    the heads, or to the noised pictures (arXiv 1801.04406), which costs two through the denoiser. Without it nothing
    of the denoiser is kept for the backward pass. Beside the loss: the mean logits of real and fake, and R1.
    """
    with torch.no_grad():
        on_fake = read(D, heads, fake.detach(), sigma, cond)
    if not gamma:
        with torch.no_grad():
            on_real = read(D, heads, real, sigma, cond)
        logits_real, penalty = heads(on_real), None
    else:
        inputs: list[Tensor]
        if penalised == "pictures":
            leaf = real.detach().requires_grad_(True)
            # The fused kernels of attention have no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                on_real, inputs = read(D, heads, leaf, sigma, cond), [leaf]
        else:
            with torch.no_grad():
                found = read(D, heads, real, sigma, cond)
            on_real = {tap: f.detach().requires_grad_(True) for tap, f in found.items()}
            inputs = [*on_real.values()]
        logits_real = heads(on_real)
        penalty = r1(logits_real, inputs)
    logits_fake = heads(on_fake)
    loss = ADVERSARIAL[game].discriminator(logits_real, logits_fake)
    told = {"real": logits_real.detach().mean(), "fake": logits_fake.detach().mean()}
    if penalty is None:
        return {"loss": loss, **told}
    return {"loss": loss + gamma * penalty, **told, "r1": penalty.detach()}


def generator_loss(D: Any, heads: Any, fake: Tensor, sigma: Tensor, cond: Cond, *, game: str = "hinge") -> Tensor:
    """The generator's side: its gradient reaches ``fake`` (B, ...), noised to ``sigma`` (B,), through ``D``."""
    return ADVERSARIAL[game].generator(judged(D, heads, fake, sigma, cond))
