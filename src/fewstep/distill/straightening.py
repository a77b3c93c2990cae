"""What methods on pairs of a noise and the teacher's picture share: the line between the two, and stages of training.

Sources: rectified flow (arXiv 2209.03003); SlimFlow (2407.12718).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core import distributed
from fewstep.core.cond import Batch
from fewstep.core.denoiser import Denoiser, start_std
from fewstep.core.generator import CONFIG, WEIGHTS, Generator, check_device
from fewstep.core.noise import Noise
from fewstep.core.options import HANDED_ON, Budget
from fewstep.core.path import HIGHEST_PICTURED, widen
from fewstep.core.role import Ema, Method, Optim, Role
from fewstep.core.sample import trajectory
from fewstep.core.state import Run, load_tensors, load_weights, read_json, write_text
from fewstep.core.tableau import Tableau
from fewstep.data.pairs import OnlinePairs, Pairs, make_pairs, require_pairs
from fewstep.errors import InputError, unknown
from fewstep.loss.draw import FlowTime
from fewstep.loss.perceptual import DISTANCES, DistanceName, distance_roles
from fewstep.models.frozen import network_under
from fewstep.train.flow_matching import flow_sampler
from fewstep.train.run import options_of, train

STAGES, PAIRS, STRAIGHT = "stages", "pairs", "straightness.json"


@dataclass(frozen=True)
class Straightening:
    """Makes a flow straight in one or more stages on pairs, then distils its start: Reflow and SlimFlow.

    :meth:`run` is the whole method; as a training method it is the one stage ``stage``.

    Attributes:
        steps: Euler steps of the student, even in flow time.
        fresh: distils on pairs of the last flow; without, on those that it was trained on.
        stage: of a single stage: reflow learns at all times, distil at those of the steps.
        distance: of the distillation: l2, l1, huber or lpips (the papers' best); a flow is trained with l2.
        features: of lpips: own (digits), teacher, or the path of published weights.
        draw: the times that a flow is trained at: uniform in the papers.
        flip: turns picture and noise over together, at random; for pictures that may be mirrored.
        ode_steps: Heun steps of a flow when its own pairs are made.
        share: of the budget that distillation gets; the stages before have equal parts of the rest.
        probe: pictures that straightness is measured with after each stage; 0 for none.
        optim: of the student; the papers' lr is 2e-4.
        ema: the average that ships; the papers' rate is 0.999999.
    """

    needs_data: ClassVar[bool] = True
    any_steps: ClassVar[bool] = False

    steps: int = 1
    fresh: bool = True
    stage: Literal["reflow", "distil"] = "distil"
    distance: DistanceName = "l2"
    features: str = "own"
    draw: FlowTime = FlowTime()
    flip: bool = False
    ode_steps: int = 16
    share: float = 0.5
    probe: int = 256
    optim: Optim = Optim(lr=2e-4, warmup=100, decay="cosine", clip=1.0)
    ema: Ema = Ema(power=0.05)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps < 1 or self.ode_steps < 1 or self.probe < 0 or not 0 < self.share < 1:
            raise InputError(f"{name} needs steps >= 1, ode_steps >= 1, probe >= 0 and 0 < share < 1, got {self}")
        for what, value, known in (
            ("stage", self.stage, ("reflow", "distil")),
            ("distance", self.distance, DISTANCES),
        ):
            if value not in known:
                raise unknown(what, value, known)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student starts as the network of the teacher, on whatever path that was trained; nothing else is held.

        Raises:
            InputError: a denoiser without a network, or one that predicts noise and starts at pure noise.
        """
        made = network_under(teacher.denoiser)
        if made.sigma_max > HIGHEST_PICTURED and made.predicts == "noise":
            raise InputError(
                f"a network that predicts noise says nothing of x0 at sigma {made.sigma_max:g}, so that no step from "
                "there can be learned: use a teacher that predicts x0, v or velocity, or give it a lower sigma_max"
            )
        distance = distance_roles(self.distance, teacher, self.features) if self.stage == "distil" else {}
        return {"student": Role(lambda: copy.deepcopy(made), self.optim, self.ema, ships=True), **distance}

    def sampler(self, teacher: Generator) -> Tableau:
        """Euler in ``steps`` even steps of flow time."""
        return flow_sampler(teacher.denoiser, self.steps)

    def check(self, teacher: Generator, data: Any) -> Pairs | OnlinePairs:
        """The data, if it is pairs that ``teacher`` made.

        Raises:
            InputError: see :func:`fewstep.data.pairs.require_pairs`.
        """
        return require_pairs(data, teacher, type(self).__name__)

    def stages(self, teacher: Generator, options: Mapping[str, Any]) -> list[Stage]:
        """The trainings that the whole method consists of.

        Raises:
            InputError: a teacher or options that they cannot have.
        """
        raise NotImplementedError

    def run(
        self, teacher: Generator, data: Any, *, out: str | Path, budget: str | int | Budget, **options: Any
    ) -> Generator:
        """The whole method, from pairs that ``teacher`` made; see :func:`run_stages` for the options.

        Raises:
            InputError: data that are no pairs of this teacher, or what :meth:`stages` and :func:`run_stages` refuse.
        """
        pairs = self.check(teacher, data)
        self.roles(teacher)
        start = replace(teacher, denoiser=network_under(teacher.denoiser))
        facts = {"method": type(self).__name__, "settings": asdict(self), "from": teacher.fingerprint()}
        return run_stages(
            start, pairs, self.stages(teacher, options), out=out, budget=budget, facts=facts,
            ode_steps=self.ode_steps, probe=self.probe, flow=teacher, **options,
        )  # fmt: skip


def paired(batch: Batch, D: Denoiser, method: str) -> tuple[Tensor, Tensor]:
    """Picture and unit noise (B, *shape) of a batch of pairs.

    Raises:
        InputError: a batch of pictures alone, or of another shape.
    """
    x0, n, want = batch.x, batch.noise, tuple(D.shape)
    if x0 is None or n is None:
        raise InputError(
            f"{method} learns from pairs of a noise and the teacher's picture, and this batch has "
            f"{'no picture' if x0 is None else 'no noise'}: make pairs with `fewstep pairs`"
        )
    if tuple(x0.shape[1:]) != want or x0.shape != n.shape:
        raise InputError(f"{method} needs pairs of {want}, got {tuple(x0.shape[1:])} and {tuple(n.shape[1:])}")
    return x0, n


def mirrored(noise: Noise, x0: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Both turned left to right in the same half of the batch."""
    turn = (noise.uniform((), "flip") < 0.5).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.where(turn, x0.flip(-1), x0), torch.where(turn, n.flip(-1), n)


def between(D: Denoiser, x0: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
    """The point at ``sigma`` (B,) of the straight line from the sampler's start, pure noise ``s n``, to ``x0``.

    In the flow's own state ``z = x / (1 + sigma)`` the line from ``t s / sigma_max n`` at the highest level to x0 at 0
    is ``x = (1 - sigma / sigma_max) x0 + (s / sigma_max) sigma n``. For a flow model (1e8) this is ``x0 + sigma n``; an
    EDM model (80) has no picture in its start, and none is put in here either.
    """
    top = float(D.sigma_max)
    return widen(1 - sigma / top, x0) * x0 + widen(sigma * (start_std(D, top) / top), x0) * n


def flow_draw(draw: FlowTime, noise: Noise, D: Denoiser) -> Tensor:
    """(B,) float64 levels whose flow times are drawn and spread over those of ``D``."""
    sigma = draw(noise, getattr(D, "sigma_data", 0.5))[0].double()
    top = float(D.sigma_max)
    t = sigma / (1 + sigma) * (top / (1 + top))
    return (t / (1 - t)).clamp(float(D.sigma_min), top)


@torch.no_grad()
def straightness(flow: Generator, count: int = 256, *, steps: int = 32, seed: int = 0, batch: int = 256) -> float:
    """``int_0^1 E (n - x0 - v(z_t, t))^2 dt`` per value along a flow's own trajectories (arXiv 2209.03003, section 2).

    0 for straight ones, which a single Euler step follows exactly. ``steps`` Euler steps are taken; their velocities
    have the chord as their mean, so that the integral is their variance.
    """
    table, D = flow_sampler(flow.denoiser, steps), flow.denoiser
    total = 0.0
    for ids in torch.arange(count).split(batch):
        noise = Noise.of(seed, ids, flow.device).fold("straightness")
        x = start_std(D, table.start) * noise.normal(D.shape, "start")
        mean, square = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
        for at in trajectory(D, x, table, flow.conditions(None, noise)):
            if at.denoised is not None:
                t = at.level / (1 + at.level)
                v = (at.point.double() / (1 + at.level) - at.denoised.double()) / t
                mean += v / steps
                square += v.square() / steps
        total += float((square - mean.square()).sum())
    return total / (count * math.prod(D.shape))


class Stage(NamedTuple):
    """One training of several: its name, its method, its share of the budget, and whether it has pairs of its own.

    ``fresh`` takes pairs of the flow that it starts from; else those of the stage before. ``start`` changes that flow
    into what is trained.
    """

    name: str
    method: Method
    share: float
    fresh: bool
    start: Callable[[Generator], Generator] = lambda flow: flow


def run_stages(
    start: Generator,
    pairs: Pairs | OnlinePairs,
    stages: Sequence[Stage],
    *,
    out: str | Path,
    budget: str | int | Budget,
    facts: Mapping[str, Any],
    ode_steps: int,
    probe: int,
    flow: Generator,
    resume: bool = False,
    overwrite: bool = False,
    recipe: Mapping[str, Any] | None = None,
    **options: Any,
) -> Generator:
    """Trains the stages one after the other; returns the last one's student, which ``out`` then holds.

    ``out/stages/<name>`` is the run folder of each, and ``out/pairs/<name>`` the pairs of a flow that were made for it
    (as many as ``pairs``; none where those are made online). With ``resume`` finished stages are read and a broken one
    goes on, to the same bits. ``flow`` made ``pairs``. ``options`` are those of :func:`fewstep.train.run.train`.

    Raises:
        InputError: bad options, or an ``out`` that holds another run.
        NonFiniteError: training diverged.
    """
    folder = Path(out)
    whole = options_of(budget, {k: v for k, v in options.items() if k not in HANDED_ON})
    lasting = {k: v for k, v in asdict(whole).items() if k not in ("checkpointing", "offload")}
    body = {**facts, "options": lasting, "data": pairs.fingerprint}
    device = check_device(whole.device)
    distributed.start(device)
    first = distributed.rank() == 0
    run = Run.open(folder, {**(recipe or {}), **body}, resume=resume, overwrite=overwrite) if first else Run(folder)
    distributed.barrier()
    current, told = start, []
    # Called when a stage needs them: finished stages do not.
    material: Callable[[], Pairs | OnlinePairs] = partial(_given, pairs)
    before = _straight(flow, folder / STAGES / f"teacher-{STRAIGHT}", probe)
    for k, stage in enumerate(stages):
        place = folder / STAGES / stage.name
        begin = stage.start(current)
        if stage.fresh:
            material = partial(_pairs_of, current, pairs, folder / PAIRS / stage.name, ode_steps, k, options)
        if (place / CONFIG).is_file():
            current = _finished(begin, stage, place, device)
        else:
            part = whole.budget.part(stage.share)
            # The folder is this run's own, so that what is in it is to be gone on with.
            current = train(begin, stage.method, material(), out=place, budget=part, resume=True, **options)
        told.append({"stage": stage.name, **current.card["trained"]})
        told[-1]["straightness"] = _straight(current, place / STRAIGHT, probe)
        if first:
            run.rewind_log(k)
            run.log({**told[-1], "step": k + 1})
    card = {**body, "straightness": before, "stages": told, "trained": current.card["trained"]}
    student = replace(current, card=card)
    if first:
        student.save(folder)
    distributed.barrier()
    return student


def _given(pairs: Pairs | OnlinePairs) -> Pairs | OnlinePairs:
    return pairs


def _pairs_of(
    flow: Generator, like: Pairs | OnlinePairs, place: Path, steps: int, k: int, options: Mapping[str, Any]
) -> Pairs | OnlinePairs:
    """Pairs of a flow of this run, of the kind and the number of the first ones, from other noises."""
    sampler, seed = flow_sampler(flow.denoiser, steps, "heun"), like.seed + k
    if isinstance(like, OnlinePairs):
        return OnlinePairs(flow, sampler, seed=seed, size=like.size, batch=like.batch)
    kept = {name: like.facts[name] for name in ("batch", "shard", "dtype")}
    return make_pairs(
        flow, place, n=len(like), sampler=sampler, seed=seed, store_conditions=bool(like.facts["conditions"]),
        resume=True, progress=bool(options.get("progress", True)), **kept,
    )  # fmt: skip


def _straight(flow: Generator, file: Path, probe: int) -> float | None:
    """The straightness of a flow, measured once and kept beside it; the same on every process."""
    if not probe:
        return None
    if not file.is_file() and distributed.rank() == 0:
        write_text(file, json.dumps({"straightness": float(f"{straightness(flow, probe):.6g}")}) + "\n")
    distributed.barrier()
    return float(read_json(file)["straightness"])


def _finished(begin: Generator, stage: Stage, place: Path, device: torch.device) -> Generator:
    """The student that a stage left."""
    student = copy.deepcopy(network_under(begin.denoiser)).to(device).requires_grad_(False).eval()
    load_weights(student, load_tensors(place / WEIGHTS), place / WEIGHTS)
    card = read_json(place / CONFIG).get("card", {})
    return replace(begin, denoiser=student, sampler=stage.method.sampler(begin), card=card)
