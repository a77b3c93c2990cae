"""Conditional diffusion distillation (CoDi, arXiv 2310.01407): a condition and few steps, learned at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Models, Optim, Role, Update
from fewstep.data.conditions import ImageConditions
from fewstep.distill.consistency import Consistency, DistanceName, Target, falling_levels
from fewstep.errors import InputError, unknown
from fewstep.loss.perceptual import distance_in, distance_roles
from fewstep.models.consistency import anchored
from fewstep.models.control import controlled, steerable, whole
from fewstep.models.frozen import frozen, network_under
from fewstep.models.image_conditioned import IMAGE
from fewstep.models.lora import Shared
from fewstep.solve.step import ddim, pictures
from fewstep.train.run import train

Move = Literal["free", "controlled"]
Form = Literal["x0", "noise"]


@dataclass(frozen=True)
class CoDi(Consistency):
    """Trains a control branch on a frozen teacher that knows no pictures, to agree with itself along DDIM's steps.

    One stage: the branch learns what the condition means and the few-step sampler together. The teacher's weights stay
    as they are and stand in memory once. Needs data with pictures as conditions, such as sr-digits.

    Attributes:
        rho: of Karras' grid; the paper's grid is even in a DDPM's time.
        distance: l2 (the paper's), l1, huber or lpips.
        target: the weights of the target: ema (the average ``target_ema``) or self.
        target_ema: the target's average; the paper's 0.99995 goes with 200 000 iterations.
        optim: of the branch; the paper's lr is 8e-6 for a ControlNet of 361 M parameters.
        intervals: of the grid, each of them one DDIM step: 20 or 50 in the paper.
        move: what predicts x0 for that step: free (the frozen teacher, which knows nothing of the picture), or
            controlled (the target).
        form: what agrees, the estimates of x0 (a point at ``sigma_min``) or those of the noise. Equal noise along a
            trajectory means a straight one, so an exact flow leaves the second a loss of the order of the gap squared.
        data_weight: of the squared error to the picture itself; 1 in the published code, 0 leaves it out.
        guidance: (least, greatest) whole scale drawn for each sample, by which both sides move away from the estimate
            without the picture. None is off, as published.
    """

    distance: DistanceName = "l2"
    target: Target = "ema"
    optim: Optim = Optim(lr=1e-4, decay="cosine", clip=1.0)
    intervals: int = 20
    move: Move = "free"
    form: Form = "x0"
    data_weight: float = 1.0
    guidance: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intervals < 1 or not 0 <= self.data_weight < math.inf:
            raise InputError(
                f"CoDi needs intervals >= 1 and data_weight >= 0, got {self.intervals} and {self.data_weight}"
            )
        for what, value, known in (("move", self.move, ("free", "controlled")), ("form", self.form, ("x0", "noise"))):
            if value not in known:
                raise unknown(what, value, known)
        ends = (0, 0) if self.guidance is None else self.guidance
        if len(ends) != 2 or not all(isinstance(end, int) for end in ends) or not 0 <= ends[0] <= ends[1]:
            raise InputError(
                f"CoDi draws a guidance scale from whole numbers 0 <= least <= greatest, got {self.guidance}: give two"
            )

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student is the teacher's network with a fresh branch; it is the branch alone that is a module.

        Raises:
            InputError: the teacher's conditions are no pictures, its network has no branch, LoRA, or see
                :meth:`Consistency.ends`.
        """
        if not isinstance(teacher.conds, ImageConditions):
            raise InputError(
                "CoDi needs to know the pictures that the student will read: "
                "replace(teacher, conds=ImageConditions(data)), which distill(teacher, CoDi(), data, ...) does itself"
            )
        D, shape = network_under(teacher.denoiser), teacher.conds.shape
        if isinstance(D, Shared):
            raise InputError("CoDi trains a control branch and no copy of the teacher: leave LoRA out")
        steerable(D.net)
        made, form = frozen(teacher.denoiser), anchored(D, self.ends(teacher.denoiser)[0])
        average = self.target_ema if self.target == "ema" else None
        student = Role(lambda: controlled(form, shape, held=True), self.optim, self.ema, average, ships=True)
        return {
            "teacher": Role(lambda: made),
            "student": student,
            **distance_roles(self.distance, teacher, self.features),
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """One step of DDIM down the grid, and the target where it lands (algorithm 1)."""
        x0, cond = pictures("CoDi", batch, m.student.shape), batch.cond
        if IMAGE not in cond:
            raise InputError("CoDi learns from data with the condition 'image', such as sr-digits: these have none")
        low, top = self.ends(m.student)
        grid = falling_levels(self.intervals, low, top, self.rho).to(x0.device)
        k = noise.integers(0, self.intervals, (), "level")
        a, b = grid[k], grid[k + 1]
        x_a = x0 + widen(a, x0) * noise.normal(x0.shape[1:], "n")
        scale = None
        if self.guidance is not None:
            scale = noise.integers(self.guidance[0], self.guidance[1] + 1, (), "scale").to(x0)
        other = m.target("student")
        with torch.no_grad():
            moved = m.teacher(x_a, a, unpictured(cond)) if self.move == "free" else other(x_a, a, cond)
            x_b = ddim(x_a, moved, a, b)
            aim = estimate(other, x_b, b, cond, scale)
            if self.form == "noise":
                # At the last level the target is the identity, and the noise that of the step itself.
                last = (b <= low).reshape(-1, *[1] * (x0.ndim - 1))
                aim = torch.where(last, (x_a - x_b) / widen(a - b, x0), (x_b - aim) / widen(b - low, x0))

        def loss() -> dict[str, Tensor]:
            made = estimate(m.student, x_a, a, cond, scale)
            own = made if self.form == "x0" else (x_a - made) / widen(a - low, x0)
            agree = distance_in(m, self.distance)(own, aim).mean()
            error = (made - x0).square().mean()
            return {"loss": agree + self.data_weight * error, "agreement": agree, "error": error}

        yield Update("student", loss)

    def ships(self, network: Any) -> Denoiser:
        """Teacher and branch as one network."""
        return whole(network)

    def run(self, teacher: Generator, data: Any, *, out: Any, budget: Any, **options: Any) -> Generator:
        """The one stage, with the data's pictures as the student's conditions.

        Raises:
            InputError: data without such pictures, or of another size than the teacher's.
        """
        conds = ImageConditions(data)
        if tuple(data.shape) != tuple(teacher.denoiser.shape) and teacher.codec is None:
            raise InputError(
                f"data {data.name!r} are {tuple(data.shape)} and the teacher makes {tuple(teacher.denoiser.shape)}"
            )
        if not isinstance(teacher.conds, ImageConditions):
            if teacher.pipeline is not None:
                raise InputError("the conditions of a pipeline cannot be joined with pictures: pass a teacher without")
            teacher = replace(teacher, conds=conds)
        elif teacher.conds.shape != conds.shape:
            raise InputError(
                f"image conditions of wrong size: the teacher's are {teacher.conds.shape}, those of the data "
                f"{conds.shape}"
            )
        return train(teacher, self, data, out=out, budget=budget, **options)


def unpictured(cond: Cond) -> dict[str, Tensor]:
    """The condition without its picture."""
    return {name: value for name, value in cond.items() if name != IMAGE}


def estimate(D: Any, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], scale: Tensor | None) -> Tensor:
    """``f(x, image)``, or ``f(x) + scale (f(x, image) - f(x))`` with ``scale`` (B,), whose first part has no gradient.

    The published code joins the two conditions in one order and takes the results apart in the other, which guides
    away from the condition; here they are two calls.
    """
    own: Tensor = D(x, sigma, cond)
    if scale is None:
        return own
    with torch.no_grad():
        free: Tensor = D(x, sigma, unpictured(cond))
    return free + widen(scale, x) * (own - free)
