"""Sampling by particles that move downhill in maximum mean discrepancy, between features told of the noise level.

MMD gradient flow (arXiv 1906.04370) and its noise-adaptive form, DMMD (arXiv 2405.06780).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser, Precond, module_of
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.sample import OnStep, Step
from fewstep.core.stored import stored
from fewstep.errors import InputError, unknown

Kernel = Literal["linear", "gaussian", "quadratic", "distance"]
Pace = Literal["constant", "unit"]
# Pictures whose features are computed at once, and points whose kernels are.
BLOCK, ROWS = 512, 4096


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (..., n, m) of (..., n, d) and (..., m, d)."""
    apart = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    return apart.clamp_min(0)


# Of (..., n, d), (..., m, d) and a width: (..., n, m).
KERNELS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "linear": lambda x, y, width: x @ y.mT / width**2,
    "gaussian": lambda x, y, width: (-_squares(x, y) / (2 * width**2)).exp(),
    "quadratic": lambda x, y, width: 1 / (1 + _squares(x, y) / (2 * width**2)),
    # The small number keeps the slope of the root finite where two points meet.
    "distance": lambda x, y, width: -(_squares(x, y) / width**2 + 1e-12).sqrt(),
}


def check_kernel(kernel: str, widths: Sequence[float]) -> None:
    """Raises InputError for an unknown kernel, or widths that are none, not finite or not above 0."""
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    if not widths or not all(0 < width < math.inf for width in widths):
        raise InputError(f"a kernel needs one width or more, finite and above 0, got {tuple(widths)}")


def gram(x: Tensor, y: Tensor, kernel: str = "linear", widths: Sequence[float] = (1.0,)) -> Tensor:
    """The kernel of all pairs, (..., n, m), of ``x`` (..., n, d) and ``y`` (..., m, d): its mean over ``widths``."""
    return torch.stack([KERNELS[kernel](x, y, width) for width in widths]).mean(0)


def mmd2(
    x: Tensor, y: Tensor, kernel: str = "linear", widths: Sequence[float] = (1.0,), *, paired: bool = False
) -> Tensor:
    """Unbiased squared MMD (...,) of ``x`` (..., n, d) and ``y`` (..., m, d); it may be negative.

    Gretton et al. 2012 (JMLR 13), lemma 6. ``paired`` says that row i of both came of the same example, so that their
    kernel is left out too (eq. 4 there, which needs n = m) and the rest is independent.

    Raises:
        InputError: fewer than two rows, other features, or rows that cannot be paired.
    """
    check_kernel(kernel, widths)
    n, m = x.shape[-2], y.shape[-2]
    if min(n, m) < 2 or x.shape[-1] != y.shape[-1] or (paired and n != m):
        raise InputError(
            f"an unbiased MMD needs two rows or more of the same features{', as many of both' * paired}, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if kernel == "linear" and len(widths) == 1:
        # Sums over pairs are squares of sums: no pair is formed.
        return _linear_mmd2(x / widths[0], y / widths[0], paired)

    def pairs(k: Tensor) -> Tensor:
        return (k.sum((-1, -2)) - k.diagonal(dim1=-2, dim2=-1).sum(-1)) / (k.shape[-1] * (k.shape[-1] - 1))

    cross = gram(x, y, kernel, widths)
    between = pairs(cross) if paired else cross.mean((-1, -2))
    return pairs(gram(x, x, kernel, widths)) + pairs(gram(y, y, kernel, widths)) - 2 * between


def _linear_mmd2(x: Tensor, y: Tensor, paired: bool) -> Tensor:
    def own(f: Tensor) -> Tensor:
        n = f.shape[-2]
        return (f.sum(-2).square().sum(-1) - f.square().sum((-1, -2))) / (n * (n - 1))

    return own(x - y) if paired else own(x) + own(y) - 2 * (x.mean(-2) * y.mean(-2)).sum(-1)


def witness(
    z: Tensor,
    particles: Tensor,
    data: Tensor,
    kernel: str = "linear",
    widths: Sequence[float] = (1.0,),
    *,
    among: bool = False,
) -> Tensor:
    """``mean_j k(z, particle_j) - mean_i k(z, data_i)`` (..., n): positive where there are too many particles.

    ``z`` (..., n, d), ``particles`` (..., p, d) and ``data`` (..., m, d). With ``among`` ``z`` are the particles
    themselves, and none counts itself.
    """
    k = gram(z, particles, kernel, widths)
    near = (k.sum(-1) - k.diagonal(dim1=-2, dim2=-1)) / (k.shape[-1] - 1) if among else k.mean(-1)
    return near - gram(z, data, kernel, widths).mean(-1)


def witness_slope(
    f: Tensor, particles: Tensor | None, data: Tensor, kernel: str = "linear", widths: Sequence[float] = (1.0,)
) -> Tensor:
    """The gradient (n, d) of :func:`witness` at ``f`` (n, d), without a graph and in blocks of points.

    Without ``particles`` (p, d) they are ``f`` themselves, each held while the others move and none counting itself.
    """
    if particles is not None:
        return _pull(f, particles, kernel, widths) - _pull(f, data, kernel, widths)
    own = _pull(f[:, None], f[:, None], kernel, widths)[:, 0]
    others = (_pull(f, f, kernel, widths) * len(f) - own) / (len(f) - 1)
    return others - _pull(f, data, kernel, widths)


def _pull(f: Tensor, points: Tensor, kernel: str, widths: Sequence[float]) -> Tensor:
    """The gradient of the mean kernel between ``f`` (..., n, d) and ``points`` (..., m, d), which are held."""
    if kernel == "linear":
        mean = points.mean(-2, keepdim=True) * sum(1 / width**2 for width in widths) / len(widths)
        return mean.expand_as(f)
    total = torch.zeros_like(f)
    for part in points.detach().split(ROWS, -2):
        with torch.enable_grad():
            leaf = f.detach().requires_grad_(True)
            total += torch.autograd.grad(gram(leaf, part, kernel, widths).sum(), leaf)[0]
    return total / points.shape[-2]


def critic_of(D: Any) -> Precond:
    """The network with features under a denoiser.

    Raises:
        InputError: it has none.
    """
    found = module_of(D)
    if not isinstance(found, Precond) or not hasattr(found.net, "of"):
        kind = type(found.net if isinstance(found, Precond) else D).__name__
        raise InputError(f"{kind} has no features for particles: make some with fewstep.train.dmmd.featured")
    return found


def features_of(D: Any, y: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
    """phi(y, sigma) (B, d) of points ``y`` (B, *shape), any of them clean or noisy, at levels ``sigma`` () or (B,).

    ``y`` stands in the coordinates of the denoiser's path, ``a x0 + b n``: there clean and noisy points are of one
    size, and the network has to tell them apart by what they show. The forward pass ends at the last tap.
    """
    critic = critic_of(D)
    net: Any = critic.net
    x = y / widen(critic.path.coeffs(critic.path.at(sigma)).a, y)
    found: Tensor = net.of(critic.activations(x, sigma, cond, net.config.taps))
    return found


def mixed(D: Any, x0: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
    """``a x0 + b n`` (B, ...) at levels ``sigma`` () or (B,), in the coordinates of the denoiser's path."""
    path = critic_of(D).path
    c = path.coeffs(path.at(sigma))
    return widen(c.a, x0) * x0 + widen(c.b, x0) * n


@stored("particle-flow")
class ParticleFlow:
    """Moves a population of noise to the data: ``z <- z - eta grad f(z)``, f the witness at the level of the moment.

    A :class:`fewstep.core.sample.Sampler`, with one difference: where ``population`` is set, every particle feels all
    others of its batch, so that a picture depends on the batch that it was made in, and the batch should be large.
    Without it the mean features of noised data stand in for the others', and each picture stands for itself (the
    paper's approximate sampling, for the linear kernel alone).

    The features come from the network (``learned``, see :func:`features_of`), or are the pixels, which is MMD flow
    with a fixed kernel. What the particles move towards is ``data`` (m, *shape), or for the linear kernel its mean
    features, ``clean`` and ``noised`` (L, d), that :meth:`embedded` computes once.

    Args:
        levels: falling noise levels (L,), the first where the noise starts.
        moves: moves at each level; one is one forward and one backward pass of the network.
        rate: length of a move. With pace "unit" in units in which all moves at a level together are as long as the
            way of a noised picture from this level to the next; with "constant" it is eta itself.
        pace: "unit" divides the gradients by their mean norm over the population, "constant" by nothing.
        population: see above.
        learned: whether the features are the network's.
        kernel: linear, gaussian, quadratic (rational) or distance (energy).
        widths: of the kernel, in units of features; the mean over them.
        data: (m, *shape), see above.
        clean: (L, d), see above.
        noised: (L, d), see above.

    Raises:
        InputError: levels that do not fall, moves or rates below what is possible, or settings that do not go together.
    """

    kind = "particle-flow"
    end = 0.0

    def __init__(
        self,
        levels: Sequence[float],
        *,
        moves: int = 10,
        rate: float = 1.0,
        pace: Pace = "unit",
        population: bool = True,
        learned: bool = True,
        kernel: Kernel = "linear",
        widths: Sequence[float] = (1.0,),
        data: Tensor | None = None,
        clean: Tensor | None = None,
        noised: Tensor | None = None,
    ) -> None:
        self.levels = [float(level) for level in levels]
        falling = all(0 < b < a < math.inf for a, b in itertools.pairwise([*self.levels, 1e-300]))
        if not self.levels or not falling or moves < 1 or not 0 < rate < math.inf:
            raise InputError(
                "a particle flow needs falling levels above 0, moves >= 1 and rate > 0, got "
                f"{self.levels}, {moves} and {rate}"
            )
        if pace not in ("constant", "unit"):
            raise unknown("pace", pace, ("constant", "unit"))
        check_kernel(kernel, widths)
        if not population and (kernel != "linear" or not learned):
            raise InputError(
                "particles that do not feel each other (population=False) need learned features and the linear "
                f"kernel, whose means can be computed beforehand, got kernel {kernel!r} and learned={learned}"
            )
        self.moves, self.rate, self.pace, self.population = int(moves), float(rate), pace, bool(population)
        self.learned, self.kernel, self.widths = bool(learned), kernel, tuple(float(w) for w in widths)
        self.data, self.clean, self.noised = data, clean, noised

    @property
    def start(self) -> float:
        """The noise level of the start."""
        return self.levels[0]

    @property
    def nfe(self) -> int:
        """Passes through the network, each forward and backward."""
        return len(self.levels) * self.moves

    def settings(self) -> dict[str, Any]:
        """JSON-able: what this was made of, without the tensors."""
        names = ("levels", "moves", "rate", "pace", "population", "learned", "kernel")
        return {**{name: getattr(self, name) for name in names}, "widths": list(self.widths)}

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :class:`fewstep.core.stored.Stored`."""
        held = {"data": self.data, "clean": self.clean, "noised": self.noised}
        return self.settings(), {name: tensor for name, tensor in held.items() if tensor is not None}

    @classmethod
    def from_parts(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ParticleFlow:
        """See :class:`fewstep.core.stored.Stored`."""
        held: dict[str, Any] = {**fields, **tensors}
        return cls(**held)

    @torch.no_grad()
    def embedded(self, D: Denoiser, data: Tensor | None = None, *, draws: int = 1, seed: int = 0) -> ParticleFlow:
        """The same flow with the mean features of ``data`` (m, *shape), its own without, and none of the pictures.

        ``draws`` noises are drawn for each picture; features of clean pictures have no chance in them.

        Raises:
            InputError: a kernel that is not linear, features that are pixels, or no pictures.
        """
        if self.kernel != "linear" or not self.learned:
            raise InputError(f"only a linear kernel on learned features has means to keep, this one is {self.kernel!r}")
        pictures = self._pictures(D, data)
        means = [self._means(D, pictures, k, draws, seed) for k in range(len(self.levels))]
        clean, noisy = (torch.stack(part) for part in zip(*means, strict=True))
        return ParticleFlow(**self.settings(), clean=clean, noised=noisy)

    def _means(self, D: Any, pictures: Tensor, k: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """The mean features (d,) of clean and of noised pictures at level number ``k``."""
        sigma = torch.tensor(self.levels[k], dtype=torch.float64)
        clean, noisy = [], []
        for ids in torch.arange(len(pictures)).split(BLOCK):
            x0 = pictures[ids.to(pictures.device)]
            clean.append(features_of(D, x0, sigma).sum(0))
            for draw in range(draws):
                n = Noise.of(seed, ids, x0.device).normal(x0.shape[1:], "embedded", k, draw)
                noisy.append(features_of(D, mixed(D, x0, n, sigma), sigma).sum(0) / draws)
        return torch.stack(clean).sum(0) / len(pictures), torch.stack(noisy).sum(0) / len(pictures)

    def _pictures(self, D: Any, data: Tensor | None = None) -> Tensor:
        data = self.data if data is None else data
        if data is None:
            raise InputError(
                "a particle flow needs what it moves towards: pass data= (m, C, H, W), or the mean features that "
                "ParticleFlow.embedded(D, data) keeps"
            )
        if tuple(data.shape[1:]) != tuple(D.shape):
            raise InputError(
                f"a particle flow of {tuple(D.shape)} cannot move towards pictures {tuple(data.shape[1:])}"
            )
        place = next(critic_of(D).parameters()).device if self.learned else data.device
        return data.to(place, torch.float32)

    def __call__(
        self,
        D: Denoiser,
        x: Tensor,
        cond: Cond | None = None,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """See :class:`fewstep.core.sample.Sampler`; the rows of ``x`` (B, *shape) are the population.

        Raises:
            InputError: nothing to move towards, a network without features, a condition, or one particle alone.
        """
        if cond:
            raise InputError(f"a particle flow is unconditional: it cannot take {sorted(cond)}")
        if self.population and len(x) < 2:
            raise InputError("one particle is no population: sample two or more at once, or set population=False")
        path = critic_of(D).path if self.learned else None
        y = x.float()
        y = y if path is None else y * float(path.coeffs(path.at(self.start)).a)
        for k, level in enumerate(self.levels):
            slope, length = self._slope(D, k, y), self._length(D, k)
            shown = 1.0 if path is None else float(path.coeffs(path.at(level)).a)
            if on_step is not None:
                on_step(Step(k * self.moves, level, y / shown, None))
            for _ in range(self.moves):
                g = slope(y)
                if self.pace == "unit":
                    g = g / g.flatten(1).norm(dim=1).mean().clamp_min(1e-12)
                y = y - length * g
        if on_step is not None:
            on_step(Step(self.nfe, self.end, y, None))
        return y

    def _length(self, D: Any, k: int) -> float:
        """What a gradient at level number ``k`` is multiplied by."""
        if self.pace == "constant":
            return self.rate
        root, moves = math.sqrt(math.prod(D.shape)), self.moves
        if not self.learned:
            # Pixels have no path: all levels together are as long as the noise that the particles start as.
            return self.rate * self.start * root / (moves * len(self.levels))
        path, below = critic_of(D).path, self.levels[k + 1] if k + 1 < len(self.levels) else 0.0
        here = path.coeffs(path.at(self.levels[k]))
        a, b = (1.0, 0.0) if below == 0 else map(float, path.coeffs(path.at(below))[:2])
        return self.rate * root * math.hypot((float(here.a) - a) * D.sigma_data, float(here.b) - b) / moves

    def _slope(self, D: Any, k: int, y: Tensor) -> Callable[[Tensor], Tensor]:
        """The gradient of the witness at level number ``k`` as a function of the population."""
        sigma = torch.tensor(self.levels[k], dtype=torch.float64)

        def phi(z: Tensor) -> Tensor:
            return features_of(D, z, sigma) if self.learned else z.flatten(1)

        target, others = self._target(D, k, phi)

        def slope(y: Tensor) -> Tensor:
            with torch.enable_grad():
                z = y.detach().requires_grad_(True)
                f = phi(z)
            g = witness_slope(f.detach(), others, target, self.kernel, self.widths)
            return torch.autograd.grad(f, z, g)[0]

        return slope

    def _target(self, D: Any, k: int, phi: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Features (m, d) to move towards, one row of means where that is enough; and those of others, if held."""
        if self.clean is not None and self.noised is not None:
            place = next(critic_of(D).parameters()).device
            clean, others = self.clean[k].to(place)[None], self.noised[k].to(place)[None]
            return clean, None if self.population else others
        pictures = self._pictures(D)
        with torch.no_grad():
            if self.kernel == "linear" and self.learned:
                clean, others = self._means(D, pictures, k, 1, 0)
                return clean[None], None if self.population else others[None]
            return torch.cat([phi(part) for part in pictures.split(BLOCK)]), None
