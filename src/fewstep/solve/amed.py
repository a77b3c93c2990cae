"""AMED-Solver (arXiv 2312.00094): a learned intermediate level and a learned scale in every step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.sample import OnStep, Sampler, Step
from fewstep.core.solver import solver
from fewstep.core.stored import stored
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.solve.learned import (
    HIGH,
    Call,
    Fitted,
    Learner,
    Run,
    Task,
    Training,
    check_afs,
    check_scales,
    chosen_levels,
    find_tap,
    lowered,
    parallel_step,
    plain_step,
    slope_weights,
    tabulate,
    train,
)

__all__ = [
    "AMED",
    "BASES",
    "HIGH",
    "Call",
    "Fitted",
    "Predictor",
    "Split",
    "Task",
    "Training",
    "amed",
    "amed_table",
    "learn",
]
__all__ += ["lowered", "parallel_step", "slope_weights"]

HIDDEN, READ, FREQUENCIES = 128, 4, (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Split:
    """A step to ``b`` with one learned level ``m``: ``r`` is its place, ``c`` the scale, ``told`` what D is told."""

    b: Tensor
    m: Tensor
    r: Tensor
    c: Tensor
    told: Tensor
    order: int


def _amed(marks: Sequence[Tensor], s: Split) -> list[Call]:
    return parallel_step(marks, s.b, [(s.m, s.told, s.c)], s.c)


# Solver -> its rows for a split step; whether it uses earlier steps. The plugin adds its own.
BASES: dict[str, tuple[Callable[[Sequence[Tensor], Split], list[Call]], bool]] = {
    "amed": (_amed, False),
}


def check_base(base: str, order: int) -> None:
    """Raises InputError for an unknown base or an order outside 1..4."""
    if base not in BASES:
        raise unknown("base", base, BASES)
    if order not in (1, 2, 3, 4):
        raise InputError(f"the base {base!r} has orders 1, 2, 3 and 4, got {order!r}")


def split_step(
    base: str, order: int, marks: Sequence[Tensor], b: Tensor, r: Tensor, c: Tensor, alpha: Tensor
) -> list[Call]:
    """The two rows of a step with ``m = b^r a^(1-r)``, of which the denoiser is told ``alpha m``."""
    low = lowered(float(marks[-1]), float(b))
    m = low * (float(b) / low) ** r
    return BASES[base][0](marks, Split(b, m, r, c, alpha * m, order))


@solver
def amed_table(
    sigmas: Tensor,
    *,
    base: str = "amed",
    r: float | Sequence[float] = 0.5,
    c: float | Sequence[float] = 1.0,
    alpha: float | Sequence[float] = 1.0,
    order: int = 4,
    afs: bool = False,
    plain: Sequence[int] = (),
) -> Tableau:
    """The step of AMED-Solver with given numbers, for each step or for all (arXiv 2312.00094).

    ``m = b^r a^(1-r)``, ``y = x + (m - a) eps(x, a)`` and ``x_b = x + c (b - a) (y - D(y, alpha m)) / m``. The default
    numbers are DPM-Solver-2. Other ``base`` are those of :func:`fewstep.solve.amed_plugin.amed_plugin`, with ``order``
    for ipndm. ``afs`` replaces the first output by what the slope ``x / sqrt(1 + a^2)`` stands for and saves its
    evaluation; data are then taken to have mean zero. Steps in ``plain`` and a step that ends at 0 are Euler's, with
    one evaluation; the others take two. Order 2 for r = 1/2, c = alpha = 1.

    Raises:
        InputError: an unknown base, an order outside 1..4, r outside (0, 1), c or alpha not above 0, another number of
            entries than steps, ``afs`` below level 10, or a bad grid.
    """
    check_base(base, order)
    steps = len(sigmas) - 1
    check_afs(afs, sigmas)
    numbers = []
    for name, value, top in (("r", r, 1.0), ("c", c, math.inf), ("alpha", alpha, math.inf)):
        each = [float(value)] * steps if isinstance(value, int | float) else [float(v) for v in value]
        if len(each) != steps or not all(0 < v < top for v in each):
            raise InputError(f"amed_table needs 0 < {name} < {top:g}, one or {steps} of them, got {value!r}")
        numbers.append(torch.tensor(each, dtype=torch.float64))

    def calls(k: int, marks: Sequence[Tensor]) -> list[Call]:
        if k in plain or sigmas[k + 1] == 0:
            return [plain_step(marks, sigmas[k + 1])]
        return split_step(base, order, marks, sigmas[k + 1], *(n[k] for n in numbers))

    return tabulate(steps, afs, sigmas, calls).build(base if base == "amed" else f"amed-{base}")


class Predictor(nn.Module):
    """The learned numbers of a step from its two levels and, if ``width > 0``, from features (B, width).

    ``Linear(128) - SiLU - Linear(4)`` reads the features; sines and cosines of each level's logarithm pass
    ``Linear(4) - SiLU``; three linear heads give ``r = sigmoid(.)``, ``c`` within ``1 +- scale_dir`` and ``alpha``
    within ``1 +- scale_time``. The heads start at zero: ``r = 1/2`` and ``c = alpha = 1``. The other weights are
    drawn from ``seed``.
    """

    def __init__(self, width: int, scale_dir: float, scale_time: float, seed: int = 0) -> None:
        super().__init__()
        self.width, self.scale_dir, self.scale_time = width, scale_dir, scale_time
        linear = nn.utils.skip_init
        if width:
            self.enter, self.leave = linear(nn.Linear, width, HIDDEN), linear(nn.Linear, HIDDEN, READ)
        self.level = linear(nn.Linear, 2 * len(FREQUENCIES), READ)
        self.heads = linear(nn.Linear, (3 if width else 2) * READ, 3)
        with torch.no_grad():
            for name, p in self.named_parameters():
                spread = 0.0 if name.startswith("heads") else (p.shape[1] if p.ndim == 2 else READ) ** -0.5
                p.copy_(spread * (2 * Noise.of(seed, 1).uniform(p.shape, "predictor", name)[0] - 1))

    def forward(self, a: Tensor, b: Tensor, feature: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``r``, ``c`` and ``alpha``, float64: of shape () if no features are read, else (B,).

        Features that are missing count as zeros, the same for the whole batch.
        """
        if feature is None and self.width:
            feature = self.heads.weight.new_zeros(1, self.width)
        read = []
        for level in (a, b):
            u = level.log() / 4
            waves = torch.stack([f(u * w) for w in FREQUENCIES for f in (torch.cos, torch.sin)])
            read.append(nn.functional.silu(self.level(waves.to(self.level.weight))))
        if feature is not None:
            inner = self.leave(nn.functional.silu(self.enter(feature.to(self.enter.weight))))
            read = [inner, *(v.expand(len(inner), -1) for v in read)]
        r, c, alpha = self.heads(torch.cat(read, -1)).double().sigmoid().unbind(-1)
        return r, 1 + self.scale_dir * (2 * c - 1), 1 + self.scale_time * (2 * alpha - 1)


@stored("amed")
@dataclass(frozen=True, eq=False)
class AMED(Learner):
    """AMED's steps with numbers that a :class:`Predictor` reads off the network's features.

    Called on a denoiser with ``features`` (a :class:`fewstep.core.denoiser.Precond`; guidance hides them). A batch of
    pictures has its own intermediate levels picture by picture, so this is no table; without features it would be one.

    Attributes:
        levels: (N+1,) decreasing noise levels of the steps, float64.
        counts: (N,) learned evaluations of each step, 1 or, for an Euler step, 0.
        predictor: of the learned numbers.
        tap: where the features come from; None without them.
        base: the solver, a name in BASES.
        order: of the base ipndm.
        afs: whether the first slope is ``x / sqrt(1 + sigma^2)`` and takes no evaluation.
        name: what people call it.
        meta: JSON-able facts.

    Raises:
        InputError: an unknown base or order; when called, a denoiser that does not offer the tap.
    """

    levels: Tensor
    counts: tuple[int, ...]
    predictor: Predictor
    tap: str | None = None
    base: str = "amed"
    order: int = 4
    afs: bool = False
    name: str = "amed"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_base(self.base, self.order)

    @property
    def start(self) -> float:
        """The noise level of the start."""
        return float(self.levels[0])

    @property
    def end(self) -> float:
        """The noise level of the result."""
        return float(self.levels[-1])

    @property
    def nfe(self) -> int:
        """Denoiser evaluations."""
        return len(self.counts) + sum(self.counts) - self.afs

    def calls(self, k: int, marks: Sequence[Tensor], feature: Tensor | None) -> list[Call]:
        """See :class:`Learner`."""
        b = self.levels[k + 1]
        if not self.counts[k]:
            return [plain_step(marks, b)]
        return split_step(self.base, self.order, marks, b, *self.predictor(self.levels[k], b, feature))

    def weights(self) -> list[nn.Parameter]:
        """See :class:`Learner`."""
        return list(self.predictor.parameters())

    def sampler(self) -> Sampler:
        """This, or its table if it has one."""
        return self.table(self.name, **self.meta) if self.tap is None else self

    @torch.no_grad()
    def numbers(self) -> dict[str, list[float]]:
        """``r``, ``c`` and ``alpha`` of each step without features, 1/2, 1 and 1 where nothing is learned."""
        rows = [
            [float(v) for v in self.predictor(a, b, None)] if count else [0.5, 1.0, 1.0]
            for a, b, count in zip(self.levels, self.levels[1:], self.counts, strict=False)
        ]
        return dict(zip(("r", "c", "alpha"), (list(v) for v in zip(*rows, strict=True)), strict=True))

    @torch.no_grad()
    def __call__(
        self,
        D: Denoiser,
        x: Tensor,
        cond: Cond | None = None,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """``x`` (B, *shape) at ``start`` -> the sample (B, *shape) at ``end``, float32 or float64.

        ``on_step`` sees the points at ``levels``, not those between them.
        """
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        held = self.predictor.heads.weight.device
        moved = self.predictor if held == x.device else copy.deepcopy(self.predictor).to(x.device)
        own = (
            self if moved is self.predictor else AMED(self.levels, self.counts, moved, self.tap, self.base, self.order)
        )
        run = Run(D, x, self.levels[0], cond, self.afs)
        for k in range(len(self.counts)):
            feature = run.begin(self.tap)
            if on_step is not None:
                n = len(run.marks) - 1
                on_step(Step(k, float(self.levels[k]), x, run.outputs.get(n)))
            x = run.follow(own.calls(k, list(run.marks), feature))
            run.trim()
        if on_step is not None:
            on_step(Step(len(self.counts), self.end, x, None))
        return x

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields and tensors for files."""
        names = ("tap", "base", "order", "afs", "name")
        reads = {key: getattr(self.predictor, key) for key in ("width", "scale_dir", "scale_time")}
        fields = {"levels": self.levels.tolist(), "counts": list(self.counts), **{n: getattr(self, n) for n in names}}
        return {**fields, **reads, "meta": dict(self.meta)}, dict(self.predictor.state_dict())

    @classmethod
    def from_parts(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AMED:
        """The inverse of :meth:`parts`."""
        rest = dict(fields)
        predictor = Predictor(*(rest.pop(key) for key in ("width", "scale_dir", "scale_time")))
        predictor.load_state_dict(dict(tensors))
        levels = torch.tensor(rest.pop("levels"), dtype=torch.float64)
        return cls(levels, tuple(rest.pop("counts")), predictor, **rest)


def amed(
    task: Task,
    *,
    iterations: int = 80,
    rounds: int = 1,
    lr: float = 5e-3,
    minibatch: int = 32,
    scale_dir: float = 0.01,
    scale_time: float = 0.0,
    afs: bool = False,
    tap: str | None = "auto",
    grid: str = "vp_time",
    rho: float | None = None,
    teacher: Literal["converged", "refined"] = "converged",
) -> Fitted:
    """AMED-Solver (arXiv 2312.00094): each step has one intermediate level and one scale, predicted by a small network.

    A step takes two evaluations; see :func:`amed_table` for its formula. The predictor sees the levels and, from the
    evaluation at the step's start, features of the denoiser at ``tap`` ("auto": "bottleneck", where it is declared;
    None: none). Without features the result is a :class:`Tableau`. It ends at the denoiser's ``sigma_min``.

    With an odd budget the first step is Euler's, with one evaluation, or with ``afs`` it is learned as the others are
    and saves the first evaluation, as the paper does; that takes data of mean zero. A grid given by the task is one of
    steps: it decides how many evaluations there are. ``iterations`` minibatches of ``minibatch`` trajectories are
    learned from. ``teacher="refined"`` is the paper's: Heun's method with one level put between two of the student's.
    The default holds the student to converged states instead, because a coarse teacher bounds what it can become.

    Raises:
        InputError: fewer than 2 evaluations, ``afs`` with an even number or below level 10, a scale outside [0, 1),
            an unknown tap, grid or teacher, or a setting of the training outside its range.
    """
    training = Training(iterations, rounds, lr, minibatch, teacher)
    scales = scale_dir, scale_time
    return learn(task, "amed", 4, training, grid=grid, rho=rho, afs=afs, tap=tap, scales=scales)


def learn(
    task: Task,
    base: str,
    order: int,
    training: Training,
    *,
    grid: str,
    rho: float | None,
    afs: bool,
    tap: str | None,
    scales: tuple[float, float],
) -> Fitted:
    """Learns the split steps of any base: what :func:`amed` and the plugin have in common."""
    check_base(base, order)
    check_scales(*scales)
    if task.grid is None and (task.nfe < 2 or (afs and task.nfe % 2 == 0)):
        raise InputError(
            f"a learned level takes a second evaluation: nfe must be at least 2{', and odd with afs' if afs else ''}, "
            f"got {task.nfe}"
        )
    levels = chosen_levels(task, grid, (task.nfe + 1) // 2, rho)
    check_afs(afs, levels)
    counts = [int(b > 0) for b in levels[1:]]
    if task.grid is None and task.nfe % 2 and not afs:
        counts[0] = 0
    if not any(counts):
        raise InputError(f"the grid {levels.tolist()} has no step that could be split: it must reach a level above 0")
    found = find_tap(task, tap)
    width = 0 if found is None else found[1]
    predictor = Predictor(width, *scales, task.seed).to(task.teacher.start.device if width else "cpu")
    name = base if base == "amed" else f"amed-{base}"
    plain = [k for k, count in enumerate(counts) if not count]
    start = amed_table(levels, base=base, order=order, afs=afs, plain=plain)
    student = AMED(levels, tuple(counts), predictor, None if found is None else found[0], base, order, afs, name)
    facts = train(task, student, own=BASES[base][1], training=training)
    facts |= {"base": base, "steps": len(counts), "afs": afs, "features": student.tap}
    facts |= {} if student.tap else student.numbers()
    return Fitted(student.sampler(), start, facts)
