"""The search of USF for solver schedules (S^3, arXiv 2312.07243): evolution filtered by a learned predictor.

Schedules are evaluated truly in stages. Before each stage a small ensemble of networks learns to rank the schedules
evaluated so far; it then picks the most promising of many mutated and crossed ones.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.noise import Noise
from fewstep.core.solver import build, phi
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.grid.gits import jump_costs, shortest_path
from fewstep.grid.karras import karras
from fewstep.grid.logsnr import logsnr
from fewstep.solve.usf import NAMED, Decision, Fitted, Runner, Schedule, Task, compile_schedule

FIXED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("euler", {}),
    ("dpmpp2m", {}),
    ("dpmpp3m", {}),
    ("unipc", {"order": 2}),
    ("ipndm", {"order": 2}),
    ("ipndm", {"order": 3}),
    ("ipndm", {"order": 4}),
)
# Known solvers written as decisions: Euler, 2M in both forms, 3M, the noise forms of orders 2 and 3, and UniPC's.
SEEDS: tuple[dict[str, Any], ...] = (
    {"order": 1},
    {"order": 2, "relax": "bh2"},
    {"order": 2},
    {"order": 3},
    {"order": 2, "form": "noise"},
    {"order": 3, "form": "noise"},
    {"order": 2, "relax": "bh2", "corrector": "pseudo"},
    {"order": 3, "form": "noise", "corrector": "pseudo"},
)
CHANGES = {"level": 6, "order": 2, "form": 2, "relax": 2, "start": 1, "active": 1, "corrector": 1, "first": 0.3}
FINALISTS = 8
FEATURES = 27


@torch.no_grad()
def usf(
    task: Task,
    *,
    population: int = 32,
    stages: int = 6,
    proposals: int = 16,
    pictures: int = 64,
    score: Callable[[Tableau], float] | None = None,
) -> Fitted:
    """Searches levels and all per-step decisions of :class:`fewstep.solve.usf.Decision` for ``task.nfe`` evaluations.

    Stage 0 evaluates known solvers on Karras', the geometric and the GITS grids and some mutations of them; each of
    ``stages`` further ones evaluates ``population`` schedules, most of them the best that the predictor finds among
    ``proposals * population`` mutations and crossings. A schedule's score is the mean RMSE to the teacher's end points
    on ``pictures`` trajectories, or ``score(table)``, lower being better. (The paper scores by the Frechet distance of
    thousands of pictures, which is much dearer and noisier; it is one choice of ``score``.) Outputs are computed once
    for all schedules that begin alike. With the default score the best few are judged again on all trajectories for
    fitting and on ``task.choose``.

    It starts from the best fixed solver on these grids, among them iPNDM of orders 3 and 4, which no schedule can
    express. On a given grid the levels and the number of evaluations stay.

    Raises:
        InputError: counts that are too small, or nfe that a given grid does not have.
    """
    if population < 8 or stages < 0 or proposals < 2 or pictures < 2:
        raise InputError(
            "usf needs population >= 8, stages >= 0, proposals >= 2 and pictures >= 2, "
            f"got {population}, {stages}, {proposals} and {pictures}"
        )
    grids = _grids(task)
    fixed = [build(name, grid, **options) for grid in grids for name, options in FIXED]
    errors = [task.choose.error(task.D, table, task.batch) for table in fixed]
    start = fixed[min(range(len(fixed)), key=errors.__getitem__)]
    runner = Runner(task.D, task.fit.part(slice(0, pictures)), task.batch)
    judge = score or runner
    # Everything drawn is a function of the task's seed.
    key = int(Noise.of(task.seed, 1).fold("usf").bits(1)[0, 0])
    found = _evolve(
        _Space(grids, task.nfe, task.grid is None, random.Random(key)), judge, task, population, stages, proposals
    )
    ranked = sorted(found.scores, key=found.scores.__getitem__)[:FINALISTS]
    if score is None:
        fit, choose = Runner(task.D, task.fit, task.batch), Runner(task.D, task.choose, task.batch)
        tables = {s: compile_schedule(s) for s in ranked}
        ranked.sort(key=lambda s: 0.5 * (fit(tables[s]) + choose(tables[s])))
    best = ranked[0]
    facts = {
        "start_choose_rmse": min(errors),
        "score": "rmse" if score is None else getattr(score, "__name__", "given"),
        "best_score": found.scores[best],
        "best_score_by_stage": found.progress,
        "rank_correlation_by_stage": found.trust,
        "schedules": len(found.scores),
        "pictures_evaluated": runner.calls,
        "decisions": best.to_meta(),
    }
    return Fitted(compile_schedule(best, f"usf-{best.nfe}"), start, facts)


def _grids(task: Task) -> list[Tensor]:
    """The given grid, or those the search starts from: all end at 0."""
    if task.grid is not None:
        if len(task.grid) - 1 != task.nfe:
            raise InputError(f"usf takes one evaluation a step: a grid of {task.nfe + 1} levels, not {len(task.grid)}")
        return [task.grid]
    teacher, low, top = task.fit, task.D.sigma_min, float(task.teacher.levels[0])
    grids = [karras(task.nfe, low, top), logsnr(task.nfe, low, top)]
    for metric, coefficient in (("dev", 1.15), ("l2", 1.0)):
        if task.nfe > 1:
            cost = jump_costs(teacher.points, teacher.outputs, teacher.levels, metric=metric)
            index = shortest_path(cost, task.nfe - 1, coefficient)
            grids.append(torch.cat([teacher.levels[index], torch.zeros(1, dtype=torch.float64)]))
    return grids


class _Space:
    """The schedules of ``nfe`` evaluations, and how to move among them."""

    def __init__(self, grids: list[Tensor], nfe: int, free: bool, draw: random.Random) -> None:
        self.grids, self.nfe, self.free, self.draw = grids, nfe, free, draw

    def seeds(self) -> list[Schedule]:
        """Known solvers on each grid."""
        made = []
        for grid in self.grids:
            for options in SEEDS:
                steps = [_plain(Decision(level, **options), k) for k, level in enumerate(grid.tolist()[1:])]
                made.append(self.mend(float(grid[0]), steps, "none"))
            made.append(_adams(grid))
        return list(dict.fromkeys(made))

    def mutate(self, schedule: Schedule, changes: int) -> Schedule:
        """The schedule with that many random decisions changed, mended to the number of evaluations."""
        steps, first = list(schedule.steps), schedule.first
        for _ in range(changes):
            what = self.draw.choices(list(CHANGES), list(CHANGES.values()))[0]
            k = self.draw.randrange(len(steps))
            if what == "level":
                self._move(schedule.sigma, steps, k)
            elif what == "first" and self.free:
                first = self.draw.choice(("none", "zero", "unit"))
            elif what not in ("level", "first"):
                steps[k] = replace(steps[k], **self._change(what, k, steps[k]))
        return self.mend(schedule.sigma, steps, first)

    def _move(self, sigma: float, steps: list[Decision], k: int) -> None:
        """Shifts the end of step k between its neighbours, evenly in log sigma; the last level stays."""
        if not self.free or k == len(steps) - 1:
            return
        high = sigma if k == 0 else steps[k - 1].level
        # The next level may be 0: then a factor of 30 below is low enough.
        low = max(steps[k + 1].level, steps[k].level / 30)
        up, down = math.log(high / steps[k].level), math.log(steps[k].level / low)
        share = 0.8 * self.draw.random() ** 3
        shift = share * up if self.draw.random() < 0.5 else -share * down
        steps[k] = replace(steps[k], level=steps[k].level * math.exp(shift))

    def _change(self, what: str, k: int, step: Decision) -> dict[str, Any]:
        draw = self.draw
        if what == "order":
            return {"order": draw.randint(1, min(4, k + 1)), "active": ()}
        if what == "form":
            return {"form": draw.choice(NAMED["form"])}
        if what == "relax":
            if step.corrector != "none" and draw.random() < 0.3:
                return {"relax_corrector": draw.choice(NAMED["relax"])}
            if step.relax == "linear" and draw.random() < 0.7:
                return {"slope": step.slope + draw.gauss(0, 0.1)}
            return {"relax": draw.choice(NAMED["relax"]), "slope": draw.gauss(0, 0.2)}
        if what == "start":
            return {"start": draw.choice((0, 0, min(k, 1))), "active": ()}
        if what == "corrector":
            return {"corrector": draw.choice(NAMED["corrector"] if self.free else ("none", "pseudo"))}
        use = min(step.order, k + 1)
        others = [i for i in range(min(k, 4) + 1) if i != step.start]
        chosen = [tuple(sorted(draw.sample(others, draw.randint(i, len(others))))) for i in range(1, use)]
        return {"active": tuple(chosen)}

    def cross(self, one: Schedule, other: Schedule) -> Schedule:
        """The first steps of one schedule and the steps of the other that lie below."""
        cut = self.draw.randint(0, len(one.steps) - 1)
        steps = list(one.steps[:cut])
        low = steps[-1].level if steps else math.inf
        steps += [s for s in other.steps if s.level < low]
        return self.mend(one.sigma, steps, one.first)

    def mend(self, sigma: float, steps: list[Decision], first: str) -> Schedule:
        """Drops or splits steps until the number of evaluations is right; clears choices that point nowhere."""
        if not self.free:
            steps = [replace(s, corrector="pseudo") if s.corrector == "implicit" else s for s in steps]
        if len(steps) < 2:
            first = "none"
        steps[-1] = replace(steps[-1], corrector="none")
        while (spent := Schedule.cost(steps, first)) != self.nfe:
            if spent > self.nfe:
                del steps[self.draw.randrange(len(steps) - 1)]
                continue
            levels = [sigma, *(s.level for s in steps)]
            gaps = [math.log(a / b) if b > 0 else 0.0 for a, b in itertools.pairwise(levels)]
            k = max(range(len(gaps)), key=gaps.__getitem__)
            middle = levels[k] * math.exp(-0.5 * gaps[k]) if gaps[k] else 0.5 * levels[k]
            steps.insert(k, replace(steps[k], level=middle, corrector="none"))
        for k, step in enumerate(steps):
            start = min(step.start, k)
            far = any(i > k or i == start for own in step.active for i in own)
            active = () if far or start != step.start else step.active
            steps[k] = _plain(replace(step, start=start, active=active), k)
        return Schedule(sigma, tuple(steps), first)  # type: ignore[arg-type]

    def encode(self, schedule: Schedule) -> list[float]:
        """Numbers that describe a schedule to the predictor, the same count for all."""
        found: list[float] = [float(schedule.first == name) for name in ("zero", "unit")]
        above = schedule.sigma
        for k in range(self.nfe + 1):
            step = schedule.steps[k] if k < len(schedule.steps) else None
            if step is None:
                found += [0.0] * FEATURES
                continue
            level = math.log(max(step.level, 1e-4))
            found += [1.0, level / 3, (math.log(above) - level) / 3]
            found += [float(min(step.order, k + 1) == n) for n in (1, 2, 3, 4)]
            found += [float(step.form == "noise"), float(step.start > 0)]
            for chosen in (step.relax, step.relax_corrector if step.corrector != "none" else "none"):
                found += [float(chosen == name) for name in NAMED["relax"][1:]]
            found += [2 * step.slope * (step.relax == "linear")]
            found += [float(step.corrector == name) for name in ("pseudo", "implicit")]
            used = step.active[0] if step.active else ()
            found += [float(i in used) for i in range(5)]
            above = max(step.level, 1e-4)
        return found


def _plain(step: Decision, k: int) -> Decision:
    """Step k without decisions that have no effect, so that two schedules with the same table are one."""
    if step.level == 0:
        return Decision(0.0)
    order = min(step.order, k + 1)
    relax = step.relax if order > 1 else "none"
    corrected = step.relax_corrector if step.corrector != "none" else "none"
    slope = step.slope if "linear" in (relax, corrected) else 0.0
    return replace(
        step, order=order, relax=relax, slope=slope, relax_corrector=corrected, active=step.active[: order - 1]
    )


def _adams(grid: Tensor) -> Schedule:
    """iPNDM of order 2: the relaxation of each first derivative that makes its weights those of equal steps."""
    levels = grid.tolist()
    steps = [Decision(levels[1])]
    for c, a, b in zip(levels, levels[1:], levels[2:], strict=False):
        h = math.log(a / b) if b > 0 else 0.0
        # Unrelaxed, the older noise weighs b h^2 phi_2(h) / ln(c / a); in iPNDM it weighs (a - b) / 2.
        factor = 0.5 * (a - b) * math.log(c / a) / (b * h * h * phi(2, h)) if h else 1.0
        steps.append(Decision(b, 2, "noise", relax="linear", slope=(factor - 1) / h if h else 0.0))
    return Schedule(levels[0], tuple(_plain(step, k) for k, step in enumerate(steps)))


class _Found:
    """What has been evaluated, and how each stage went."""

    def __init__(self) -> None:
        self.scores: dict[Schedule, float] = {}
        self.progress: list[float] = []
        self.trust: list[float] = []


def _evolve(
    space: _Space, judge: Callable[[Tableau], float], task: Task, population: int, stages: int, proposals: int
) -> _Found:
    """Evaluates ``population`` schedules a stage, until the stages or the time are over."""
    found = _Found()

    def evaluate(schedules: list[Schedule], stage: int) -> None:
        for schedule in schedules:
            if found.scores and not task.clock.allows():
                break
            value = judge(compile_schedule(schedule))
            found.scores[schedule] = value if math.isfinite(value) else math.inf
            task.say(f"stage {stage}/{stages}, {len(found.scores)} schedules, best {min(found.scores.values()):.4g}")
        found.progress.append(min(found.scores.values()))

    seeds = space.seeds()
    pool, tries = list(seeds), 0
    while len(pool) < len(seeds) + population // 4 and tries < 20 * population:
        child, tries = space.mutate(space.draw.choice(seeds), space.draw.randint(1, 4)), tries + 1
        pool += [child] if child not in pool else []
    evaluate(pool, 0)
    for stage in range(1, stages + 1):
        if not task.clock.allows():
            break
        wanted = _propose(space, found, population * proposals)
        if not wanted:
            break
        rank = _Ranker(task.seed, stage)
        rank.fit(*_examples(space, found))
        guess = rank(torch.tensor([space.encode(s) for s in wanted]))
        order = guess.argsort().tolist()
        # A few are taken at random, so that the predictor also learns where it is wrong.
        explored = max(1, population // 8)
        chosen = order[: population - explored]
        rest = order[len(chosen) :]
        chosen += space.draw.sample(rest, min(explored, len(rest)))
        evaluate([wanted[i] for i in chosen], stage)
        done = [i for i in chosen if wanted[i] in found.scores]
        found.trust.append(_correlation(guess[done], [found.scores[wanted[i]] for i in done]))
    return found


def _propose(space: _Space, found: _Found, count: int) -> list[Schedule]:
    """New schedules: mutations and crossings of the better ones evaluated so far."""
    ranked = sorted(found.scores, key=found.scores.__getitem__)
    parents = ranked[: max(4, len(ranked) // 16)]
    made: dict[Schedule, None] = {}
    for _ in range(4 * count):
        # The better of two draws, so that the best have the most children.
        parent = parents[min(space.draw.randrange(len(parents)) for _ in range(2))]
        if space.draw.random() < 0.25:
            parent = space.cross(parent, space.draw.choice(parents))
        child = space.mutate(parent, space.draw.choice((1, 1, 2, 2, 3, 4)))
        if child not in found.scores:
            made[child] = None
        if len(made) == count:
            break
    return list(made)


def _examples(space: _Space, found: _Found) -> tuple[Tensor, Tensor]:
    """Codes (n, d) and logarithms of the scores (n,) of what has been evaluated."""
    codes = torch.tensor([space.encode(s) for s in found.scores])
    values = torch.tensor(list(found.scores.values()))
    top = values[values.isfinite()].max()
    return codes, values.clamp(max=float(top)).clamp_min(1e-30).log()


def _correlation(guess: Tensor, truth: list[float]) -> float:
    """Spearman's, nan for fewer than three."""
    if len(truth) < 3:
        return math.nan
    ranks = torch.stack([guess.argsort().argsort(), torch.tensor(truth).argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


class _Ranker:
    """An ensemble of one-hidden-layer networks, trained to order pairs of schedules as their scores do."""

    def __init__(self, seed: int, stage: int, members: int = 4, width: int = 48) -> None:
        self.members, self.width = members, width
        self.noise = Noise.of(seed, members).fold("ranker", stage)
        self.weights: list[Tensor] = []

    def fit(self, codes: Tensor, values: Tensor, iterations: int = 150) -> None:
        """Trains on ``codes`` (n, d) and ``values`` (n,); each pair counts as much as the values differ."""
        self.middle, self.spread = codes.mean(0), codes.std(0).clamp_min(0.1)
        d = codes.shape[1]
        shapes = (d, self.width), (1, self.width), (self.width, 1)
        scales = d**-0.5, 0.0, self.width**-0.5
        drawn = [self.noise.normal(s, i) * scale for i, (s, scale) in enumerate(zip(shapes, scales, strict=True))]
        self.weights = [w.requires_grad_() for w in drawn]
        difference = (values[:, None] - values[None]).clamp(-1, 1)
        adam = torch.optim.AdamW(self.weights, lr=1e-2, weight_decay=1e-2)
        for _ in range(iterations):
            with torch.enable_grad():
                out = self._out(codes)
                gap = out[:, :, None] - out[:, None]
                loss = (difference.abs() * torch.nn.functional.softplus(-gap * difference.sign())).mean()
                grads = torch.autograd.grad(loss, self.weights)
            for w, g in zip(self.weights, grads, strict=True):
                w.grad = g
            adam.step()

    def _out(self, codes: Tensor) -> Tensor:
        """(members, n)."""
        first, bias, last = self.weights
        hidden = torch.tanh((codes - self.middle) / self.spread @ first + bias)
        return (hidden @ last)[:, :, 0]

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """(n,) the mean of the members; lower is better."""
        return self._out(codes).mean(0)
