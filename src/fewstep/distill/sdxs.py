"""SDXS (arXiv 2403.16627): a smaller U-Net and decoder, then one step by feature matching and segmented scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond, rewrapped, start_std
from fewstep.core.fit import Data, build_models, fit
from fewstep.core.generator import Generator, check_device
from fewstep.core.noise import Noise
from fewstep.core.options import Budget, FitOptions
from fewstep.core.path import widen
from fewstep.core.pipeline import Codec
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.data.pairs import OnlinePairs, Pairs, require_pairs
from fewstep.distill.vsd import VSD
from fewstep.errors import InputError
from fewstep.loss.draw import KarrasUniform, edm_weight
from fewstep.loss.matching import Normaliser, directed, direction
from fewstep.loss.perceptual import Decoded, DigitsDistance, Lpips, distance_of
from fewstep.models.discriminator import discriminator_config
from fewstep.models.frozen import frozen, network_under
from fewstep.models.lora import tree
from fewstep.models.prune import Pruning, TinyCodec, TinyDecoder, TinyDecoderConfig, pruned, shared_taps

WINDOW = 7


@dataclass(frozen=True)
class SDXS(VSD):
    """A pruned student learns the teacher's outputs and features, then one step, from pairs made by the teacher.

    In the second part a sample's comparison level decides what it learns from: below the threshold ``tau`` its pair's
    picture, by the structural similarity of features, above it the scores, as in VSD. The threshold falls from all
    levels to none. Make pairs with `fewstep pairs`. :func:`distill_decoder` makes the small decoder.

    Attributes:
        smaller: prunes the student; without, it has the teacher's network.
        prune: what is left of the network; of BK-SDM and the paper, ``blocks`` 1 and no ``middle``.
        imitate: share of the run in which the student learns the teacher's outputs and features at all levels.
        feature_weight: of the features in that part, relative to the outputs; 0 leaves them out.
        match: weight of the feature matching relative to the scores.
        features: whose maps are matched: teacher, the encoder's of the teacher; pixels, the sample itself; own, the
            packaged network for digits; or the path of published LPIPS weights, for (decoded) pictures.
        tau: threshold at the beginning and end of the second part, as a share of ``draw``; 1 is matching alone, 0 VSD.
        anneal: share of the second part after which the threshold is at its end.
        steps: 1: the student has one step.
        levels: the level that it is evaluated at, alone in a tuple.
        fake_draw: noise levels of the fake score's training, and of the imitation.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = False

    smaller: bool = True
    prune: Pruning = Pruning()
    imitate: float = 0.3
    feature_weight: float = 1.0
    match: float = 1.0
    features: str = "teacher"
    tau: tuple[float, float] = (1.0, 0.0)
    anneal: float = 0.8
    normaliser: Normaliser = "sample"
    draw: KarrasUniform = KarrasUniform(top=0.98, bottom=0.02)
    student: Optim = Optim(lr=1e-4, clip=1.0)
    fake: Optim = Optim(lr=1e-4, clip=1.0)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != 1:
            raise InputError(f"SDXS trains a student of one step, got steps={self.steps}: for more use vsd or dmd2")
        if len(self.tau) != 2 or not all(0 <= t <= 1 for t in self.tau):
            raise InputError(f"SDXS needs tau as two shares in [0, 1], at the beginning and the end, got {self.tau}")
        if not 0 <= self.imitate < 1 or not 0 < self.anneal <= 1:
            raise InputError(f"SDXS needs 0 <= imitate < 1 and 0 < anneal <= 1, got {self.imitate} and {self.anneal}")
        if not 0 <= self.feature_weight < math.inf or not 0 < self.match < math.inf:
            raise InputError(
                f"SDXS needs feature_weight >= 0 and match > 0, finite, got {self.feature_weight} and {self.match}"
            )

    def check(self, teacher: Generator, data: Any) -> Pairs | OnlinePairs:
        """The data, if it is pairs that ``teacher`` made, from the level that the student starts at.

        Raises:
            InputError: see :func:`fewstep.data.pairs.require_pairs`.
        """
        return require_pairs(data, teacher, "SDXS")

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of VSD, the student pruned, and what the features are read from.

        Raises:
            InputError: see :meth:`VSD.roles`, a network that cannot be pruned so, or features that are not there.
        """
        found, made = super().roles(teacher), network_under(teacher.denoiser)
        # Features are read by hooks, on trees of their own: pairs may be made by the teacher's in another thread.
        whole = frozen(rewrapped(teacher.denoiser, cast(Precond, tree(made))))
        found["teacher"] = Role(lambda: whole)
        if self.smaller:
            small = pruned(made, self.prune)
            found["student"] = Role(lambda: copy.deepcopy(small), self.student, self.ema, ships=True)
        if self.feature_weight and self.imitate:
            shared_taps(made, small if self.smaller else made)
        if any(self.tau):
            seen = replace(teacher, denoiser=cast(Precond, tree(made)))
            maps = feature_maps(seen, self.features)
            found["maps"] = Role(lambda: maps)
        return found

    def threshold(self, progress: float) -> float:
        """The share of ``draw`` below which samples learn from their pairs, when ``progress`` of the run is done."""
        done = (progress - self.imitate) / (1 - self.imitate) / self.anneal
        return self.tau[1] if done > 1 - 1e-9 else self.tau[0] + (self.tau[1] - self.tau[0]) * done

    def below(self, share: float, sigma: Tensor) -> Tensor:
        """(B,) which levels lie in the first ``share`` of ``draw``: all of them at 1, none at 0."""
        if share in (0, 1):
            return torch.full_like(sigma, share, dtype=torch.bool)
        d = self.draw
        low, high = d.sigma_min ** (1 / d.rho), d.sigma_max ** (1 / d.rho)
        return sigma < (low + (d.bottom + share * (d.top - d.bottom)) * (high - low)) ** d.rho

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Imitation at first; then the student every ``ratio`` iterations, and the fake score on the same samples.

        Raises:
            InputError: a batch without the noise that its pictures were made from, or of another shape.
        """
        x0, n = _pair(batch, m.student)
        if m.progress < self.imitate:
            yield self.imitation(m, x0, batch.cond, noise.fold("imitate"))
            return
        share = self.threshold(m.progress)
        if share <= 0:
            yield from super().step(m, batch, i, noise)
            return
        (level,), cond, own = self.grid(m.student), batch.cond, noise.fold("student")
        sigma, _ = self.draw(own, m.student.sigma_data)
        low = self.below(share, sigma)
        # Above the threshold a sample starts from fresh noise, exactly as in VSD.
        fresh = noise.normal(m.student.shape, "start")
        start = start_std(m.student, level) * torch.where(widen(low, n) > 0, n.to(fresh), fresh)
        made: list[Tensor] = []
        if i % self.ratio == 0:

            def loss() -> dict[str, Tensor]:
                x = m.student(start, level, cond)
                made.append(x.detach())
                return self.segmented(m, x, x0, sigma, low, share, cond, own)

            yield Update("student", loss)
        if not made:
            with torch.no_grad():
                made.append(m.student(start, level, cond))
        yield self.fake_update(m, made.pop(), batch, noise.fold("fake"))

    def segmented(
        self, m: Models, x: Tensor, x0: Tensor, sigma: Tensor, low: Tensor, share: float, cond: Cond, noise: Noise
    ) -> dict[str, Tensor]:
        """Samples ``x`` that are ``low`` (B,) match ``x0``, the others move along the difference of scores."""
        each = torch.where(low, m.maps(x, x0, cond), 0.0)
        matching = self.match * each.mean()
        if share >= 1:
            return {"loss": matching, "matching": each.detach().mean()}
        with torch.no_grad():
            y = x + widen(sigma, x) * noise.normal(x.shape[1:], "n")
            d_fake, d_teacher = self.estimates(m, y, sigma, cond, noise)
            g = torch.where(widen(low, x) > 0, 0.0, direction(x, d_fake, d_teacher, sigma, self.normaliser))
        fisher = (d_fake - d_teacher).square().mean()
        return {"loss": matching + directed(x, g), "matching": each.detach().mean(), "fisher": fisher}

    def imitation(self, m: Models, x0: Tensor, cond: Cond, noise: Noise) -> Update:
        """The teacher's outputs and features on noised pictures (arXiv 2305.15798), without guidance."""
        sigma, _ = self.fake_draw(noise, m.student.sigma_data)
        weight = widen(edm_weight(sigma, m.student.sigma_data), x0)
        y = x0 + widen(sigma, x0) * noise.normal(x0.shape[1:], "n")
        taps = shared_taps(m.teacher, m.student) if self.feature_weight else ()
        with torch.no_grad():
            aim, wanted = m.teacher.features(y, sigma, cond, taps)

        def loss() -> dict[str, Tensor]:
            out, found = m.student.features(y, sigma, cond, taps)
            output = (weight * (out - aim).square()).mean()
            if not taps:
                return {"loss": output, "output": output.detach()}
            inner = torch.stack([_relative(found[tap], wanted[tap]) for tap in taps]).sum(0).mean()
            total = output + self.feature_weight * inner
            return {"loss": total, "output": output.detach(), "features": inner.detach()}

        return Update("student", loss)


def _pair(batch: Batch, D: Any) -> tuple[Tensor, Tensor]:
    x0, n, want = batch.x, batch.noise, tuple(D.shape)
    if x0 is None or n is None or tuple(x0.shape[1:]) != want or n.shape != x0.shape:
        got = [None if t is None else tuple(t.shape[1:]) for t in (x0, n)]
        raise InputError(
            f"SDXS learns from pairs of a picture and its noise of {want}, got {got[0]} and {got[1]}: make them with "
            "`fewstep pairs`"
        )
    return x0, n


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """(B,) square error of features relative to their own mean square, so that wide layers do not outweigh others."""
    error = (found - wanted).float().square().flatten(1).mean(1)
    return error / wanted.float().square().flatten(1).mean(1).clamp_min(1e-8)


def ssim(x: Tensor, y: Tensor, window: int = WINDOW) -> Tensor:
    """(B,) structural similarity of maps (B, C, h, w), in [-1, 1] and 1 for equal ones (doi 10.1109/TIP.2003.819861).

    Means are taken over a square window, no larger than the maps, with mirrored borders. The lowest value and the range
    are those of each sample's own ``y``: signed maps are shifted to where the measure is defined, and a sample's value
    does not depend on its batch.
    """
    side = min(window, *x.shape[2:])
    side -= 1 - side % 2
    x, y = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (x, y))
    least, most = y.amin((1, 2, 3), keepdim=True), y.amax((1, 2, 3), keepdim=True)
    span = (most - least).clamp_min(1e-3)
    x, y, c1, c2 = x - least, y - least, (0.01 * span) ** 2, (0.03 * span) ** 2

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(t, [side // 2] * 4, mode="reflect"), side, 1)

    mx, my = mean(x), mean(y)
    vx, vy = (mean(x * x) - mx * mx).clamp_min(0), (mean(y * y) - my * my).clamp_min(0)
    alike = (2 * mx * my + c1) / (mx * mx + my * my + c1) * (2 * (mean(x * y) - mx * my) + c2) / (vx + vy + c2)
    return alike.flatten(1).mean(1)


class FeatureMaps(nn.Module):
    """``mean over maps of 1 - SSIM`` between two batches (arXiv 2403.16627): (B,), in [0, 2]."""

    def __init__(self, read: Callable[[Any, Tensor, Cond], list[Tensor]], net: nn.Module | None = None) -> None:
        """``read(net, x, cond)`` takes pictures or latents and their condition to maps (B, C, h, w)."""
        super().__init__()
        self.net, self.read = net, read

    def forward(self, x: Tensor, y: Tensor, cond: Cond) -> Tensor:
        """``x`` and ``y`` (B, ...); ``y``, a target, has no gradient."""
        with torch.no_grad():
            wanted = self.read(self.net, y, cond)
        each = [1 - ssim(f, g) for f, g in zip(self.read(self.net, x, cond), wanted, strict=True)]
        return torch.stack(each).reshape(len(each), len(x), -1).mean(2).mean(0)


def feature_maps(teacher: Generator, features: str) -> FeatureMaps:
    """What matches samples of ``teacher``, see the field of :class:`SDXS`.

    Raises:
        InputError: samples or a network without maps, or what :func:`fewstep.loss.perceptual.distance_of` refuses.
    """
    D, codec = network_under(teacher.denoiser), teacher.codec
    if features == "pixels":
        if len(D.shape) != 3:
            raise InputError(f"features 'pixels' compares pictures (C, H, W), the teacher's are {tuple(D.shape)}")
        return FeatureMaps(lambda net, x, cond: [x])
    if features == "teacher":
        usual = tuple(tap for tap in D.taps if tap.startswith("encoder")) or tuple(D.taps)
        ranks = dict(zip(usual, discriminator_config(teacher, usual).ranks, strict=True)) if usual else {}
        taps = [tap for tap, rank in ranks.items() if rank == 4]
        if not taps:
            raise InputError(
                f"{type(D.net).__name__} has no features (B, C, h, w) to match: set features to pixels, own or the "
                "path of LPIPS weights"
            )
        return FeatureMaps(lambda net, x, cond: [*net.activations(x, net.sigma_min, cond, taps).values()], D)
    distance = distance_of("lpips", D.shape, features, codec=codec)
    inner = distance.distance if isinstance(distance, Decoded) else distance
    if isinstance(inner, DigitsDistance):
        return FeatureMaps(lambda net, x, cond: _spatial(net.net, net.layers, x.reshape(-1, 1, 8, 8)), inner)
    assert isinstance(inner, Lpips)
    return FeatureMaps(lambda net, x, cond: net.features(x if codec is None else codec.decode(x)), inner)


def _spatial(net: nn.Module, layers: Sequence[str], x: Tensor) -> list[Tensor]:
    """The activations (B, C, h, w) of some layers; those without places are left out."""
    found: list[Tensor] = []
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda module, args, out: found.append(out)) for name in layers
    ]
    try:
        net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [out for out in found if out.ndim == 4]


class _Decoding:
    """The training of a small decoder, as :func:`fewstep.core.fit.fit` takes one."""

    needs_data: ClassVar[bool] = True

    def __init__(self, codec: Codec, size: TinyDecoderConfig, optim: Optim, coarse: float, match: float) -> None:
        self.codec, self.size, self.optim, self.coarse, self.match = codec, size, optim, coarse, match

    def roles(self, teacher: Any = None) -> dict[str, Role]:
        """The decoder alone, with fresh weights."""
        return {"decoder": Role(lambda: TinyDecoder(self.size), self.optim, Ema(power=0.05), ships=True)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The codec's own picture of each latent is the target."""
        latents = batch.x
        assert latents is not None
        with torch.no_grad():
            aim = self.codec.decode(latents).float()

        def loss() -> dict[str, Tensor]:
            found = m.decoder(latents)
            output = (found - aim).square().mean()
            fold = min(8, *aim.shape[2:])
            coarse = (F.avg_pool2d(found, fold) - F.avg_pool2d(aim, fold)).abs().mean()
            unlike = (1 - ssim(found, aim)).mean()
            total = output + self.coarse * coarse + self.match * unlike
            return {"loss": total, "output": output.detach(), "ssim": 1 - unlike.detach()}

        yield Update("decoder", loss)


def distill_decoder(
    generator: Generator,
    data: Data,
    *,
    budget: str | int | Budget,
    width: int = 64,
    blocks: int = 3,
    coarse: float = 1.0,
    match: float = 0.1,
    optim: Optim | None = None,
    **options: Any,
) -> TinyCodec:
    """A small decoder that makes of latents what the generator's codec makes of them: for ``replace(g, codec=...)``.

    ``data`` are latents, such as the pairs of the generator. The loss is the mean square error, plus ``coarse`` times
    the absolute error of pictures that are averaged over 8x8 pixels (arXiv 2403.16627), plus ``match`` times
    1 - SSIM. ``options`` are the fields of :class:`fewstep.core.options.FitOptions`.

    Raises:
        InputError: a generator without a codec, data of another shape, bad sizes, or bad options.
        NonFiniteError: training diverged.
    """
    codec, shape = generator.codec, tuple(generator.denoiser.shape)
    if codec is None:
        raise InputError("this generator makes pictures without a codec: there is no decoder to make smaller")
    if tuple(getattr(data, "shape", shape)) != shape:
        raise InputError(f"a decoder of latents {shape} cannot learn from {tuple(getattr(data, 'shape', ()))}")
    if not 0 <= coarse < math.inf or not 0 <= match < math.inf:
        raise InputError(f"distill_decoder needs coarse and match >= 0 and finite, got {coarse} and {match}")
    try:
        chosen = FitOptions(budget=Budget.parse(budget), **options)
    except TypeError as error:
        raise InputError(f"unknown training option: {error}") from None
    check_device(chosen.device)
    with torch.no_grad():
        picture = codec.decode(torch.zeros(1, *shape, device=generator.device))
    size = TinyDecoderConfig(shape[0], picture.shape[1], picture.shape[2] // shape[1], width, blocks)
    method = _Decoding(codec, size, optim or Optim(lr=1e-3, decay="cosine", clip=1.0), coarse, match)
    models = build_models(method.roles(), chosen.device, chosen.seed)
    for _ in fit(cast(Any, method), models, data, chosen, None):
        pass
    return TinyCodec(models.ema("decoder"), codec)
