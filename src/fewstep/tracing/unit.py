"""The engine of tracing: a sampler is run on unit vectors, and the points it asks about are its own weights.

A sampler is linear in its start, in the denoiser's outputs and in its noises. If the start is the unit vector e0, the
k-th answer of the denoiser a fresh unit vector whatever was asked, and every noise a unit vector of its own, then each
point at which the sampler calls the denoiser is the row of its weights. Nothing is assumed that is not checked: the
sampler is also run on a non-linear denoiser with random noises, and the table must reproduce every one of its points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewstep.core.cond import Cond
from fewstep.core.noise import Noise
from fewstep.core.path import as64
from fewstep.core.sample import trajectory
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.tracing.fold import Folded, Record, fold

MOST_CALLS = 10_000
REFERENCE_SHAPE = (2, 2, 3, 4)

_NARROWING = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.type}
_NORMAL = {torch.randn, torch.randn_like, torch.normal, torch.Tensor.normal_}
_OTHER_DRAWS = {
    torch.rand,
    torch.rand_like,
    torch.randint,
    torch.randint_like,
    torch.randperm,
    torch.bernoulli,
    torch.multinomial,
    torch.poisson,
    torch.Tensor.uniform_,
    torch.Tensor.random_,
    torch.Tensor.bernoulli_,
    torch.Tensor.exponential_,
}


@dataclass(frozen=True)
class Source:
    """A sampler made ready to run in the coordinates ``x = x0 + sigma n``, each time from a fresh state.

    Attributes:
        name: what people call it.
        start: the noise level of its start.
        end: the noise level of its result.
        run: from a :class:`Tap` and a start (B, C, H, W) at level ``start`` to the result at level ``end``.
        tolerance: how far, relative to the larger of 1 and the point, the replayed table may be from the sampler.
        meta: JSON-able facts that the table keeps.
    """

    name: str
    start: float
    end: float
    run: Callable[[Tap, Tensor], Tensor]
    tolerance: float
    meta: Mapping[str, Any] = field(default_factory=dict)


class Tap(TorchFunctionMode):
    """Answers a sampler's calls and its draws while it runs, and keeps what it asked for.

    Inside the mode, ``torch.randn``, ``randn_like``, ``normal`` and ``normal_`` return the noises that were chosen for
    the run; any other random number is an error, because a table holds normal noise only.
    """

    def __init__(
        self,
        shape: Sequence[int],
        answer: Callable[[int, Tensor, float], Tensor],
        noise: Callable[[int], Tensor],
        *,
        cuts: Sequence[float] = (),
        wide: bool = False,
        most: int = MOST_CALLS,
    ) -> None:
        """``answer(k, x, sigma)`` is the k-th output, ``noise(m)`` the m-th unit noise, both of ``shape``.

        ``cuts`` are the increasing levels between which a Brownian path has independent increments, the first
        ``len(cuts) - 1`` noises. ``wide`` keeps the state in float64 where the sampler would round it to float32:
        unit vectors then carry the sampler's weights and not its rounding.
        """
        super().__init__()
        self.shape, self.answer, self.noise = torch.Size(shape), answer, noise
        self.cuts, self.wide, self.most = list(cuts), wide, most
        self.points: list[Tensor] = []
        self.sigmas: list[float] = []
        self.draws = max(len(cuts) - 1, 0)
        self.intervals: list[tuple[float, float]] = []

    def evaluate(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoiser as the sampler sees it.

        Raises:
            InputError: another batch or shape than the state's, levels that differ within the batch, a level that is
                not positive and finite, a point that is not finite, or more calls than the last run made.
        """
        k = len(self.points)
        if x.shape != self.shape:
            raise InputError(
                f"call {k} of the denoiser has shape {tuple(x.shape)} for a state of shape {tuple(self.shape)}: "
                "a sampler is traced on one batch; do guidance inside the denoiser, not by doubling its batch"
            )
        levels = as64(sigma).reshape(-1)
        if not len(levels) or (levels != levels[0]).any():
            raise InputError(f"call {k} of the denoiser is at several levels at once, {levels.tolist()}: give it one")
        level = float(levels[0])
        if not 0 < level < math.inf:
            raise InputError(
                f"call {k} of the denoiser is at sigma {level:g}, where a table calls it at positive finite levels "
                "only: let the step into level 0 use the output of the call before it (pure noise of a flow is 1e8)"
            )
        if not x.isfinite().all():
            raise InputError(f"call {k} of the denoiser, at sigma {level:g}, is at a point that is not finite")
        if k >= self.most:
            raise InputError(
                f"the sampler made more than {self.most} calls where the run before made {self.most}: its steps depend "
                "on the values (an adaptive sampler), and no table holds that"
                if self.most < MOST_CALLS
                else f"the sampler was stopped after {self.most} calls of the denoiser: it does not end by itself"
            )
        self.points.append(x.detach().double().clone())
        self.sigmas.append(level)
        return self.answer(k, x, level)

    def brownian(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        """The unit noise of the step between two levels: a Brownian path's increment over its standard deviation.

        Overlapping steps have correlated noises, steps apart have independent ones: the noise sampler of k-diffusion.

        Raises:
            InputError: an empty step, whose noise is not defined.
        """
        low, high = sorted((float(as64(sigma).reshape(-1)[0]), float(as64(sigma_next).reshape(-1)[0])))
        if not low < high:
            raise InputError(f"the noise sampler was asked for the noise of an empty step, from {low:g} to {high:g}")
        self.intervals.append((low, high))
        if not self.cuts:
            return self._draw()
        first, last = self._cut(low), self._cut(high)
        parts = [math.sqrt(self.cuts[i + 1] - self.cuts[i]) * self.noise(i) for i in range(first, last)]
        return sum(parts, torch.zeros(self.shape, dtype=torch.float64)) / math.sqrt(self.cuts[last] - self.cuts[first])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces draws of noise, and in a wide run the rounding of the state."""
        kwargs = kwargs or {}
        if func in _OTHER_DRAWS:
            raise InputError(f"the sampler draws random numbers with {func.__name__}: a table holds normal noise only")
        if func in _NORMAL:
            return self._normal(func, args, kwargs)
        out = func(*args, **kwargs)
        if self.wide and func in _NARROWING and isinstance(out, Tensor) and args[0].shape == self.shape:
            narrowed = args[0].dtype == torch.float64 and out.is_floating_point() and out.dtype != torch.float64
            return args[0] if narrowed else out
        return out

    def _normal(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # The original is called for the shape and for its own errors; its values are thrown away.
        drawn: Tensor = func(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)
        if drawn.shape != self.shape:
            raise InputError(
                f"the sampler draws noise of shape {tuple(drawn.shape)} for a state of shape {tuple(self.shape)}: "
                "a table holds noise of the state's shape only"
            )
        unit = self._draw()
        if func in (torch.randn, torch.randn_like):
            return unit
        target = args[0] if func is torch.Tensor.normal_ else None
        given = args[1:] if target is not None else args
        mean = given[0] if given else kwargs.get("mean", 0.0)
        std = given[1] if len(given) > 1 else kwargs.get("std", 1.0)
        noise = mean + std * unit
        return noise if target is None else target.copy_(noise)

    def _draw(self) -> Tensor:
        self.draws += 1
        return self.noise(self.draws - 1)

    def _cut(self, level: float) -> int:
        return min(range(len(self.cuts)), key=lambda i: abs(self.cuts[i] - level))


def trace_source(source: Source, *, check: bool, tolerance: float | None) -> Tableau:
    """The table of a sampler; ``tolerance`` replaces the source's own.

    Raises:
        InputError: the sampler never calls the denoiser, is not linear, or does what a table cannot hold.
    """
    allowed = source.tolerance if tolerance is None else tolerance
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        seen, end = _reference_run(source, ())
        cuts = _cuts(seen.intervals)
        if cuts:
            seen, end = _reference_run(source, cuts)
        folded = fold(_unit_run(source, seen, cuts))
        table = folded.builder.build(source.name)
        facts: dict[str, Any] = dict(source.meta)
        if folded.mixes:
            facts["draws"] = {str(row): {str(m): c for m, c in mix.items()} for row, mix in folded.mixes.items()}
        if check:
            facts["replay_error"] = _replay(source, folded, table, seen, end, allowed)
    return Tableau(table.sigmas, table.levels, table.P, table.W, table.Z, name=source.name, meta={"traced": facts})


def _reference_run(source: Source, cuts: Sequence[float]) -> tuple[Tap, Tensor]:
    """The sampler on a non-linear denoiser with random noises."""
    tap = Tap(REFERENCE_SHAPE, lambda k, x, sigma: bend(x, sigma), _reference_noise, cuts=cuts)
    start = math.hypot(1.0, source.start) * _keyed("start")
    with tap:
        end = source.run(tap, start.clone())
    if not tap.points:
        raise InputError(f"{source.name} never calls the denoiser: there is nothing to trace")
    return tap, _result(source, end, tap)


def _unit_run(source: Source, seen: Tap, cuts: Sequence[float]) -> Record:
    """The sampler on unit vectors: start, then outputs, then noises."""
    calls = len(seen.points)
    width = 1 + calls + seen.draws

    def unit(i: int) -> Tensor:
        vector = torch.zeros(1, 1, 1, width, dtype=torch.float64)
        vector[..., i] = 1
        return vector

    def noise(m: int) -> Tensor:
        if m >= seen.draws:
            raise InputError(f"{source.name} draws noise a number of times that depends on the values: no table does")
        return unit(1 + calls + m)

    tap = Tap((1, 1, 1, width), lambda k, x, sigma: unit(1 + k), noise, cuts=cuts, wide=True, most=calls)
    with tap:
        end = source.run(tap, unit(0))
    if tap.sigmas != seen.sigmas or tap.draws != seen.draws:
        raise InputError(
            f"{source.name} calls the denoiser {len(tap.sigmas)} times at other levels, or draws other noises, when "
            f"the values are others ({calls} calls before): an adaptive sampler has no table"
        )
    rows = [p.flatten() for p in [*tap.points, _result(source, end, tap).double()]]
    return Record(torch.stack(rows), tap.sigmas, source.start, source.end)


def _result(source: Source, end: Any, tap: Tap) -> Tensor:
    if not isinstance(end, Tensor) or end.shape != tap.shape:
        found = tuple(end.shape) if isinstance(end, Tensor) else type(end).__name__
        raise InputError(f"{source.name} returns {found}: a sampler returns the sample, of the shape of its start")
    if not end.isfinite().all():
        raise InputError(f"{source.name} returns values that are not finite: look at its last levels and its order")
    return end


def bend(x: Tensor, sigma: Tensor | float) -> Tensor:
    """A smooth non-linear denoiser whose values leave [-1, 1], so that clipping and thresholding show."""
    return 2.5 * torch.tanh(x / math.hypot(1.0, float(sigma)) + 0.3) + 0.4 * torch.sin(3.0 * x / (1.0 + float(sigma)))


def _keyed(*key: int | str) -> Tensor:
    return Noise.of(0, REFERENCE_SHAPE[0]).normal(REFERENCE_SHAPE[1:], *key, dtype=torch.float64)


def _reference_noise(m: int) -> Tensor:
    return _keyed("draw", m)


def _cuts(intervals: Sequence[tuple[float, float]]) -> list[float]:
    """The levels between which a path is cut; two that differ by rounding alone are one."""
    cuts: list[float] = []
    for level in sorted(end for pair in intervals for end in pair):
        if not cuts or level - cuts[-1] > 1e-6 * level:
            cuts.append(level)
    return cuts


@dataclass(frozen=True)
class _Replayed(Noise):
    """The noises of a reference run, as the rows of its table draw them."""

    rows: Mapping[int, Tensor] = field(default_factory=dict)

    def normal(self, shape: Sequence[int], *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise of the row that the key names last."""
        return self.rows[int(key[-1])].to(dtype)


class _Bent:
    """:func:`bend` as a denoiser."""

    shape: tuple[int, ...] = REFERENCE_SHAPE[1:]
    sigma_min, sigma_max, sigma_data = 1e-3, 1e8, 1.0

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :func:`bend`."""
        return bend(x, sigma)


def _replay(source: Source, folded: Folded, table: Tableau, seen: Tap, end: Tensor, allowed: float) -> float:
    """The largest relative difference between the table and the sampler, on the reference denoiser and noises."""
    rows = {
        row: sum((c * _reference_noise(m) for m, c in mix.items()), torch.zeros(REFERENCE_SHAPE, dtype=torch.float64))
        for row, mix in folded.mixes.items()
    }
    noise = _Replayed(torch.zeros(REFERENCE_SHAPE[0], dtype=torch.int64), rows)
    start = math.hypot(1.0, source.start) * _keyed("start")
    worst, call = 0.0, 0
    wanted = [*seen.points, end.double()]
    for step in trajectory(_Bent(), start, table, noise=noise):
        if step.denoised is None and step.k < table.rows:
            continue
        scale = max(1.0, float(wanted[call].abs().max()))
        error = float((step.point - wanted[call]).abs().max()) / scale
        if not error <= allowed:
            where = "its result" if call == len(seen.points) else f"call {call}, at sigma {seen.sigmas[call]:.4g}"
            raise InputError(
                f"{source.name} is not the table that its weights make: row {max(step.k - 1, 0)} differs by "
                f"{error:.2g} at {where}, where {allowed:.0g} is allowed. {_cause(source, seen, end, error)}"
            )
        worst, call = max(worst, error), call + 1
    return worst


def _cause(source: Source, seen: Tap, end: Tensor, error: float) -> str:
    """The likeliest reason for a failed replay."""
    again, last = _reference_run(source, seen.cuts)
    if any(not torch.equal(a, b) for a, b in zip([*again.points, last], [*seen.points, end], strict=False)):
        return "Two runs with the same noises differ too: it takes randomness from elsewhere than torch, or keeps state"
    if error < 1e-4:
        return f"So small a difference is rounding: if it computes in float32, pass tolerance={10 * error:.0g}"
    return "It is not linear: look for an option that clips, thresholds or rescales by the values, and turn it off"
