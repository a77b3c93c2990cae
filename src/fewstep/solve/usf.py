"""The unified sampling framework (USF, arXiv 2312.07243): every decision of a multistep solver, step by step, as data.

A step of length ``h = ln(a/b)`` from any earlier point ``x_a`` is the truncated Taylor expansion

    x0 form:     x_b = (b/a) x_a + sum_i h^(i+1) f_i(-h) D^(i)
    noise form:  x_b = x_a - b     sum_i h^(i+1) f_i(h) eps^(i)

with ``f_i = phi_{i+1}``, the integrals of exponential Adams-Bashforth. Each derivative in log sigma is estimated from
outputs of its own choice, and the first may be relaxed. A :class:`Schedule` holds the decisions; its table is a solver.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.core.denoiser import Denoiser
from fewstep.core.solver import phi
from fewstep.core.tableau import Builder, Tableau
from fewstep.errors import InputError, unknown
from fewstep.solve.teacher import Fitted, Task, Teacher, chunks, rmse

# Fitted and Task are passed on to the search, whose one parent this file is.
__all__ = ["Decision", "Fitted", "Runner", "Schedule", "Task", "compile_schedule"]

Form = Literal["x0", "noise"]
Relax = Literal["none", "bh1", "bh2", "plus", "minus", "linear"]
Corrector = Literal["none", "pseudo", "implicit"]
First = Literal["none", "zero", "unit"]
NAMED = {"form": get_args(Form), "relax": get_args(Relax), "corrector": get_args(Corrector)}


@dataclass(frozen=True)
class Decision:
    """What one step does.

    Attributes:
        level: the noise level the step ends at.
        order: 1 to 4, the number of terms of the expansion; lower while there are fewer outputs.
        form: whether x0 or the noise ``(x - D) / sigma`` is expanded.
        start: how many points back the step starts; 0 is the newest.
        active: for derivative 1, 2, ... how many points back the outputs lie that estimate it together with the
            output at the start; an empty choice is the newest outputs that give the least degree that is enough,
            ``order - 1``.
        relax: factor of the first derivative: none; "bh1" and "bh2" turn the second-order steps into UniPC's with
            these functions, "bh2" being DPM-Solver++'s 2M; "plus" and "minus" are ``1 +- expm1(z) / 2`` and "linear"
            is ``1 + slope z``, with z = -h for x0 and h for the noise.
        slope: see ``relax``.
        corrector: "pseudo" corrects the point with the output there, which costs nothing; "implicit" also evaluates
            the corrected point, which costs an evaluation. One derivative more than the step's own is used.
        relax_corrector: ``relax`` for the correction.
    """

    level: float
    order: int = 1
    form: Form = "x0"
    start: int = 0
    active: tuple[tuple[int, ...], ...] = ()
    relax: Relax = "none"
    slope: float = 0.0
    corrector: Corrector = "none"
    relax_corrector: Relax = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "active", tuple(tuple(int(i) for i in own) for own in self.active))
        if isinstance(self.order, bool) or self.order not in (1, 2, 3, 4):
            raise InputError(f"a step of usf has order 1 to 4, got {self.order!r}")
        for name, known in (*NAMED.items(), ("relax_corrector", NAMED["relax"])):
            if getattr(self, name) not in known:
                raise unknown(f"{name} of usf", str(getattr(self, name)), known)
        if not 0 <= self.level < math.inf or not math.isfinite(self.slope):
            raise InputError(f"a step of usf ends at a finite level >= 0, got {self.level} (slope {self.slope})")
        for i, own in enumerate(self.active, 1):
            if own and (len(own) < i or len(set(own)) < len(own) or min(own) < 0 or self.start in own):
                raise InputError(
                    f"derivative {i} of usf needs at least {i} different outputs beside that of its start, got {own}"
                )
        if self.start < 0:
            raise InputError(f"a step of usf starts at a point 0 or more back, got {self.start}")


@dataclass(frozen=True)
class Schedule:
    """Decisions for all steps from ``sigma``.

    ``first`` may replace the first evaluation: "zero" takes D = 0 there, "unit" the denoiser of unit Gaussian data.
    """

    sigma: float
    steps: tuple[Decision, ...]
    first: First = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        levels = [self.sigma, *(s.level for s in self.steps)]
        if not self.steps or not math.isfinite(self.sigma) or any(a <= b for a, b in itertools.pairwise(levels)):
            raise InputError(f"the levels of usf must be finite and decrease, got {levels}")
        if self.first not in get_args(First):
            raise unknown("first evaluation of usf", str(self.first), get_args(First))
        for k, step in enumerate(self.steps):
            back = max([step.start, *(i for own in step.active for i in own)])
            if back > k:
                raise InputError(f"step {k} of usf looks {back} points back, but there are {k} before its own")

    @property
    def nfe(self) -> int:
        """Denoiser evaluations."""
        return self.cost(self.steps, self.first)

    @staticmethod
    def cost(steps: Sequence[Decision], first: str) -> int:
        """Denoiser evaluations of steps before they are a schedule."""
        return len(steps) + sum(s.corrector == "implicit" for s in steps[:-1]) - (first != "none")

    def to_meta(self) -> dict[str, Any]:
        """JSON-able: the decisions."""
        steps = [{**asdict(s), "active": [list(own) for own in s.active]} for s in self.steps]
        return {"sigma": self.sigma, "first": self.first, "steps": steps}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Schedule:
        """The inverse of :meth:`to_meta`. Raises InputError for missing, unknown or wrong entries."""
        known = {f.name for f in fields(Decision)}
        try:
            if set(meta) != {"sigma", "first", "steps"} or any(set(s) - known for s in meta["steps"]):
                raise InputError(f"a schedule of usf has sigma, first and steps with {sorted(known)}, got {dict(meta)}")
            return cls(float(meta["sigma"]), tuple(Decision(**s) for s in meta["steps"]), meta["first"])
        except (TypeError, ValueError, KeyError) as error:
            raise (
                error if isinstance(error, InputError) else InputError(f"a schedule of usf is damaged: {error}")
            ) from None


def compile_schedule(schedule: Schedule, name: str = "usf") -> Tableau:
    """The table of a schedule; ``meta["usf"]`` holds the decisions, which :meth:`Schedule.from_meta` reads.

    A step that ends at level 0 returns the newest output, whatever it decided. The last point is never corrected,
    because its output is not known.
    """
    made = _Compiler(schedule)
    for k, step in enumerate(schedule.steps):
        made.step(k, step)
    return made.table.build(name, usf=schedule.to_meta())


@dataclass
class _Mix:
    """A linear combination of a table's points and of its rows' outputs."""

    points: dict[int, float] = field(default_factory=dict)
    outputs: dict[int, float] = field(default_factory=dict)

    def add(self, other: _Mix, weight: float) -> _Mix:
        """This and ``weight`` times another."""
        points, outputs = dict(self.points), dict(self.outputs)
        for mine, theirs in ((points, other.points), (outputs, other.outputs)):
            for i, w in theirs.items():
                mine[i] = mine.get(i, 0.0) + weight * w
        return _Mix(points, outputs)


class _Compiler:
    """Writes rows; remembers each node's level, the point evaluated there, what corrects it later, and its output."""

    def __init__(self, schedule: Schedule) -> None:
        self.table, self.last = Builder(schedule.sigma), len(schedule.steps) - 1
        self.levels = [schedule.sigma]
        self.raw, self.correction = [_Mix({0: 1.0})], [_Mix()]
        self.silent = schedule.first != "none"
        s = schedule.sigma
        # 1 - s / sqrt(1 + s^2), written so that it keeps its digits.
        gain = 0.0 if schedule.first == "zero" else 1 / (1 + s * s + s * math.hypot(1, s))
        self.outputs = [_Mix({0: gain}) if self.silent else _Mix({}, {0: 1.0})]

    def step(self, k: int, step: Decision) -> None:
        """The row of one step, and what its corrector does once the output at its end is known."""
        called = None if k == 0 and self.silent else self.levels[k]
        own, use = k - step.start, min(step.order, k + 1)
        weights: dict[int, float] = {}
        made = self.outputs[k]
        if step.level > 0:
            nodes = [self._nodes(k, step, i) for i in range(1, use)]
            weights = self._weights(own, step.level, step, nodes, step.relax)
            made = self._expand(own, step.level, step.form, weights)
        point = self.table.row(called, step.level, made.points, made.outputs)
        self.levels.append(step.level)
        self.raw.append(_Mix({point: 1.0}))
        self.correction.append(_Mix())
        self.outputs.append(_Mix({}, {point: 1.0}))
        if step.corrector == "none" or k == self.last:
            return
        nodes = [[k + 1, *self._nodes(k, step, i)] for i in range(1, use + 1)]
        better = self._weights(own, step.level, step, nodes, step.relax_corrector)
        change = _Mix()
        for i in better:
            difference = self._expanded(i, step.form).add(self._expanded(own, step.form), -1.0)
            change = change.add(difference, better[i] - weights.get(i, 0.0))
        if step.corrector == "pseudo":
            self.correction[-1] = change
            return
        made = self.raw[-1].add(change, 1.0)
        again = self.table.row(step.level, step.level, made.points, made.outputs)
        self.raw[-1], self.outputs[-1] = _Mix({again: 1.0}), _Mix({}, {again: 1.0})

    def _nodes(self, k: int, step: Decision, derivative: int) -> list[int]:
        """The nodes that, beside the start, estimate a derivative."""
        chosen = step.active[derivative - 1] if len(step.active) >= derivative else ()
        if chosen:
            return [k - i for i in chosen]
        return [i for i in range(k, -1, -1) if i != k - step.start][: min(step.order, k + 1) - 1]

    def _weights(
        self, own: int, end: float, step: Decision, nodes: Sequence[Sequence[int]], relax: str
    ) -> dict[int, float]:
        """Weights of the expanded quantity at the nodes other than ``own``, from the estimates of all derivatives."""
        h = math.log(self.levels[own] / end)
        z, scale = (-h, h) if step.form == "x0" else (h, -end * h)
        weights: dict[int, float] = {}
        for i, chosen in enumerate(nodes, 1):
            logs = [math.log(self.levels[own] / self.levels[j]) / h for j in chosen]
            places = torch.tensor(logs, dtype=torch.float64)
            powers = torch.arange(1, len(chosen) + 1, dtype=torch.float64)
            # Taylor's series of each difference from the start, solved for the derivatives.
            series = places[:, None] ** powers / torch.exp(torch.lgamma(powers + 1))
            estimate = torch.linalg.inv(series)[i - 1].tolist()
            factor = scale * phi(i + 1, z) * (_relaxed(relax, step.slope, z) if i == 1 else 1.0)
            for j, w in zip(chosen, estimate, strict=True):
                weights[j] = weights.get(j, 0.0) + factor * w
        return weights

    def _expanded(self, node: int, form: str) -> _Mix:
        """The quantity that is expanded, at a node: its output, or the noise in the point that was evaluated."""
        if form == "x0":
            return self.outputs[node]
        return _Mix().add(self.raw[node], 1 / self.levels[node]).add(self.outputs[node], -1 / self.levels[node])

    def _expand(self, own: int, b: float, form: str, weights: Mapping[int, float]) -> _Mix:
        """The point at level ``b``; the weight of the start's own output is what consistency leaves."""
        a, others = self.levels[own], sum(weights.values())
        # In the noise form the share of the start's own noise is written into x and D at once: b/a and not
        # 1 + (b - a)/a, which would lose the digits of b when a is pure noise.
        keep, own_output = (b / a, 1 - b / a - others) if form == "x0" else (b / a - others / a, 1 - b / a + others / a)
        made = _Mix().add(self.raw[own], keep).add(self.outputs[own], own_output)
        made = made.add(self.correction[own], b / a if form == "x0" else 1.0)
        for i, w in weights.items():
            made = made.add(self._expanded(i, form), w)
        return made


def _relaxed(relax: str, slope: float, z: float) -> float:
    """The factor of the first derivative."""
    factors = {
        "none": 1.0,
        "bh1": 0.5 / phi(2, z),
        "bh2": 0.5 * phi(1, z) / phi(2, z),
        "plus": 1 + 0.5 * math.expm1(z),
        "minus": 1 - 0.5 * math.expm1(z),
        "linear": 1 + slope * z,
    }
    return factors[relax]


class Runner:
    """Runs tables on a teacher's starts and scores them; outputs of rows that tables share are computed once.

    At most ``room`` bytes of outputs are kept, the least recently used are dropped.
    """

    def __init__(self, D: Denoiser, teacher: Teacher, batch: int, room: int = 1 << 28) -> None:
        self.D, self.teacher, self.batch, self.room = D, teacher, batch, room
        self.kept: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self.calls = 0

    def __call__(self, table: Tableau) -> float:
        """Mean over trajectories of the RMSE between the table's end and the teacher's at the same level."""
        x = self.teacher.start * (table.start / float(self.teacher.levels[0]))
        points, outputs = {0: x}, dict[int, Tensor]()
        past: tuple[Any, ...] = (table.start,)
        for k, row in enumerate(table.plan):
            if row.sigma is not None:
                past = (*past, float(row.sigma))
                outputs[k] = self._output(past, points[k], row.sigma)
            made = torch.zeros_like(x)
            for source, weights in ((points, row.points), (outputs, row.outputs)):
                for i, w in weights:
                    made.add_(source[i], alpha=w)
            points[k + 1] = made
            past = (*past, row.points, row.outputs)
            for i in row.drop_points:
                del points[i]
            for i in row.drop_outputs:
                del outputs[i]
        return float(rmse(self.teacher.view(points[table.rows]), self.teacher.at(table.end)).mean())

    def _output(self, past: tuple[Any, ...], x: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser's output at a point that ``past`` determines."""
        if past in self.kept:
            self.kept.move_to_end(past)
            return self.kept[past]
        self.calls += len(x)
        out = chunks(self.D, self.batch, x, sigma, self.teacher.cond)
        self.kept[past] = out
        while len(self.kept) > 1 and len(self.kept) * out.nbytes > self.room:
            self.kept.popitem(last=False)
        return out
