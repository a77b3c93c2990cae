"""Progressive distillation (arXiv 2202.00512): each stage halves the number of DDIM steps, on noised data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path as Folder
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core import distributed
from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Denoiser, Wrapper
from fewstep.core.fit import Data
from fewstep.core.generator import CONFIG, WEIGHTS, Generator, check_device
from fewstep.core.noise import Noise
from fewstep.core.options import HANDED_ON, Budget, FitOptions
from fewstep.core.path import HIGHEST_PICTURED, TRIG, Path, widen
from fewstep.core.role import Models, Optim, Role, Update
from fewstep.core.state import Run, load_tensors, load_weights, read_json
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.base import check_falling
from fewstep.grid.coordinate import Coordinate, coordinate_maps
from fewstep.models.frozen import frozen, network_under
from fewstep.solve.euler import euler
from fewstep.train.run import options_of, train

STAGES = "stages"

# Of the squared error of x0 at a noise level, with SNR = 1 / sigma^2 (arXiv 2202.00512, section 4).
SNR_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "snr": lambda sigma: sigma**-2,
    "truncated-snr": lambda sigma: (sigma**-2).clamp(min=1),
    "snr+1": lambda sigma: sigma**-2 + 1,
}


@dataclass(frozen=True)
class Progressive:
    """A student that starts as its teacher and learns to do in one DDIM step what the teacher does in several.

    :meth:`run` goes from ``start_steps`` to ``steps`` in stages that halve. As a training method it is one stage:
    ``start_steps / steps`` steps of the teacher make one of the student's, 2 in the paper, 1 to fold guidance in.

    Attributes:
        steps: DDIM steps of the student.
        start_steps: DDIM steps of the teacher, a multiple of ``steps``; a power of 2 times it for whole runs.
        grid: levels even in arctan(sigma / scale) (cosine, as in the paper), in sigma^(1/7) (karras), or in the time of
            the teacher's own path (native).
        scale: of the cosine grid; 1 in the paper.
        weight: of the squared error of x0: truncated-snr is max(1, SNR), snr+1 the error of v, snr that of the noise,
            constant that of x0.
        draw: levels to train at: discrete are those that the sampler uses (the paper's), continuous any between.
        optim: the paper's learning rate is 1e-4; it falls to 0 in every stage.
    """

    needs_data: ClassVar[bool] = True

    steps: int = 4
    start_steps: int = 64
    grid: Literal["cosine", "karras", "native"] = "cosine"
    scale: float = 1.0
    weight: Literal["constant", "snr", "truncated-snr", "snr+1"] = "truncated-snr"
    draw: Literal["discrete", "continuous"] = "discrete"
    optim: Optim = Optim(lr=1e-4, decay="linear", clip=1.0)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.start_steps < 1 or not 0 < self.scale < math.inf:
            raise InputError(f"Progressive needs steps >= 1, start_steps >= 1 and 0 < scale < inf, got {self}")
        if self.start_steps % self.steps:
            near = self.steps * 2 ** max(1, round(math.log2(self.start_steps / self.steps)))
            raise InputError(
                f"Progressive(steps={self.steps}) cannot do {self.start_steps} steps of the teacher, which are no "
                f"multiple of it: use start_steps={near}"
            )
        if self.grid not in ("cosine", "karras", "native"):
            raise unknown("grid of progressive distillation", self.grid, ("cosine", "karras", "native"))
        if self.weight not in SNR_WEIGHTS:
            raise unknown("weight of progressive distillation", self.weight, SNR_WEIGHTS)
        if self.draw not in ("discrete", "continuous"):
            raise unknown("draw of progressive distillation", self.draw, ("discrete", "continuous"))

    @property
    def ratio(self) -> int:
        """Steps of the teacher that make one of the student's."""
        return self.start_steps // self.steps

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the network of the teacher, which may be guided.

        Raises:
            InputError: a denoiser without a network, or one that this grid cannot serve, see :meth:`levels`.
        """
        D = teacher.denoiser
        self.levels(D, self.start_steps)
        made, whole = network_under(D), frozen(D)
        return {
            "teacher": Role(lambda: whole),
            "student": Role(lambda: copy.deepcopy(made), self.optim, ships=True),
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """Noised data, and the teacher's steps from there as the target of one step."""
        x0, want = batch.x, tuple(m.student.shape)
        if x0 is None or tuple(x0.shape[1:]) != want:
            got = None if x0 is None else tuple(x0.shape[1:])
            raise InputError(f"Progressive needs pictures of {want}, as the network takes them, got {got}")
        # Stages of one run share a seed, and should not share their noise.
        own = noise.fold("stage", self.steps)
        levels = self.drawn(m.teacher, own)
        sigma = levels[0]
        x = x0 + widen(sigma, x0) * own.normal(x0.shape[1:], "n", dtype=x0.dtype)
        with torch.no_grad():
            target = jump_target(m.teacher, x, levels, batch.cond)
        weight = SNR_WEIGHTS[self.weight](sigma)

        def loss() -> Tensor:
            error = m.student(x, sigma, batch.cond) - target
            return (widen(weight, error) * error.square()).mean()

        yield Update("student", loss)

    def sampler(self, teacher: Generator) -> Tableau:
        """DDIM on the student's levels."""
        return euler(self.levels(teacher.denoiser, self.steps))

    def drawn(self, D: Denoiser, noise: Noise) -> Tensor:
        """(ratio + 1, B) float64: a random level of each sample, and those that the teacher then visits."""
        device = noise.seeds.device
        down = torch.arange(self.ratio + 1, device=device)[:, None]
        if self.draw == "discrete":
            k = noise.integers(1, self.steps + 1, (), "level")
            u = (self.ratio * k - down).double() / self.start_steps
        else:
            v = noise.uniform((), "level", dtype=torch.float64)
            u = 1 - (1 - 1 / self.steps) * v - down.double() / self.start_steps
        return self.at(D, u)

    def levels(self, D: Denoiser, count: int) -> Tensor:
        """(count + 1,) float64 levels from the denoiser's highest to 0; those of half as many are among them.

        Raises:
            InputError: levels that coincide, or a denoiser that has no such grid, see :meth:`at`.
        """
        places = torch.arange(count, -1, -1, dtype=torch.float64) / count
        return check_falling(self.at(D, places), f"the {self.grid} grid of {count} steps")

    def at(self, D: Denoiser, u: Tensor) -> Tensor:
        """The level at the place ``u`` of the grid, float64: ``sigma_max`` at 1; the last, at 0, counts as level 0.

        Raises:
            InputError: a Karras grid from pure noise, a native grid of a denoiser without a path, or a denoiser that
                starts at pure noise and predicts that noise.
        """
        low, high = D.sigma_min, D.sigma_max
        inner: Any = D.inner if isinstance(D, Wrapper) else D
        if high > HIGHEST_PICTURED and getattr(inner, "predicts", None) == "noise":
            raise InputError(
                f"a network that predicts noise says nothing of x0 at sigma {high:g}, so that no step from there can "
                "be distilled: use a teacher that predicts x0, v or velocity, or give it a lower sigma_max"
            )
        forward, inverse = coordinate_maps(self._coordinate(inner, high))
        ends = forward(torch.tensor([low, high], dtype=torch.float64, device=u.device))
        sigma = inverse(ends[0] + u.clamp(0, 1) * (ends[1] - ends[0]))
        sigma = torch.where(u >= 1, torch.full_like(sigma, high), sigma)
        return torch.where(u <= 0, torch.zeros_like(sigma), sigma)

    def _coordinate(self, inner: Any, high: float) -> Coordinate:
        if self.grid == "cosine":
            return TRIG(self.scale)
        if self.grid == "karras":
            if high > HIGHEST_PICTURED:
                raise InputError(
                    f"Karras' grid cannot start at sigma {high:g}, the pure noise of a flow model or of zero terminal "
                    "SNR: use grid cosine or native"
                )
            return "rho7"
        path = getattr(inner, "path", None)
        if not isinstance(path, Path):
            raise InputError(f"{type(inner).__name__} has no path, so no native grid: use grid cosine or karras")
        return path

    def run(
        self, teacher: Generator, data: Data | None, *, out: str | Folder, budget: str | int | Budget, **options: Any
    ) -> Generator:
        """:func:`progressive` with these settings."""
        return progressive(
            teacher, data, out=out, start_steps=self.start_steps, steps=self.steps, budget=budget, settings=self,
            **options,
        )  # fmt: skip


def jump_target(D: Denoiser, x: Tensor, levels: Tensor, cond: Cond | None = None) -> Tensor:
    """The x0 with which one DDIM step from ``levels[0]`` to ``levels[-1]`` lands where DDIM through all of them does.

    ``x`` (B, ...) at ``levels[0]``; ``levels`` (r + 1, B) float64, falling, the last may be 0. DDIM from a over m to b
    ends at ``(b/a) x + (b/m)(1 - m/a) D(x, a) + (1 - b/m) D(x_m, m)``, and one step with x0 at ``(b/a) x + (1 - b/a)
    x0``. So x0 is ``w D(x_m, m) + (1 - w) D(x, a)`` with ``w = (1 - b/m) / (1 - b/a)``, which is 1 for b = 0: the
    target of arXiv 2202.00512, algorithm 2, with noise levels for its alpha and sigma. More steps add terms alike.
    """
    first, last = levels[0], levels[-1]
    total = torch.zeros_like(x)
    for here, there in pairwise(levels):
        out = D(x, here, cond).to(x.dtype)
        # Of the first shares nothing is left where the end is 0; of the last all is.
        kept = torch.where(there == last, torch.ones_like(last), last / there)
        total = total + widen(kept * (1 - there / here) / (1 - last / first), x) * out
        x = widen(there / here, x) * x + widen(1 - there / here, x) * out
    return total


def halvings(start_steps: int, steps: int, *, guided: bool = False) -> list[tuple[int, int]]:
    """``(teacher's steps, student's steps)`` of every stage; the first keeps its steps where guidance is folded in.

    Raises:
        InputError: ``start_steps`` is not ``steps`` times a power of 2, or there is nothing to do.
    """
    if steps < 1 or start_steps < steps:
        raise InputError(f"progressive distillation needs 1 <= steps <= start_steps, got {steps} and {start_steps}")
    reached = [start_steps]
    while reached[-1] % 2 == 0:
        reached.append(reached[-1] // 2)
    if steps not in reached:
        near = [steps * 2**k for k in range(1, 5 + int(math.log2(start_steps / steps)))]
        below = f"from {start_steps} it reaches {', '.join(map(str, reached[1:])) or 'nothing'}"
        raise InputError(
            f"progressive distillation halves: {below}, and not {steps}; {steps} is reached from "
            f"{', '.join(map(str, near))} ...: choose start_steps among those"
        )
    stages = [(start_steps, start_steps)] if guided else []
    stages += list(pairwise(reached[: reached.index(steps) + 1]))
    if not stages:
        raise InputError(
            f"progressive distillation from {start_steps} to {steps} steps has nothing to do: raise start_steps"
        )
    return stages


def shares(stages: list[tuple[int, int]]) -> list[float]:
    """Each stage's share of the budget: stages to 2 and to 1 steps get twice as much, as in the paper."""
    parts = [2.0 if steps <= 2 else 1.0 for _, steps in stages]
    return [part / sum(parts) for part in parts]


def progressive(
    teacher: Generator,
    data: Data | None,
    *,
    out: str | Folder,
    budget: str | int | Budget,
    start_steps: int = 64,
    steps: int = 4,
    settings: Progressive | None = None,
    resume: bool = False,
    overwrite: bool = False,
    recipe: Mapping[str, Any] | None = None,
    **options: Any,
) -> Generator:
    """Distils ``teacher``, as DDIM of ``start_steps``, stage by stage into a student of ``steps``; returns it.

    ``budget`` is that of the whole run, divided by :func:`shares`. A guided teacher is first distilled into a network
    that does the same without guidance (arXiv 2210.03142, at the one scale). ``out`` holds the student and, in
    ``stages/<steps>``, the run folder of every stage, each of them a generator too. With ``resume`` finished stages are
    skipped and a broken one goes on; the result is the same in every bit. ``settings`` are those of the stages, whose
    own step counts do not matter; ``options`` are further ones of :func:`fewstep.train.run.train`.

    Raises:
        InputError: step counts that do not halve, no data or pictures of another shape, bad options, LoRA on a guided
            teacher, or an ``out`` that holds another run.
        NonFiniteError: training diverged.
    """
    out, base = Folder(out), settings or Progressive()
    guided = isinstance(teacher.denoiser, Wrapper)
    counts = halvings(start_steps, steps, guided=guided)
    stages = [replace(base, steps=few, start_steps=many) for many, few in counts]
    whole = options_of(budget, {k: v for k, v in options.items() if k not in HANDED_ON})
    _check(teacher, data, stages, options)
    assert data is not None
    parts = [replace(whole.budget, amount=_whole(whole.budget, share)) for share in shares(counts)]
    body = _recipe(teacher, data, replace(base, steps=steps, start_steps=start_steps), whole)
    distributed.start(check_device(whole.device))
    first = distributed.rank() == 0
    run = Run.open(out, {**(recipe or {}), **body}, resume=resume, overwrite=overwrite) if first else Run(out)
    distributed.barrier()
    current, trained = teacher, []
    for k, (stage, part) in enumerate(zip(stages, parts, strict=True)):
        place = out / STAGES / f"{stage.steps:04d}"
        if (place / CONFIG).is_file():
            current = _finished(current, stage, place, whole.device)
        else:
            # The folder is this run's own, so that what is in it is to be gone on with.
            current = train(current, stage, data, out=place, budget=part, resume=True, **options)
        trained.append({"steps": stage.steps, **current.card["trained"]})
        if first:
            run.rewind_log(k)
            run.log({**trained[-1], "steps": stage.steps, "step": k + 1})
    student = replace(current, card={**body, "stages": trained, "trained": current.card["trained"]})
    if first:
        student.save(out)
    distributed.barrier()
    return student


def _check(teacher: Generator, data: Data | None, stages: list[Progressive], options: Mapping[str, Any]) -> None:
    """Refuses what a later stage, or the end, would fail at."""
    if data is None:
        raise InputError("Progressive learns from data and got none: pass data, e.g. --data digits")
    shape = getattr(data, "shape", None)
    if shape is not None and tuple(shape) != tuple(teacher.denoiser.shape):
        raise InputError(
            f"the data hold {tuple(shape)} and the teacher takes {tuple(teacher.denoiser.shape)}: resize them, or "
            "encode them if it works on latents"
        )
    if isinstance(teacher.denoiser, Wrapper) and options.get("lora") is not None:
        raise InputError(
            f"LoRA cannot be trained on a {type(teacher.denoiser).__name__}: distil without lora, or without guidance"
        )
    for stage in stages:
        stage.levels(teacher.denoiser, stage.start_steps)


def _whole(budget: Budget, share: float) -> float:
    """A share of a budget; steps and images are counted whole."""
    amount = budget.amount * share
    return amount if budget.unit == "seconds" else float(math.ceil(amount - 1e-9))


def _recipe(teacher: Generator, data: Data, settings: Progressive, options: FitOptions) -> dict[str, Any]:
    """What a run is resumed with; what only saves memory may change."""
    lasting = {k: v for k, v in asdict(options).items() if k not in ("checkpointing", "offload")}
    return {
        "method": "Progressive",
        "settings": asdict(settings),
        "options": lasting,
        "from": teacher.fingerprint(),
        "data": getattr(data, "fingerprint", None),
    }


def _finished(teacher: Generator, stage: Progressive, place: Folder, device: str) -> Generator:
    """The student that a stage left."""
    student = copy.deepcopy(network_under(teacher.denoiser)).to(device).requires_grad_(False).eval()
    load_weights(student, load_tensors(place / WEIGHTS), place / WEIGHTS)
    card = read_json(place / CONFIG).get("card", {})
    return replace(teacher, denoiser=student, sampler=stage.sampler(teacher), card=card)
