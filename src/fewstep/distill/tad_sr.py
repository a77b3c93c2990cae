"""Super-resolution in one step (TAD-SR, arXiv 2408.07476): scores after a little noise, and heads told of the level."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import start_std
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import HIGHEST_PICTURED, widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.tableau import Tableau
from fewstep.data.conditions import ImageConditions
from fewstep.data.sr import IMAGE
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.grid.own import own_grid, own_levels
from fewstep.loss.gan import Game
from fewstep.loss.matching import directed
from fewstep.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    check_game,
    discriminator_config,
    discriminator_loss,
    generator_loss,
)
from fewstep.models.embed import Embedding
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.consistency import consistency
from fewstep.solve.euler import euler
from fewstep.solve.step import pictures

Score = Literal["difference", "sds", "none"]
SCORES = ("difference", "sds", "none")


@dataclass(frozen=True)
class TADSR:
    """A student of one step for teachers that read a picture: near the teacher's result, sharp, and taken for real.

    Three terms: the square distance to what the teacher's solver makes of the same noise and picture; the difference
    of the teacher's scores at both results after the same small noise, which is where fine detail is decided; and a
    game against heads on the teacher's features that are told the noise level at which they judge.

    Attributes:
        steps: 1: the student has one step.
        teacher_steps: evaluations of the teacher's solver, DDIM, for every picture.
        regression: weight of the square distance to its result, a mean over pixels.
        score: difference, between the student's result and the teacher's (the paper's); sds, between the teacher's
            noise estimate and the noise, which is biased; or none.
        score_weight: of the score term, whose gradient is a difference of noise estimates, a mean over pixels.
        target: what the difference is taken to: teacher, its result, or data, the right picture.
        small: highest level of the score term, a share of the teacher's own time; the paper's are the lowest 3 of 15.
        adversarial: weight of the game; 0 leaves it out.
        game: hinge (the paper's), non-saturating or least-squares.
        judged: highest level at which the heads judge, a share of the teacher's own time.
        time_aware: whether the heads are told the level.
        taps: the features of the teacher that they read; without any the bottleneck.
        hidden: width of the heads.
        student: optimizer of the student; the paper's lr is 5e-5.
        critic: optimizer of the heads.
        ema: the average that ships; the paper's rate is 0.999.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = False

    steps: int = 1
    teacher_steps: int = 15
    regression: float = 1.0
    score: Score = "difference"
    score_weight: float = 1.0
    target: Literal["teacher", "data"] = "teacher"
    small: float = 0.2
    adversarial: float = 0.02
    game: Game = "hinge"
    judged: float = 0.95
    time_aware: bool = True
    taps: tuple[str, ...] = ()
    hidden: int = 64
    student: Optim = Optim(lr=1e-4, warmup=20)
    critic: Optim = Optim(lr=1e-4, warmup=20)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps != 1 or self.teacher_steps < 1:
            raise InputError(
                "TADSR trains a student of one step from a teacher of teacher_steps >= 1, got "
                f"steps={self.steps} and teacher_steps={self.teacher_steps}"
            )
        if self.score not in SCORES:
            raise unknown("score term", self.score, SCORES)
        if self.target not in ("teacher", "data"):
            raise unknown("target of the score term", self.target, ("teacher", "data"))
        if not 0 < self.small <= 1 or not 0 < self.judged <= 1:
            raise InputError(f"TADSR needs shares small and judged in (0, 1], got {self.small} and {self.judged}")
        check_game(
            "TADSR", self.game, (0.0,), self.hidden, regression=self.regression, score_weight=self.score_weight,
            adversarial=self.adversarial,
        )  # fmt: skip
        if not self.regression and not self.adversarial and (self.score == "none" or not self.score_weight):
            raise InputError("TADSR needs one of its terms above 0: regression, score_weight or adversarial")

    @property
    def solves(self) -> bool:
        """Whether any term asks for the teacher's result."""
        return self.regression > 0 or (self.score == "difference" and self.target == "teacher" and self.scores)

    @property
    def scores(self) -> bool:
        """Whether there is a score term."""
        return self.score != "none" and self.score_weight > 0

    def check(self, teacher: Generator, data: Any) -> None:
        """Raises InputError for data without small pictures, or with others than the teacher reads."""
        shape = getattr(data, "image_shape", None)
        if shape is None:
            raise InputError(
                f"TADSR learns from pictures with small ones beside them, and {getattr(data, 'name', 'the data')!r} "
                "has none: take sr-digits, or SuperResolution(data, factor)"
            )
        if isinstance(teacher.conds, ImageConditions) and tuple(shape) != teacher.conds.shape:
            raise InputError(f"the teacher reads pictures of {teacher.conds.shape}, the data's are {tuple(shape)}")

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the network of the teacher, which may be guided.

        Raises:
            InputError: a teacher that reads no pictures, or that declares no such taps.
        """
        if not isinstance(teacher.conds, ImageConditions):
            raise InputError(
                "TADSR distils a teacher that reads small pictures, and this one does not: make one with "
                "fewstep.models.image_conditioned and train it on sr-digits or other SuperResolution data"
            )
        self.table(teacher.denoiser)
        made, whole = network_under(teacher.denoiser), frozen(teacher.denoiser)
        found = {
            "teacher": Role(lambda: whole),
            "student": Role(lambda: copy.deepcopy(made), self.student, self.ema, ships=True),
        }
        if self.adversarial:
            size = discriminator_config(teacher, self.taps, self.hidden)
            heads: type[nn.Module] = TimeAware if self.time_aware else Discriminator
            found["heads"] = Role(lambda: heads(size), self.critic)
        return found

    def table(self, D: Any) -> Tableau:
        """The teacher's solver: DDIM from its highest level, on Karras' grid, or evenly in a flow model's time."""
        if D.sigma_max > HIGHEST_PICTURED:
            return euler(own_grid(D, self.teacher_steps))
        return euler(karras(self.teacher_steps, D.sigma_min, D.sigma_max))

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The student, then the heads on what it made.

        Raises:
            InputError: pictures of another shape, or none beside them.
        """
        x0, cond, level = pictures("TADSR", batch, m.student.shape), batch.cond, float(m.student.sigma_max)
        if IMAGE not in cond:
            raise InputError("TADSR needs small pictures, the condition 'image', and the batch has none")
        start = start_std(m.student, level) * noise.normal(m.student.shape, "start")
        result = self.table(m.teacher)(m.teacher, start, cond) if self.solves else x0
        seen: tuple[Tensor, Tensor] | None = None
        if self.adversarial:
            own = noise.fold("judged")
            at = own_levels(m.teacher, self.judged * own.uniform((), "level", dtype=torch.float64))
            seen = at, widen(at, x0) * own.normal(x0.shape[1:], "n")
        made: list[Tensor] = []

        def loss() -> dict[str, Tensor]:
            x = m.student(start, level, cond)
            made.append(x.detach())
            return self.losses(m, x, result, x0, cond, seen, noise.fold("score"))

        yield Update("student", loss)
        if seen is None:
            return
        at, z = seen

        def judge() -> dict[str, Tensor]:
            return discriminator_loss(m.teacher, told(m.heads, at), x0 + z, made.pop() + z, at, cond, game=self.game)

        yield Update("heads", judge)

    def losses(
        self,
        m: Models,
        x: Tensor,
        result: Tensor,
        x0: Tensor,
        cond: Cond,
        seen: tuple[Tensor, Tensor] | None,
        noise: Noise,
    ) -> dict[str, Tensor]:
        """The student's, of its result ``x``, with a graph, beside the teacher's ``result`` and the right ``x0``."""
        parts: dict[str, Tensor] = {}
        if self.regression:
            parts["regression"] = self.regression * (x - result).square().mean()
        if self.scores:
            g = self.direction(m, x.detach(), result if self.target == "teacher" else x0, cond, noise)
            parts["score"] = self.score_weight * directed(x, g)
        if seen is not None:
            at, z = seen
            heads = told(m.heads, at)
            parts["adversarial"] = self.adversarial * generator_loss(m.teacher, heads, x + z, at, cond, game=self.game)
        shown = {name: part.detach() for name, part in parts.items()}
        return {"loss": torch.stack([*parts.values()]).sum(), **shown}

    @torch.no_grad()
    def direction(self, m: Models, x: Tensor, aim: Tensor, cond: Cond, noise: Noise) -> Tensor:
        """``eps(x + s n) - eps(aim + s n)`` (B, ...), eps the teacher's noise estimate; for sds ``eps(x + s n) - n``.

        Both points have the same noise, so that a student at its aim has no gradient, whatever the teacher's errors.
        """
        sigma = own_levels(m.teacher, self.small * noise.uniform((), "level", dtype=torch.float64))
        n = noise.normal(x.shape[1:], "n", dtype=x.dtype)
        s = widen(sigma, x)
        own = x - m.teacher(x + s * n, sigma, cond)
        if self.score == "sds":
            # eps - n, because eps is (x + s n - D) / s.
            return own / s
        return (own - (aim - m.teacher(aim + s * n, sigma, cond))) / s

    def sampler(self, teacher: Generator) -> Tableau:
        """One evaluation at the teacher's highest level."""
        return consistency(torch.tensor([teacher.denoiser.sigma_max, 0.0], dtype=torch.float64), sigma_min=0.0)


class TimeAware(nn.Module):
    """Heads on a teacher's features that are told the noise level: it scales and shifts what each head has read."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.hidden, 0)
        self.enter, self.modulate, self.leave = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        groups = next(g for g in range(min(32, config.hidden), 0, -1) if config.hidden % g == 0)
        for width, rank in zip(config.widths, config.ranks, strict=True):
            flat = rank != 4
            self.enter.append(
                nn.Sequential(nn.Linear(width, config.hidden), nn.LayerNorm(config.hidden))
                if flat
                else nn.Sequential(nn.Conv2d(width, config.hidden, 3, padding=1), nn.GroupNorm(groups, config.hidden))
            )
            self.modulate.append(nn.Linear(config.hidden, 2 * config.hidden))
            self.leave.append(nn.Linear(config.hidden, 1) if flat else nn.Conv2d(config.hidden, 1, 1))

    def forward(self, features: Mapping[str, Tensor], sigma: Tensor) -> Tensor:
        """Logits (B, n), high for real, of the activations at the taps and the levels ``sigma`` (B,) they are at."""
        dtype = next(self.parameters()).dtype
        emb = nn.functional.silu(self.embed((sigma.to(dtype).log() / 4), {}))
        logits = []
        for k, tap in enumerate(self.config.taps):
            h = self.enter[k](features[tap].to(dtype))
            scale, shift = self.modulate[k](emb).chunk(2, 1)
            if h.ndim == 4:
                scale, shift = scale[:, :, None, None], shift[:, :, None, None]
            elif h.ndim == 3:
                scale, shift = scale[:, None], shift[:, None]
            h = nn.functional.silu(torch.addcmul(shift, h, 1 + scale))
            logits.append(self.leave[k](h).flatten(1))
        return torch.cat(logits, 1)


@dataclass(frozen=True)
class Told:
    """Heads with the levels that they are told, in the form in which losses call heads."""

    heads: TimeAware
    sigma: Tensor

    @property
    def config(self) -> DiscriminatorConfig:
        """That of the heads."""
        return self.heads.config

    def __call__(self, features: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`TimeAware.forward`."""
        logits: Tensor = self.heads(features, self.sigma)
        return logits


def told(heads: Any, sigma: Tensor) -> Any:
    """``heads``, told ``sigma`` (B,) if they listen."""
    return Told(heads, sigma) if isinstance(heads, TimeAware) else heads
