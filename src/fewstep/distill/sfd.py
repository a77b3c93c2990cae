"""Simple and fast distillation (SFD, arXiv 2409.19681): each big Euler step lands on the teacher's trajectory."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path as Folder
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core import distributed
from fewstep.core.cond import Batch
from fewstep.core.denoiser import Denoiser, Precond, Wrapper, start_std
from fewstep.core.generator import CONFIG, Generator, check_device
from fewstep.core.noise import Noise
from fewstep.core.options import HANDED_ON, Budget
from fewstep.core.path import HIGHEST_PICTURED, Path
from fewstep.core.role import Ema, Losses, Models, Optim, Role, Update
from fewstep.core.sample import trajectory
from fewstep.core.state import Run
from fewstep.core.tableau import Builder, Tableau
from fewstep.data.conditions import ConditionsOnly
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.grid.time import time
from fewstep.loss.perceptual import distance_in, distance_roles
from fewstep.models.extended import extended
from fewstep.models.flow_map import Told
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.dpmpp import dpmpp
from fewstep.solve.euler import euler
from fewstep.train.run import options_of, train

PUBLISHED = 0.006
STEPS = "steps"
Solver = Literal["dpmpp3m", "dpmpp2m", "euler", "student"]
GRIDS, SOLVERS, DISTANCES = ("karras", "native"), ("dpmpp3m", "dpmpp2m", "euler", "student"), ("l1", "l2")


@dataclass(frozen=True)
class SFD:
    """Fine-tunes the teacher so that Euler on few levels follows the teacher's trajectory on many. Data-free.

    Attributes:
        steps: the student's evaluations, 1 to 4 in the paper.
        between: teacher levels put between two of the student's (the paper's M = 3).
        sigma_min: the level that the student arrives at, and that counts as 0. None is the paper's 0.006, or the
            teacher's own smallest level where that is higher, such as 0.03 of Stable Diffusion.
        rho: of the Karras grid.
        optim: the paper's lr is 5e-5 for 50 M parameters; it falls to a tenth at half of the budget.
        ema: the average that ships; the paper keeps none.
        grid: levels even in sigma^(1/rho) (karras, the paper's), or in the time of the teacher's own path (native),
            which a flow model needs, because its pure noise has no place on Karras' grid.
        afs: analytical first step: the first of ``steps + 1`` steps takes x / sqrt(1 + sigma^2) for the slope, which
            needs no evaluation and is not trained.
        solver: of the teacher: dpmpp3m (the paper's), dpmpp2m, euler, or student (of a teacher that SFD trained).
        distance: l1, the paper's, or l2, both means over pixels.
        perceptual: weight of LPIPS in the last step, beside ``distance``; 0, as in the paper's SFD, leaves it out.
        features: of LPIPS: own (the packaged network, for digits), teacher (its taps), or the path of LPIPS weights.
    """

    needs_data: ClassVar[bool] = False
    any_steps: ClassVar[bool] = False

    steps: int = 2
    between: int = 3
    sigma_min: float | None = None
    rho: float = 7.0
    optim: Optim = Optim(lr=2e-4, decay="drop")
    ema: Ema = Ema(power=0.05)
    grid: Literal["karras", "native"] = "karras"
    afs: bool = False
    solver: Solver = "dpmpp3m"
    distance: Literal["l1", "l2"] = "l1"
    perceptual: float = 0.0
    features: str = "own"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.between < 0 or not (self.sigma_min is None or 0 < self.sigma_min < math.inf):
            raise InputError(f"SFD needs steps >= 1, between >= 0 and a finite sigma_min > 0, got {self}")
        if not 0 < self.rho < math.inf or not 0 <= self.perceptual < math.inf:
            raise InputError(f"SFD needs finite rho > 0 and perceptual >= 0, got {self.rho} and {self.perceptual}")
        for what, known in (("grid", GRIDS), ("solver", SOLVERS), ("distance", DISTANCES)):
            if getattr(self, what) not in known:
                raise unknown(what, getattr(self, what), known)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the teacher; guidance around the teacher stays there.

        Raises:
            InputError: see :meth:`ends` and :meth:`levels`, or a teacher without weights.
        """
        made, form = frozen(teacher.denoiser), self.student(network_under(teacher.denoiser))
        self.sampler(teacher)
        return {
            "teacher": Role(lambda: made),
            "student": Role(lambda: copy.deepcopy(form), self.optim, self.ema, ships=True),
            **distance_roles("lpips" if self.perceptual else self.distance, teacher, self.features),
        }

    def student(self, network: Precond) -> Precond:
        """What the student is a copy of."""
        return network

    def ends(self, teacher: Denoiser) -> tuple[float, float]:
        """The lowest and the highest level.

        Raises:
            InputError: ``sigma_min`` is outside of the teacher's levels, or Karras' grid would start at pure noise.
        """
        top, known = teacher.sigma_max, teacher.sigma_min
        low = max(PUBLISHED, known) if self.sigma_min is None else self.sigma_min
        if not known <= low < top:
            raise InputError(
                f"SFD(sigma_min={low:g}) is outside of the teacher's levels, {known:g} to {top:g}: leave sigma_min out"
            )
        if top > HIGHEST_PICTURED and self.grid == "karras":
            last = float(self.levels(low, top)[1][-2])
            raise InputError(
                f"SFD cannot start at sigma {top:g}, the pure noise of a flow model or of zero terminal SNR: Karras' "
                f"grid from there would make its last step from {last:.3g} to {low:g}; choose the grid native"
            )
        return low, top

    def levels(self, sigma_min: float, sigma_max: float, path: Path | None = None) -> tuple[Tensor, Tensor]:
        """The student's levels, one more than its steps, and the teacher's, refined so that they share points.

        Raises:
            InputError: the native grid of a teacher without a path.
        """
        count, stride = self.steps + self.afs, self.between + 1
        if self.grid == "native":
            if path is None:
                raise InputError("the teacher has no path, so no native grid: use the grid karras")
            fine = time(count * stride, sigma_min, sigma_max, path=path, to_zero=False)
        else:
            fine = karras(count * stride, sigma_min, sigma_max, rho=self.rho, to_zero=False)
        return fine[::stride], fine

    def teacher_table(self, fine: Tensor) -> Tableau:
        """The teacher's run over its levels."""
        if self.solver in ("euler", "student"):
            return stride(fine, afs=self.afs and self.solver == "student")
        return dpmpp(fine, 3 if self.solver == "dpmpp3m" else 2, lower_order_final=True)

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """One optimizer step per trained step, each from where the pass that the step before learned from has led."""
        moves, table = _tables(self, *self.ends(m.teacher), _path_of(m.teacher))
        x = start_std(m.teacher, table.start) * noise.normal(m.teacher.shape, "start")
        # The generator is consumed here, inside no_grad, so that no grad mode reaches over a yield of ours.
        stride = self.between + 1
        targets = [s.point for s in trajectory(m.teacher, x, table, batch.cond) if s.k and s.k % stride == 0]
        cond = {**batch.cond, **self.told(x)}
        # What the pass that was learned from reached: the next step starts there, without another pass.
        reached: list[Tensor] = []

        def loss(here: Tensor, k: int) -> Losses:
            point = moves[k](m.student, here, cond, grad=True)
            reached.append(point.detach())
            # The mean instead of the sum leaves Adam unchanged and lr free of the size.
            plain = distance_in(m, self.distance)(point, targets[k]).mean()
            if not self.perceptual or k + 1 < len(moves):
                return plain
            seen = distance_in(m, "lpips")(point, targets[k]).mean()
            return {"loss": plain + self.perceptual * seen, "plain": plain.detach(), "lpips": seen.detach()}

        for k, move in enumerate(moves):
            if move.nfe:
                yield Update("student", partial(loss, x, k))
            with torch.no_grad():
                # A silent step asks no network.
                x = reached.pop() if reached else move(m.student, x, cond)

    def told(self, x: Tensor) -> dict[str, Tensor]:
        """What the student is told beside the teacher's condition."""
        return {}

    def sampler(self, teacher: Generator) -> Tableau:
        """Euler on the student's levels, with the analytical first step if it was trained with one."""
        return stride(self.levels(*self.ends(teacher.denoiser), _path_of(teacher.denoiser))[0], afs=self.afs)


def stride(levels: Tensor, *, afs: bool) -> Tableau:
    """Euler on ``levels``; with ``afs`` the first row is silent and takes the slope of unit-variance data.

    That slope at ``x`` of level ``a`` is ``x / sqrt(1 + a^2)`` (arXiv 2210.05475; as used by 2409.19681), so that
    ``x_b = x + (b - a) x / sqrt(1 + a^2)``.
    """
    if not afs:
        return euler(levels)
    table = Builder(float(levels[0]))
    for k, (a, b) in enumerate(itertools.pairwise(levels.tolist())):
        if k:
            table.row(a, b, {k: b / a}, {k: 1 - b / a})
        else:
            root = math.hypot(1.0, a)
            # (root - a + b) / root without the difference of two large numbers.
            table.row(None, b, {0: (1 / (root + a) + b) / root}, {})
    return table.build("euler-afs")


def _path_of(D: Any) -> Path | None:
    return getattr(D.inner if isinstance(D, Wrapper) else D, "path", None)


@lru_cache(maxsize=16)
def _tables(method: SFD, low: float, top: float, path: Path | None) -> tuple[list[Tableau], Tableau]:
    """The student's single steps and the teacher's whole run, made once."""
    coarse, fine = method.levels(low, top, path)
    whole = stride(coarse, afs=method.afs)
    return [whole[k : k + 1] for k in range(whole.rows)], method.teacher_table(fine)


@dataclass(frozen=True)
class SFDv(SFD):
    """SFD-v: one student for several numbers of evaluations, which it is told.

    Every iteration trains one of ``counts``. The student starts as the teacher whatever it is told.

    Attributes:
        steps: evaluations of the shipped sampler, one of ``counts``; training is the same for all.
        sigma_min: the level that the student arrives at; None is 0.006, or the teacher's smallest if that is higher.
        optim: the paper's lr is 5e-5 for 50 M parameters, over four times the budget of SFD.
        grid: karras, or native for flow models.
        afs: the analytical first step, which the paper's SFD-v has.
        solver: of the teacher: dpmpp3m (the paper's), dpmpp2m or euler.
        counts: the evaluations that are trained, drawn alike; 2 to 5 in the paper.
    """

    any_steps: ClassVar[bool] = True

    afs: bool = True
    counts: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.counts or min(self.counts) < 1 or len(set(self.counts)) < len(self.counts):
            raise InputError(f"SFDv needs different counts >= 1, got {self.counts}")
        if self.steps not in self.counts:
            raise InputError(f"SFDv(steps={self.steps}) is not trained: choose steps among counts {self.counts}")

    def student(self, network: Precond) -> Precond:
        """The network with a zero-started embedding of the number of evaluations.

        Raises:
            InputError: see :class:`fewstep.models.extended.Extended`.
        """
        return extended(network, STEPS)

    def drawn(self, m: Models, i: int) -> int:
        """The number of evaluations of iteration ``i``, on which all parts of a batch agree."""
        return self.counts[int(m.common(i).integers(0, len(self.counts), (), STEPS))]

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """SFD's, for the number of evaluations of this iteration."""
        yield from SFD.step(replace(self, steps=self.drawn(m, i)), m, batch, i, noise)

    def told(self, x: Tensor) -> dict[str, Tensor]:
        """``steps`` (B,)."""
        return {STEPS: torch.full((len(x),), float(self.steps), device=x.device)}

    def ships(self, network: Denoiser) -> Told:
        """The network, told ``steps``."""
        return Told(network, STEPS, [float(self.steps)])


@dataclass(frozen=True)
class SFDOne:
    """SFD in two stages down to one evaluation: the student of several steps is the teacher of the second stage.

    Attributes:
        steps: 1, the evaluations of the student.
        first_steps: evaluations of the first stage's student, an odd number; 5 in the paper.
        share: of the budget that the first stage gets.
        between: teacher levels put between two of the first student's.
        sigma_min: the level that the student arrives at; see SFD.
        rho: of the Karras grid.
        grid: karras, or native for flow models.
        solver: of the first stage's teacher.
        distance: l1 or l2.
        perceptual: weight of LPIPS, which the paper adds to the last step of EDM models; 0 leaves it out.
        features: of LPIPS: own (the packaged network, for digits), teacher (its taps), or the path of LPIPS weights.
        first_optim: of the first stage; the paper's lr is 5e-5.
        optim: of the second stage; the paper's lr is 5e-4.
        ema: the average that ships.
    """

    needs_data: ClassVar[bool] = False
    any_steps: ClassVar[bool] = False

    steps: int = 1
    first_steps: int = 5
    share: float = 0.4
    between: int = 3
    sigma_min: float | None = None
    rho: float = 7.0
    grid: Literal["karras", "native"] = "karras"
    solver: Solver = "dpmpp3m"
    distance: Literal["l1", "l2"] = "l1"
    perceptual: float = 0.0
    features: str = "own"
    first_optim: Optim = Optim(lr=2e-4, decay="drop")
    optim: Optim = Optim(lr=5e-4, decay="drop")
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        if self.steps != 1:
            raise InputError(f"SFDOne ends at 1 evaluation, got steps={self.steps}: use SFD for more")
        if self.first_steps < 3 or self.first_steps % 2 == 0 or not 0 < self.share < 1:
            raise InputError(
                f"SFDOne needs an odd first_steps >= 3 and a share in (0, 1), got {self.first_steps} and {self.share}"
            )
        self.stages()

    def stages(self) -> tuple[SFD, SFD]:
        """The two stages as methods, each with the analytical first step."""
        alike: dict[str, Any] = {name: getattr(self, name) for name in ("sigma_min", "rho", "grid", "distance", "ema")}
        first = SFD(self.first_steps, self.between, optim=self.first_optim, afs=True, solver=self.solver, **alike)
        alike |= {"solver": "student", "perceptual": self.perceptual, "features": self.features}
        return first, SFD(1, (self.first_steps + 1) // 2 - 1, optim=self.optim, afs=True, **alike)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of the first stage, which the second stage shares."""
        return self.stages()[0].roles(teacher)

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The first stage's; :meth:`run` trains both."""
        yield from self.stages()[0].step(m, batch, i, noise)

    def sampler(self, teacher: Generator) -> Tableau:
        """An analytical step and an evaluation."""
        return self.stages()[1].sampler(teacher)

    def run(
        self,
        teacher: Generator,
        data: Any,
        *,
        out: str | Folder,
        budget: str | int | Budget,
        resume: bool = False,
        overwrite: bool = False,
        recipe: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generator:
        """Both stages: ``out`` holds the student, and ``stages/1`` and ``stages/2`` the run folders.

        ``options`` are further ones of :func:`fewstep.train.run.train`. With ``resume`` a finished stage is skipped.

        Raises:
            InputError: see :func:`fewstep.train.run.train` and :meth:`SFD.roles`.
        """
        out, stages, source = Folder(out), self.stages(), ConditionsOnly(teacher.conds)
        for stage in stages:
            stage.roles(teacher)
        whole = options_of(budget, {k: v for k, v in options.items() if k not in HANDED_ON})
        lasting = {k: v for k, v in asdict(whole).items() if k not in ("checkpointing", "offload")}
        body = {**(recipe or {}), "method": type(self).__name__, "settings": asdict(self)}
        body |= {"options": lasting, "from": teacher.fingerprint()}
        distributed.start(check_device(whole.device))
        if distributed.rank() == 0:
            Run.open(out, body, resume=resume, overwrite=overwrite)
        distributed.barrier()
        student, trained = teacher, []
        for k, (stage, share) in enumerate(zip(stages, (self.share, 1 - self.share), strict=True)):
            place, part = out / "stages" / f"{k + 1}", whole.budget.part(share)
            if (place / CONFIG).is_file():
                student = Generator.load(place, device=whole.device)
                student = replace(student, codec=teacher.codec, conds=teacher.conds, pipeline=teacher.pipeline)
            else:
                # The folder is this run's own, so that what is in it is to be gone on with.
                student = train(student, stage, source, out=place, budget=part, resume=True, **options)
            trained.append(student.card["trained"])
        student = replace(student, card={**body, "stages": trained, "trained": trained[-1]})
        if distributed.rank() == 0:
            student.save(out)
        distributed.barrier()
        return student
