"""Invertible consistency distillation (iCD, arXiv 2406.14539): few steps from noise to a picture, and back."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path as Folder
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.core import distributed
from fewstep.core.cond import Batch, Cond, drop
from fewstep.core.denoiser import Denoiser, Precond
from fewstep.core.fit import Data
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import Budget
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.state import Run, load_weights
from fewstep.core.tableau import Builder, Tableau
from fewstep.distill.tdd import WEIGHTS, Weight, aimed_at, guided_for, own_scale, weight_of
from fewstep.errors import InputError, unknown
from fewstep.grid.own import own_levels, picked
from fewstep.guide.dynamic import SCALE, guided_at
from fewstep.loss.huber import pixel_huber
from fewstep.models.extended import Extended, extended
from fewstep.models.frozen import frozen, network_under, nulls_of
from fewstep.models.lora import Adapted, merge
from fewstep.solve.euler import euler
from fewstep.solve.step import ddim, pictures
from fewstep.train.roles import roles_of
from fewstep.train.run import train

ENCODER = "encoder"


@dataclass(frozen=True)
class ICD:
    """Trains two consistency models: the student from noise to pictures, which ships, and the encoder the other way.

    The teacher's own time (that of its path, or arctan(sigma / sigma_data) where that is the noise level itself) is cut
    into ``steps`` segments of equal length. The student lands from any point of a segment at its lower end, the encoder
    at its upper end. Times are shares of that time. Needs data.

    Attributes:
        steps: segments, and evaluations of either model; 3 or 4 in the paper.
        grid: DDIM steps of the teacher, of which each iteration takes one; 50 in the paper. A multiple of ``steps``.
        scales: guidance scales that the student learns to be told as ``cond["scale"]``, 1 is none; the paper's w of 0,
            7, 11, 15 and 19 are scales 1, 8, 12, 16 and 20. Empty: the student is told none, and a guided teacher's
            scale is folded into it. The encoder's teacher is never guided.
        preserve: weight of the two losses that ask each model to undo the other, 0 for none; 1.5 in the paper.
        null_share: share of examples without their condition, in teacher, student and encoder alike.
        lowest: share of the time at which pictures are taken to be when they are encoded, 0.019 in the paper.
        huber: c of the pixel-wise Huber loss, 0.001 in the paper.
        weight: of an error in an estimate, in the first two of the four losses: landing is the paper's, the difference
            where both land; edm is the inverse of what EDM's preconditioning scales a network's output by, the same for
            every landing, see TDD.
        sigma_max: the highest level; None is the teacher's.
        optim: of the student; the paper's lr is 8e-6 for LoRA of rank 64.
        encoder: of the encoder.
        ema: the average that ships of either; the paper keeps none.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = False

    steps: int = 4
    grid: int = 48
    scales: tuple[float, ...] = ()
    preserve: float = 1.5
    null_share: float = 0.0
    lowest: float = 0.019
    huber: float = 1e-3
    weight: Weight = "landing"
    sigma_max: float | None = None
    optim: Optim = Optim(lr=1e-4, clip=1.0)
    encoder: Optim = Optim(lr=1e-4, clip=1.0)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.grid < 2 * self.steps or self.grid % self.steps:
            raise InputError(
                f"ICD needs steps >= 1 and a grid of a multiple of it, at least twice, got {self.steps} and {self.grid}"
            )
        if not 0 < self.lowest < 1 / self.grid + 1e-12:
            raise InputError(f"ICD(lowest={self.lowest:g}) must be above 0 and at most one step of the grid")
        if not (0 <= self.preserve < math.inf and 0 < self.huber < math.inf and 0 <= self.null_share <= 1):
            raise InputError(f"ICD needs preserve >= 0, huber > 0 and null_share within [0, 1], got {self}")
        if any(not 0 <= s < math.inf for s in self.scales):
            raise InputError(f"ICD needs guidance scales >= 0 (1 is none), got {self.scales}")
        if self.weight not in WEIGHTS:
            raise unknown("weight", self.weight, WEIGHTS)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Student and encoder start as the network of the teacher.

        Raises:
            InputError: scales for an unconditional or a guided teacher, or levels that the teacher does not have.
        """
        D = teacher.denoiser
        own_levels(D, torch.zeros(1), self.sigma_max)
        made = network_under(D)
        # A scale other than 1 asks for what guidance asks for; at scale 1 the wrapper holds the null values alone.
        guided_for(teacher, next((s for s in self.scales if s != 1), 1.0), "ICD")
        whole, form = frozen(guided_for(teacher, 1.0, "ICD")), extended(made, SCALE) if self.scales else made
        return {
            "teacher": Role(lambda: whole),
            "student": Role(lambda: copy.deepcopy(form), self.optim, self.ema, ships=True),
            ENCODER: Role(lambda: copy.deepcopy(made), self.encoder, self.ema),
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Eq. 8 for both models, then eq. 9 for both: four updates, or two without ``preserve``."""
        x0, cond = pictures("ICD", batch, m.student.shape), dict(batch.cond)
        if self.null_share:
            cond = drop(cond, noise.uniform((), "null") < self.null_share, nulls_of(m.teacher))
        yield self.consistent(m, "student", x0, cond, noise.fold("down"), -1)
        yield self.consistent(m, ENCODER, x0, cond, noise.fold("up"), 1)
        if self.preserve:
            yield self.preserving(m, ENCODER, x0, cond, noise.fold("kept up"))
            yield self.preserving(m, "student", x0, cond, noise.fold("kept down"))

    def consistent(self, m: Models, name: str, x0: Tensor, cond: Cond, noise: Noise, way: int) -> Update:
        """``J(x_a, a, c)`` against ``J(x_b, b, c)``: the teacher's step from a to b, then to the segment's end c.

        ``way`` -1 is towards the picture and 1 towards noise. Both are compared as the estimates at a that land there,
        see :func:`fewstep.distill.tdd.aimed_at`: a teacher's step that reaches c has its own estimate as the target.
        """
        model: Any = m.networks[name]
        per = self.grid // self.steps
        j = noise.integers(1, self.grid + 1, (), "level") if way < 0 else noise.integers(0, self.grid, (), "level")
        end = (j - 1) // per * per if way < 0 else (j // per + 1) * per
        # Encoding starts at the lowest share; going down, 0 is the picture itself.
        a, b, c = (self.at(m.student, k, way) for k in (j, j + way, end))
        scale = self.drawn(noise) if way < 0 else None
        told = informed(model, x0, cond, scale)
        x_a = x0 + widen(a, x0) * noise.normal(x0.shape[1:], "n")
        with torch.no_grad():
            taught = teach(m.teacher, x_a, a, cond, scale, plain=way > 0)
            x_b = ddim(x_a, taught, a, b)
            # The network has no level 0, and its answer there counts nothing.
            aim = aimed_at(model(x_b, b.clamp(min=model.sigma_min), told), taught, a, b, c)
        weight = widen(weight_of(self.weight, model, a, c), x_a)

        def loss() -> Tensor:
            return pixel_huber(weight * (model(x_a, a, told) - aim), self.huber).mean()

        return Update(name, loss)

    def preserving(self, m: Models, name: str, x0: Tensor, cond: Cond, noise: Noise) -> Update:
        """``name`` must undo what the other model does to noised data at one end of a random segment."""
        per, up = self.grid // self.steps, name == ENCODER
        k = noise.integers(0, self.steps, (), "segment")
        # Neither model starts from 0, so the lowest end is where encoding starts.
        low, high = self.at(m.student, k * per, 1), self.at(m.student, (k + 1) * per, 1)
        start, there = (high, low) if up else (low, high)
        model: Any = m.networks[name]
        other = m.student if up else m.networks[ENCODER]
        x = x0 + widen(start, x0) * noise.normal(x0.shape[1:], "n")
        told = informed(model, x0, cond)
        with torch.no_grad():
            y = ddim(x, other(x, start, informed(other, x0, cond)), start, there)

        def loss() -> Tensor:
            back = ddim(y, model(y, there, told), there, start)
            # In the network's own state, as the paper does: at high noise the difference would count far more.
            return self.preserve * pixel_huber(widen(own_scale(model, start), x) * (back - x), self.huber).mean()

        return Update(name, loss)

    def drawn(self, noise: Noise) -> Tensor | None:
        """A guidance scale (B,) for each sample, where there are any."""
        if not self.scales:
            return None
        return picked(noise.integers(0, len(self.scales), (), "scale"), self.scales).float()

    def at(self, D: Denoiser, k: Tensor, way: int = 1) -> Tensor:
        """The level of place ``k`` (0 .. grid) of the grid; place 0 is level 0 going down, ``lowest`` going up."""
        share = k.double() / self.grid
        levels = own_levels(D, share.clamp(min=self.lowest), self.sigma_max)
        return levels if way > 0 else torch.where(k == 0, torch.zeros_like(levels), levels)

    def ends(self, D: Denoiser, way: int) -> Tensor:
        """(steps + 1,) float64: the ends of the segments, falling to 0 for ``way`` -1, rising from ``lowest`` for 1."""
        places = torch.arange(self.steps + 1) * (self.grid // self.steps)
        return self.at(D, places, 1) if way > 0 else self.at(D, places, -1).flip(0)

    def sampler(self, teacher: Generator) -> Tableau:
        """DDIM on the ends of the segments."""
        return euler(self.ends(teacher.denoiser, -1))

    def run(
        self, teacher: Generator, data: Data | None, *, out: str | Folder, budget: str | int | Budget, **options: Any
    ) -> Generator:
        """Trains both; ``out`` is the student and ``out/encoder`` a generator folder of the encoder.

        Raises:
            InputError: see :func:`fewstep.train.run.train`.
        """
        if data is None:
            raise InputError("ICD learns from data and got none: pass data, e.g. --data digits")
        made = train(teacher, self, data, out=out, budget=budget, **options)
        if distributed.rank() == 0:
            encoder = self.trained_encoder(teacher, Folder(out), options)
            replace(encoder, card={**made.card, "role": ENCODER}).save(Folder(out) / ENCODER)
        distributed.barrier()
        return made

    def trained_encoder(self, teacher: Generator, out: Folder, options: Any) -> Generator:
        """The encoder's average from the newest checkpoint of the run in ``out``."""
        role = roles_of(self, teacher, options.get("lora"), options.get("lora_roles"))[ENCODER]
        found = Run(out).latest()
        if found is None:
            raise InputError(f"{out} has no checkpoint to take the encoder from")
        network: nn.Module = role.start().to(teacher.device)
        load_weights(network, found[1][f"roles/{ENCODER}.ema"], out)
        network = merge(network) if isinstance(network, Adapted) else network
        assert isinstance(network, Precond)
        return replace(teacher, denoiser=network.eval().requires_grad_(False), sampler=rising(self.ends(network, 1)))


def reads(D: nn.Module, name: str) -> bool:
    """Whether the network is told ``name`` in its condition."""
    return any(isinstance(net, Extended) and name in net.config.inputs for net in D.modules())


def informed(D: nn.Module, x: Tensor, cond: Cond, scale: Tensor | None = None) -> dict[str, Tensor]:
    """The condition of ``x`` (B, ...) as ``D`` takes it: a network that reads guidance scales is told one, or 1."""
    if not reads(D, SCALE):
        return dict(cond)
    return {**cond, SCALE: torch.ones(len(x), device=x.device) if scale is None else scale}


def teach(teacher: Any, x: Tensor, a: Tensor, cond: Cond, scale: Tensor | None, *, plain: bool) -> Tensor:
    """The teacher's estimate (B, ...) under guidance of ``scale`` (B,), in one evaluation where it reads scales.

    ``plain`` is the network without the guidance that is wrapped around it.
    """
    if scale is not None and not reads(teacher, SCALE):
        return guided_at(teacher, x, a, cond, scale, nulls_of(teacher))
    asked = getattr(teacher, "network", teacher) if plain else teacher
    made: Tensor = asked(x, a, informed(teacher, x, cond, scale))
    return made


def rising(levels: Tensor) -> Tableau:
    """Euler's steps through rising levels (K + 1,), from above 0: DDIM's inversion, one evaluation a step."""
    table = Builder(float(levels[0]))
    for k, (a, b) in enumerate(itertools.pairwise(levels.tolist())):
        table.row(a, b, {k: b / a}, {k: 1 - b / a})
    return table.build("euler-inversion")


@torch.no_grad()
def encode(encoder: Generator, pictures: Tensor, cond: Cond | None = None) -> Tensor:
    """The noise (B, *shape), at the top level, that the student makes ``pictures`` of again.

    ``pictures`` (B, C, H, W) in [-1, 1], or whatever the codec encodes; ``encoder`` is the folder ``encoder`` of a run,
    or any generator with a rising sampler (:func:`rising`): with the teacher that is DDIM's inversion.

    Raises:
        InputError: pictures of another shape, or a sampler that does not rise.
    """
    x = pictures if encoder.codec is None else encoder.codec.encode(pictures)
    shape, table = tuple(encoder.denoiser.shape), encoder.sampler
    if tuple(x.shape[1:]) != shape:
        raise InputError(f"encode takes pictures of {shape}, as the network does, got {tuple(x.shape[1:])}")
    if not table.start < table.end:
        raise InputError(f"encode needs a sampler that rises from low noise, got {table.start:g} to {table.end:g}")
    return table(encoder.denoiser, x.to(encoder.device), cond)


@torch.no_grad()
def edit(
    student: Generator, encoder: Generator, pictures: Tensor, source: Cond | None = None, target: Cond | None = None
) -> Tensor:
    """``pictures`` (B, C, H, W), encoded under the condition ``source`` and made again under ``target``.

    The same condition twice reconstructs them. Dynamic guidance is the student's own: wrap its denoiser in
    :class:`fewstep.guide.dynamic.DynamicGuidance`. Returns pictures of the same shape, not clamped.

    Raises:
        InputError: see :func:`encode`, or models whose top levels differ.
    """
    x = encode(encoder, pictures, source)
    if not math.isclose(encoder.sampler.end, student.sampler.start, rel_tol=1e-6):
        raise InputError(
            f"the encoder ends at sigma {encoder.sampler.end:g} and the student starts at {student.sampler.start:g}"
        )
    return student.decode(student.sampler(student.denoiser, x, target), student.sampler.end)
