"""The generative equilibrium transformer (GET, arXiv 2401.08639), its untied twin, and one-step generators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Precond, as64, preconditioning
from fewstep.core.network import network
from fewstep.core.path import EDM
from fewstep.errors import InputError, unknown

Gradient = Literal["unrolled", "phantom", "implicit"]
GRADIENTS = ("unrolled", "phantom", "implicit")
STARTS = ("tokens", "zero")


@dataclass(frozen=True)
class ViTConfig:
    """Size of a plain transformer from noise to a picture, with the blocks of GET, none of them tied.

    Attributes:
        shape: (C, H, W) of a picture, H and W divisible by ``patch``.
        classes: number of classes, 0 for none.
        patch: side of a patch.
        width: of every token, divisible by 4 and by ``heads``.
        heads: of the attention.
        depth: blocks.
        mlp: hidden width of a block's MLP, in units of ``width``.
    """

    shape: tuple[int, int, int] = (3, 32, 32)
    classes: int = 0
    patch: int = 2
    width: int = 768
    heads: int = 12
    depth: int = 12
    mlp: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.patch < 1 or self.shape[1] % self.patch or self.shape[2] % self.patch:
            raise InputError(
                f"pictures of {self.shape[1]}x{self.shape[2]} cannot be cut into patches of {self.patch}x{self.patch}"
            )
        if self.width % 4 or self.heads < 1 or self.width % self.heads:
            raise InputError(
                f"a transformer needs a width divisible by 4 and by heads, got {self.width} and {self.heads}"
            )
        if self.depth < 1 or self.classes < 0 or not self.mlp > 0:
            raise InputError(f"a transformer needs depth >= 1, classes >= 0 and mlp > 0, got {self}")


@dataclass(frozen=True)
class GETConfig(ViTConfig):
    """Size of a GET: injection blocks, then an equilibrium of tied blocks.

    The defaults are GET-B/2 of the paper for 32x32 pictures (62 M parameters).

    Attributes:
        shape: (C, H, W) of a picture, H and W divisible by ``patch``.
        classes: number of classes, 0 for none.
        patch: side of a patch.
        width: of every token, divisible by 4 and by ``heads``.
        heads: of the attention.
        depth: blocks of the injection transformer.
        mlp: hidden width of their MLPs, in units of ``width``.
        tied: blocks of the equilibrium, applied in every iteration.
        tied_mlp: hidden width of their MLPs.
        iterations: of the equilibrium.
        start: of the search: tokens, what the injection blocks end with, or zero.
    """

    depth: int = 1
    tied: int = 3
    tied_mlp: float = 12.0
    iterations: int = 6
    start: Literal["tokens", "zero"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tied < 1 or self.iterations < 1 or not self.tied_mlp > 0:
            raise InputError(f"a GET needs tied >= 1, iterations >= 1 and tied_mlp > 0, got {self}")
        if self.start not in STARTS:
            raise unknown("start of an equilibrium", self.start, STARTS)


class _Block(nn.Module):
    """Pre-norm attention, with terms added to queries, keys and values, and an MLP (arXiv 2401.08639, section 3)."""

    def __init__(self, width: int, heads: int, mlp: float) -> None:
        super().__init__()
        self.heads, hidden = heads, int(width * mlp)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, z: Tensor, injected: Tensor | None) -> Tensor:
        """``z`` (B, T, width), ``injected`` (B, T or 1, 3 width) -> (B, T, width)."""
        qkv = self.qkv(self.norm1(z))
        if injected is not None:
            qkv = qkv + injected
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, 2))
        z = z + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = z + self.mlp(self.norm2(z))
        return out


class _Transformer(nn.Module):
    """What GET and its untied twin share: patches with positions, classes, blocks, and a head that starts at 0."""

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        channels, height, width = config.shape
        self.enter = nn.Conv2d(channels, config.width, config.patch, stride=config.patch)
        rows, columns = height // config.patch, width // config.patch
        self.register_buffer("places", _places(rows, columns, config.width), persistent=False)
        # The last row stands for no class.
        self.label = nn.Embedding(config.classes + 1, 3 * config.width) if config.classes else None
        self.blocks = nn.ModuleList(_Block(config.width, config.heads, config.mlp) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.leave = nn.Linear(config.width, channels * config.patch**2)

    def reset(self) -> None:
        """Fresh weights as in the paper's code: Xavier's, small classes, and nothing out of the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        nn.init.zeros_(self.leave.weight)

    def tokens(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, T, width) behind the blocks, and the class's term (B, 1, 3 width).

        Raises:
            InputError: a label where the network has no classes.
        """
        places: Tensor = self.places  # type: ignore[assignment]
        z, own = self.enter(x).flatten(2).transpose(1, 2) + places, self._class(len(x), cond)
        for block in self.blocks:
            z = block(z, own)
        return z, own

    def _class(self, count: int, cond: Cond) -> Tensor | None:
        label = cond.get("label")
        if self.label is None:
            if label is not None:
                raise InputError("this network has no classes: leave the label out of the condition")
            return None
        if label is None:
            label = torch.full((count,), -1, device=self.label.weight.device)
        found: Tensor = self.label(torch.where(label < 0, self.config.classes, label))
        return found[:, None]

    def decode(self, z: Tensor) -> Tensor:
        """A picture (B, C, H, W) from the tokens."""
        side, (channels, height, width) = self.config.patch, self.config.shape
        parts = self.leave(self.norm(z)).unflatten(1, (height // side, width // side))
        return parts.unflatten(3, (channels, side, side)).permute(0, 3, 1, 4, 2, 5).reshape(-1, *self.config.shape)


@network("vit", ViTConfig)
class ViT(_Transformer):
    """A transformer from unit noise to a picture; it reads no time. Taps: ``block0`` .., each (B, T, width)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.taps = {f"block{i}": f"blocks.{i}" for i in range(config.depth)}
        self.reset()

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape) -> (B, *shape); ``time`` is not read."""
        return self.decode(self.tokens(x, cond)[0])

    def iterates(
        self, x: Tensor, cond: Cond, gradient: Gradient = "unrolled", damping: float = 1.0, backward: int = 6
    ) -> list[Tensor]:
        """The one picture that it makes, as :meth:`GET.iterates` gives several."""
        return [self.decode(self.tokens(x, cond)[0])]


@network("get", GETConfig)
class GET(_Transformer):
    """Unit noise -> injection blocks -> a fixed point of tied blocks -> a picture; it reads no time.

    ``z <- B(z; u)`` is repeated from the tokens of the injection blocks, or from 0, where ``u`` comes from those tokens
    and is added to the queries, keys and values of every tied block (arXiv 2401.08639, section 3). From 0 all tokens
    are alike, and only attention tells them apart. The paper's code starts at random numbers, so that the same noise
    gives other pictures. Taps: ``block0`` .., each (B, T, width).
    """

    config: GETConfig

    def __init__(self, config: GETConfig) -> None:
        super().__init__(config)
        self.inject = nn.Linear(config.width, 3 * config.width * config.tied, bias=False)
        self.tied = nn.ModuleList(_Block(config.width, config.heads, config.tied_mlp) for _ in range(config.tied))
        self.taps = {f"block{i}": f"blocks.{i}" for i in range(config.depth)}
        self.reset()

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, *shape) -> (B, *shape); ``time`` is not read."""
        once, z = self.equation(x, cond)
        for _ in range(self.config.iterations):
            z = once(z)
        return self.decode(z)

    def equation(self, x: Tensor, cond: Cond) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The map whose fixed point is sought, and the start of the search."""
        tokens, own = self.tokens(x, cond)
        terms = self.inject(tokens).chunk(self.config.tied, 2)
        terms = terms if own is None else [term + own for term in terms]

        def once(z: Tensor) -> Tensor:
            for block, term in zip(self.tied, terms, strict=True):
                z = block(z, term)
            return z

        return once, tokens if self.config.start == "tokens" else torch.zeros_like(tokens)

    def iterates(
        self, x: Tensor, cond: Cond, gradient: Gradient = "unrolled", damping: float = 1.0, backward: int = 6
    ) -> list[Tensor]:
        """The pictures of the iterations that have a gradient, first to last.

        ``unrolled`` is all of ``iterations``, differentiated as they are. ``phantom`` (arXiv 2111.05177) iterates
        without a gradient, then ``backward`` times ``z <- (1 - damping) z + damping B(z)`` with one. ``implicit``
        (arXiv 1909.01377) differentiates the fixed point itself: the last iterate, whose gradient solves
        ``g = v + J^T g`` by ``backward`` terms of its Neumann series, with memory that does not grow with them.

        Raises:
            InputError: an unknown gradient.
        """
        if gradient not in GRADIENTS:
            raise unknown("gradient of an equilibrium", gradient, GRADIENTS)
        once, z = self.equation(x, cond)
        if gradient == "unrolled":
            found = []
            for _ in range(self.config.iterations):
                z = once(z)
                found.append(self.decode(z))
            return found
        with torch.no_grad():
            for _ in range(self.config.iterations):
                z = once(z)
        if gradient == "implicit":
            return [self.decode(_implicit(once, z, backward))]
        found = []
        for _ in range(backward):
            z = torch.lerp(z, once(z).to(z.dtype), damping)
            found.append(self.decode(z))
        return found


def _implicit(once: Callable[[Tensor], Tensor], z: Tensor, terms: int) -> Tensor:
    """One more iteration, whose gradient is that of the fixed point."""
    out = once(z)
    if not out.requires_grad:
        return out
    with torch.enable_grad():
        inner = z.detach().requires_grad_()
        again = once(inner)

    def solve(grad: Tensor) -> Tensor:
        total = grad
        for _ in range(terms):
            (back,) = torch.autograd.grad(again, inner, total, retain_graph=True)
            total = grad + back
        return total

    out.register_hook(solve)
    return out


def _places(rows: int, columns: int, width: int) -> Tensor:
    """Fixed sines and cosines of a patch's row and column: (rows * columns, width)."""
    rates = torch.logspace(0, -4 * (1 - 4 / width), width // 4, dtype=torch.float64)

    def waves(count: int) -> Tensor:
        phase = torch.arange(count, dtype=torch.float64)[:, None] * rates
        return torch.cat([phase.sin(), phase.cos()], 1)

    down, across = waves(rows)[:, None], waves(columns)[None]
    shape = (rows, columns, width // 2)
    return torch.cat([across.expand(shape), down.expand(shape)], 2).reshape(rows * columns, width).float()


@preconditioning("one-level")
class OneLevel(Precond):
    """A generator from pure noise as a denoiser that is defined at ``sigma_max`` alone: see :func:`one_level`."""

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """The picture (B, *shape) of the pure noise ``x``, whose standard deviation is ``sigma_max``.

        A wrong level that lies on another device than the host gives NaN, because an error would have to wait for it.

        Raises:
            InputError: another level.
        """
        told = as64(sigma)
        wrong = (told / self.sigma_max - 1).abs() > 1e-6
        if told.device.type != "cpu":
            made = super().forward(x, sigma, cond)
            return made.masked_fill(wrong.reshape(-1, *[1] * (made.ndim - 1)), math.nan)
        if bool(wrong.any()):
            raise InputError(
                f"this generator makes pictures from pure noise at sigma {self.sigma_max:g} and knows no other level, "
                f"got {float(told[wrong].flatten()[0]):g}: use its own sampler, of one evaluation"
            )
        return super().forward(x, sigma, cond)


def one_level(
    net: nn.Module, shape: Sequence[int], *, sigma_min: float, sigma_max: float, sigma_data: float
) -> OneLevel:
    """``D(x, sigma_max) = net(x / sigma_max)`` for a network from unit noise to pictures.

    ``sigma_min`` only bounds the range that files state.
    """
    bounds: dict[str, Any] = {"sigma_min": sigma_min, "sigma_max": sigma_max, "sigma_data": sigma_data}
    return OneLevel(net, shape, path=EDM, predicts="x0", time="sigma", scale_in=1 / sigma_max, **bounds)


def transformer(size: ViTConfig) -> ViT | GET:
    """The network of this size: a :class:`GET` for a :class:`GETConfig`, otherwise a :class:`ViT`."""
    return GET(size) if isinstance(size, GETConfig) else ViT(size)


def parameters(net: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(math.prod(p.shape) for p in net.parameters())
