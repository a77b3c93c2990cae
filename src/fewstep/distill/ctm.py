"""Consistency trajectory models (CTM, arXiv 2310.02279): one student jumps between any two levels of a trajectory."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, Precond
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Ema, Losses, Models, Optim, Role, Update
from fewstep.core.tableau import Builder, Tableau
from fewstep.distill.consistency import Consistency, Target, falling_levels
from fewstep.errors import InputError, unknown
from fewstep.loss.draw import LogNormal
from fewstep.loss.dsm import dsm
from fewstep.loss.matching import carried, without_graph
from fewstep.loss.perceptual import distance_in, distance_roles
from fewstep.models.discriminator import Discriminator, discriminator_config, discriminator_loss, generator_loss
from fewstep.models.flow_map import UNTIL, Told, flow_map, jump, landing
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.step import ode_step, pictures

Reach = Literal["soft", "local", "global"]
REACHES = ("soft", "local", "global")
# Keeps the ratio of two gradients finite; the ratio is held below MOST (both from the published code).
SMALL, MOST = 1e-4, 1e4
# Declared after a network's last layer, but no part of the chain that leads to it.
ASIDE = (".terms.", ".logvar.")


@dataclass(frozen=True)
class CTM(Consistency):
    """Trains a student ``G(x, t, s)`` that lands at level s of the trajectory through x at level t. Needs data.

    From noised data at t the teacher goes some steps to u, and the student is asked to jump from t to where it jumps
    from u, at a level s below both. The two are compared after a further jump, by a slow average, to the lowest level.

    Attributes:
        middle: its levels between the first and the last, falling. Without any they are evenly spaced on Karras' grid.
        sigma_min: the lowest level of the grid. None is the published 0.002, or the teacher's smallest level where that
            is higher.
        distance: l2, l1, huber, or lpips, the paper's.
        target: the weights of the jump from u: self (the student's own, as published) or ema (``target_ema``).
        target_ema: the average that jumps from s to the lowest level, on both sides; 0.999 in the paper.
        optim: of the student; the paper's lr is 4e-4 for ImageNet-64, 8e-6 with the adversarial term.
        levels: N, the levels of the grid: 18 for CIFAR-10, 40 for ImageNet-64.
        reach: where the teacher goes: soft is any level between t and s (the paper's), local the next level of the
            grid, global s itself.
        span: most of the teacher's Heun steps, two evaluations each; 17 and 39 in the paper, 20 with the adversarial
            term. How many is drawn once an iteration.
        dsm: weight of the denoising term, 0 for none.
        draw: noise levels of the denoising term, and of what the discriminator sees.
        gan: weight of the adversarial term, 0 for none.
        gan_start: share of the budget after which it starts.
        taps: the teacher's features that the discriminator judges; without any the bottleneck, or a transformer's
            middle block.
        heads: optimizer of the discriminator.
        adaptive: whether each further term is scaled so that its gradient is as large as the consistency term's at the
            last layer. The ratio is that of a micro-batch, as it is that of a device in the published code.
        gamma: of the sampler: 0 follows the trajectory, 1 adds all of each level's noise anew.
    """

    steps: int = 1
    distance: Literal["l2", "l1", "huber", "lpips"] = "huber"
    target: Target = "self"
    target_ema: Ema = Ema(rate=0.999)
    optim: Optim = Optim(lr=4e-4, decay="cosine", clip=1.0)
    levels: int = 18
    reach: Reach = "soft"
    span: int = 17
    dsm: float = 1.0
    draw: LogNormal = LogNormal()
    gan: float = 0.0
    gan_start: float = 0.5
    taps: tuple[str, ...] = ()
    heads: Optim = Optim(lr=2e-3, betas=(0.5, 0.99))
    adaptive: bool = True
    gamma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach not in REACHES:
            raise unknown("reach of the teacher", self.reach, REACHES)
        if self.levels < 2 or self.span < 1:
            raise InputError(f"CTM needs levels >= 2 and span >= 1, got {self.levels} and {self.span}")
        if not (0 <= self.dsm < math.inf and 0 <= self.gan < math.inf):
            raise InputError(f"CTM needs weights dsm >= 0 and gan >= 0, got {self.dsm} and {self.gan}")
        if not 0 <= self.gan_start <= 1 or not 0 <= self.gamma <= 1:
            raise InputError(
                f"CTM needs gan_start and gamma within [0, 1], got {self.gan_start} and {self.gamma}: gamma 0 adds no "
                "noise, 1 all of it"
            )

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the teacher, whatever level it is told to land at; guidance stays with the teacher.

        Raises:
            InputError: see :meth:`Consistency.ends`, :class:`fewstep.models.extended.Extended`,
                :func:`fewstep.loss.perceptual.distance_of`, and
                :func:`fewstep.models.discriminator.discriminator_config`.
        """
        self.ends(teacher.denoiser)
        whole, form = frozen(teacher.denoiser), flow_map(network_under(teacher.denoiser))
        if self.adaptive:
            last_weight(form)
        made = {
            "teacher": Role(lambda: whole),
            "student": Role(lambda: copy.deepcopy(form), self.optim, self.ema, self.target_ema, ships=True),
            **distance_roles(self.distance, teacher, self.features),
        }
        if self.gan:
            size = discriminator_config(teacher, self.taps)
            made["heads"] = Role(lambda: Discriminator(size), self.heads)
        return made

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Algorithm 3: the teacher's steps and the target are taken once, outside of the update."""
        x0, cond = pictures("CTM", batch, m.student.shape), batch.cond
        x_t, t, s, target = self.targets(m, x0, cond, i, noise)
        floor = torch.full_like(s, self.ends(m.student)[0])
        fakes: list[Tensor] = []

        def loss() -> dict[str, Tensor]:
            near = jump(m.student, x_t, t, s, cond)
            made = jump(m.target("student"), near, s, floor, cond)
            parts = {"ctm": distance_in(m, self.distance)(made, target).mean()}
            if self.dsm:
                parts["dsm"] = self.denoising(m.student, x0, cond, noise)
            if self.judging(m):
                fakes.append(made.detach())
                seen, sigma = self.noised(m, made, noise.fold("made"))
                parts["gan"] = generator_loss(m.teacher, m.heads, seen, sigma, cond)
            return self.balanced(m.student, parts)

        yield Update("student", loss, self.in_turn(m, (x0, x_t, t, s, target), cond, noise, fakes))
        if self.judging(m):

            def duel() -> Losses:
                (real, sigma), (fake, _) = self.noised(m, x0, noise, "real"), self.noised(m, fakes.pop(), noise, "fake")
                return discriminator_loss(m.teacher, m.heads, real, fake, sigma, cond)

            yield Update("heads", duel)

    def in_turn(
        self, m: Models, points: tuple[Tensor, ...], cond: Cond, noise: Noise, fakes: list[Tensor]
    ) -> tuple[Callable[[], dict[str, Tensor]], ...]:
        """The student's loss in two parts, the jumps and the denoising, which hold one network's graph at a time.

        The terms on the last landing are followed back to the student's own, and only then is the student's pass made
        with a graph. This costs a forward pass, and spares each adaptive weight a backward pass through the average.
        """
        x0, x_t, t, s, target = points
        floor = torch.full_like(s, self.ends(m.student)[0])
        tops: list[Tensor] = []

        def generate() -> Tensor:
            return jump(m.student, x_t, t, s, cond)

        def jumping() -> dict[str, Tensor]:
            near = without_graph(generate, x_t.device).requires_grad_()
            made = jump(m.target("student"), near, s, floor, cond)
            leaf = made.detach().requires_grad_()
            found = {"ctm": distance_in(m, self.distance)(leaf, target).mean()}
            slopes = {"ctm": torch.autograd.grad(found["ctm"], leaf)[0]}
            if self.judging(m):
                fakes.append(made.detach())
                seen, sigma = self.noised(m, leaf, noise.fold("made"))
                found["gan"] = generator_loss(m.teacher, m.heads, seen, sigma, cond)
                slopes["gan"] = torch.autograd.grad(found["gan"], leaf)[0]
            values = {name: term.detach() for name, term in found.items()}
            back = {k: torch.autograd.grad(made, near, g, retain_graph=len(slopes) > 1)[0] for k, g in slopes.items()}
            # The average's graph must not stand beside the student's.
            del made, found
            again = generate()
            terms = {name: carried(again, back[name], values[name]) for name in values}
            if self.adaptive and self.dsm:
                tops.append(slope(terms["ctm"], last_weight(m.student)))
            return self.balanced(m.student, terms)

        def denoising() -> dict[str, Tensor]:
            term = self.denoising(m.student, x0, cond, noise)
            ratio = balance(tops.pop(), slope(term, last_weight(m.student))) if self.adaptive else 1.0
            return {"loss": self.dsm * ratio * term, "dsm": term}

        return (jumping, denoising) if self.dsm else (jumping,)

    @torch.no_grad()
    def targets(self, m: Models, x0: Tensor, cond: Cond, i: int, noise: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(x_t, t, s, target)``: the point to jump from, the levels (B,) of both ends, and what to compare with."""
        grid = falling_levels(self.levels - 1, *self.ends(m.student), self.rho).to(x0.device)
        count = self.heun_steps(m, i)
        k = noise.integers(0, self.levels - count, (), "level")
        x_t = x = x0 + widen(grid[k], x0) * noise.normal(x0.shape[1:], "n")
        for j in range(count):
            x = ode_step(m.teacher, x, grid[k + j], grid[k + j + 1], cond)
        u = k + count
        share = noise.uniform((), "end", dtype=torch.float64)
        end = u if self.reach == "global" else u + (share * (self.levels - u)).long()
        inner = m.student if self.target == "self" else m.target("student")
        near = jump(inner, x, grid[u], grid[end], cond)
        floor = torch.full_like(grid[k], self.ends(m.student)[0])
        return x_t, grid[k], grid[end], jump(m.target("student"), near, grid[end], floor, cond)

    def heun_steps(self, m: Models, i: int) -> int:
        """The teacher's steps in iteration ``i``: the same for every sample, micro-batch and process.

        A count for each sample would cost as much as the largest, or a wait for the device.
        """
        most = min(self.span, self.levels - 1)
        return 1 if self.reach == "local" else int(m.common(i).integers(1, most + 1, (), "heun steps"))

    def denoising(self, g: Denoiser, x0: Tensor, cond: Cond, noise: Noise) -> Tensor:
        """Eq. 11: the student that lands where it starts is a denoiser."""
        sigma, weight = self.draw(noise.fold("dsm"), g.sigma_data)
        sigma = sigma.clamp(g.sigma_min, g.sigma_max)
        return dsm(g, x0, noise.normal(x0.shape[1:], "dsm n"), sigma, weight, {**cond, UNTIL: sigma})

    def judging(self, m: Models) -> bool:
        """Whether the adversarial term is on now."""
        return self.gan > 0 and m.progress >= self.gan_start

    def noised(self, m: Models, x: Tensor, noise: Noise, own: str = "n") -> tuple[Tensor, Tensor]:
        """``x`` (B, ...) as the discriminator sees it, noised by the noise ``own`` to a drawn level, and the levels."""
        sigma, _ = self.draw(noise.fold("judge"), m.student.sigma_data)
        sigma = sigma.clamp(m.student.sigma_min, m.student.sigma_max)
        return x + widen(sigma, x) * noise.normal(x.shape[1:], "judge", own), sigma

    def balanced(self, student: nn.Module, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the terms as ``loss``, beside each of them (eq. 13 and 14)."""
        total, last = parts["ctm"], last_weight(student)
        top = slope(parts["ctm"], last) if self.adaptive and len(parts) > 1 else None
        for name, weight in (("dsm", self.dsm), ("gan", self.gan)):
            if name in parts:
                ratio = 1.0 if top is None else balance(top, slope(parts[name], last))
                total = total + weight * ratio * parts[name]
        return {"loss": total, **parts}

    def sampler(self, teacher: Generator) -> Tableau:
        """:func:`gamma_sampling` on ``steps`` levels."""
        return self.table(teacher.denoiser)

    def ships(self, network: Precond) -> Told:
        """The student, told where each step of its sampler lands; see :meth:`table` for others."""
        return landing(network, self.table(network), self.ends(network)[0])

    def table(self, D: Denoiser) -> Tableau:
        """The sampler for a denoiser of these levels."""
        low, top = self.ends(D)
        usual = falling_levels(self.steps, low, top, self.rho)[1:-1].tolist()
        return gamma_sampling([top, *(self.middle or usual), 0.0], self.gamma)


def slope(term: Tensor, last: Tensor) -> Tensor:
    """The norm of a term's gradient at the last layer; the term keeps its graph."""
    return torch.autograd.grad(term, last, retain_graph=True)[0].float().norm()


def balance(top: Tensor, own: Tensor) -> Tensor:
    """What a term is multiplied by so that its slope ``own`` becomes ``top`` (eq. 14)."""
    return (top / (own + SMALL)).clamp(0, MOST)


def gamma_sampling(levels: list[float], gamma: float) -> Tableau:
    """Algorithm 2 of arXiv 2310.02279: jump to ``sqrt(1 - gamma^2) b``, then add noise of ``gamma b``.

    ``levels`` fall, the last may be 0. ``gamma`` 0 is Euler's method and 1 multistep consistency sampling; the variance
    of the noise at ``b`` is ``b^2`` for every gamma. One evaluation a step.
    """
    table = Builder(levels[0])
    for k, (a, b) in enumerate(itertools.pairwise(levels)):
        down = math.sqrt((1 - gamma) * (1 + gamma)) * b
        table.row(a, b, {k: down / a}, {k: 1 - down / a}, {k: gamma * b})
    return table.build(f"ctm-gamma{gamma:g}")


def last_weight(network: nn.Module) -> Tensor:
    """The weight matrix of a network's last layer, in the order in which it declares them.

    Raises:
        InputError: it has none.
    """
    found = [p for name, p in network.named_parameters() if p.ndim > 1 and not any(s in f".{name}." for s in ASIDE)]
    if not found:
        raise InputError(f"{type(network).__name__} has no weight matrix: set adaptive=False")
    return found[-1]
