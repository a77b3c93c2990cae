"""Which of several measured samplers to use, and how sure that is: rules from numbers to words.

The rules. The best is the row with the lowest Frechet distance. Each other row is compared with it by the paired
jack-knife: both rows made their pictures from the same seeds, these are split into the same blocks, and one block is
left out of both at a time. The spread of the differences gives a standard error that holds for the pair, smaller than
that of two separate sets of seeds wherever the rows make like pictures of like noise; Student's t with one degree of
freedom less than blocks turns it into an interval and a p-value. A row counts as good as the best unless the whole 95 %
interval of its difference lies above the tolerance. Of those rows the fastest, by seconds per picture, is the one to
use. Not corrected for the number of rows: the more rows, the more of them are called worse by chance, which costs speed
and never quality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.special import stdtr, stdtrit

from fewstep.errors import InputError
from fewstep.measure.frechet import jackknife
from fewstep.report.table import show

LEVEL = 0.95
# Up to here a possible loss of quality, as a share of the best score, needs no advice to sample more.
CLEAR = 0.1
# Relative error of a distance in float64, with room.
ROUNDING = 1e-9


class Scored(Protocol):
    """What the rules need of a row."""

    @property
    def label(self) -> str:
        """What people call it, with sampler and evaluations."""

    @property
    def nfe(self) -> int:
        """Evaluations per picture."""

    @property
    def seconds(self) -> float:
        """Per picture."""

    @property
    def fd(self) -> float:
        """Frechet distance of all pictures."""

    @property
    def blocks(self) -> Sequence[float]:
        """The distance without one of the blocks at a time."""


@dataclass(frozen=True)
class Difference:
    """A row's Frechet distance minus the best row's.

    Attributes:
        value: above 0 where the row is worse.
        error: its standard error over the choice of seeds.
        low: lower end of the 95 % interval.
        high: its upper end.
        p: two-sided probability of a difference this large by chance; 1 for a row against itself.
    """

    value: float
    error: float
    low: float
    high: float
    p: float


def half_width(error: float, blocks: int) -> float:
    """Half of the 95 % interval around a jack-knife estimate with this standard error."""
    return float(stdtrit(blocks - 1, 0.5 + LEVEL / 2)) * error


def own_error(row: Scored) -> float:
    """The standard error of a row's own distance."""
    return jackknife(torch.tensor(list(row.blocks), dtype=torch.float64))


def difference(row: Scored, best: Scored) -> Difference:
    """The paired difference of two rows.

    Raises:
        InputError: rows of different numbers of blocks, or fewer than two.
    """
    count = len(row.blocks)
    if count != len(best.blocks) or count < 2:
        raise InputError(f"{count} and {len(best.blocks)} blocks, expected as many, at least 2: measure both anew")
    value = row.fd - best.fd
    paired = torch.tensor([a - b for a, b in zip(row.blocks, best.blocks, strict=True)], dtype=torch.float64)
    # Rows of the same pictures differ by rounding, which is no difference however regular it is.
    error = max(jackknife(paired), ROUNDING * max(abs(row.fd), abs(best.fd))) if row is not best else 0.0
    half = half_width(error, count)
    certain = 1.0 if value == 0 else 0.0
    p = 2 * float(stdtr(count - 1, -abs(value) / error)) if error > 0 else certain
    return Difference(value, error, value - half, value + half, p)


@dataclass(frozen=True)
class Verdict:
    """What follows from the rows.

    Attributes:
        ship: number of the row to use.
        best: number of the row with the best score.
        differences: of each row to the best.
        equal: numbers of the rows that count as good as the best, the best among them.
        front: numbers of the rows that no other beats in both score and seconds, fastest first.
        headline: one sentence.
        reasons: a few sentences with the numbers.
    """

    ship: int
    best: int
    differences: list[Difference]
    equal: list[int]
    front: list[int]
    headline: str
    reasons: list[str]

    def standing(self, row: int) -> str:
        """In a word or two: "use this", "best score", "as good" or "worse"."""
        if row == self.ship:
            return "use this"
        if row == self.best:
            return "best score"
        return "as good" if row in self.equal else "worse"


def verdict_of(rows: Sequence[Scored], *, n: int, tolerance: float = 0.0) -> Verdict:
    """Applies the rules of this module to rows of ``n`` pictures each.

    ``tolerance`` is the share of the best score that may be lost for speed, 0 or above.

    Raises:
        InputError: fewer than two rows, a tolerance below 0, or rows of different numbers of blocks.
    """
    if len(rows) < 2:
        raise InputError(f"a comparison of {len(rows)} rows, expected at least 2: give more generators or --nfe")
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise InputError(f"tolerance {tolerance}: expected a share of the best score, 0 or above, such as 0.05")
    order = range(len(rows))
    best = min(order, key=lambda i: (rows[i].fd, rows[i].seconds))
    found = [difference(row, rows[best]) for row in rows]
    allowed = tolerance * rows[best].fd
    equal = [i for i in order if found[i].low <= allowed]
    ship = min(equal, key=lambda i: (rows[i].seconds, rows[i].nfe))
    front, lowest = [], math.inf
    for i in sorted(order, key=lambda i: (rows[i].seconds, rows[i].fd)):
        if rows[i].fd < lowest:
            front.append(i)
            lowest = rows[i].fd
    reasons = [*_quality(rows, best, ship, found, tolerance), *_speed(rows, best, ship)]
    reasons += [*_sureness(rows, best, ship, found, n), *_faster(rows, ship, found)]
    return Verdict(ship, best, found, equal, front, f"Use {rows[ship].label}.", reasons)


def _score(row: Scored) -> str:
    return f"{show(row.fd)} ± {show(half_width(own_error(row), len(row.blocks))) or '0'}"


def chance(p: float) -> str:
    """A p-value in words of formulas."""
    return "p < 0.001" if p < 1e-3 else f"p = {p:.2g}"


def _quality(rows: Sequence[Scored], best: int, ship: int, found: Sequence[Difference], tolerance: float) -> list[str]:
    if ship == best:
        faster = any(row.seconds < rows[best].seconds for row in rows)
        told = "every faster row is worse by more than chance" if faster else "it is the fastest"
        return [f"It has the best Fréchet distance of all {len(rows)} rows, {_score(rows[best])}, and {told}."]
    d = found[ship]
    tolerated = f" beyond the tolerance of {tolerance:.0%}" if tolerance else ""
    return [
        f"Its Fréchet distance is {_score(rows[ship])}; the best is {_score(rows[best])}, by {rows[best].label}. It is "
        f"not significantly worse{tolerated}: the difference on the same seeds is {show(d.value)}, between "
        f"{show(d.low)} and {show(d.high)} with 95 % confidence ({chance(d.p)})."
    ]


def _speed(rows: Sequence[Scored], best: int, ship: int) -> list[str]:
    slow = max(range(len(rows)), key=lambda i: rows[i].seconds)
    other = best if ship != best else slow
    own = f"{rows[ship].nfe} evaluation{'s' * (rows[ship].nfe != 1)} and {duration(rows[ship].seconds)} per picture"
    if other == ship:
        return [f"It takes {own}."]
    factor = rows[other].seconds / rows[ship].seconds
    who = "the best" if other == best else "the slowest row"
    return [f"It takes {own}, {factor:.2g} times as fast as {who} ({duration(rows[other].seconds)})."]


def _sureness(rows: Sequence[Scored], best: int, ship: int, found: Sequence[Difference], n: int) -> list[str]:
    if ship == best:
        return []
    top = max(found[ship].high, 0.0)
    share = top / rows[best].fd if rows[best].fd > 0 else math.inf
    if share <= CLEAR:
        return [f"With {n:,} pictures it is at most {show(top)} worse than the best, {share:.1%} of its score."]
    told = f", {share:.0%} of the best score" if math.isfinite(share) else ""
    return [
        f"How sure: not very. With {n:,} pictures it may still be up to {show(top)} worse{told}; more pictures (--n) "
        f"narrow that."
    ]


def _faster(rows: Sequence[Scored], ship: int, found: Sequence[Difference]) -> list[str]:
    faster = [i for i in range(len(rows)) if rows[i].seconds < rows[ship].seconds]
    if not faster:
        return ["No row is faster."]
    near = min(faster, key=lambda i: found[i].value)
    d = found[near]
    which = "The only faster row is" if len(faster) == 1 else f"The best of the {len(faster)} faster rows is"
    return [
        f"{which} {rows[near].label}: worse than the best score by {show(d.value)} ({show(d.low)} to {show(d.high)}, "
        f"{chance(d.p)})."
    ]


def duration(seconds: float) -> str:
    """Seconds per picture in a unit that reads well."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{show(seconds * factor)} {unit}"
    return f"{show(seconds * 1e6)} µs"
