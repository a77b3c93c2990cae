"""Whether a run is healthy: the spread of its samples, what tells a collapse, and the curves of a distribution match.

Nothing here draws from the noise of training: a run that is watched ends in the same bits as one that is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Batch, Cond, take
from fewstep.core.denoiser import Denoiser
from fewstep.core.fit import Data
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions, Report
from fewstep.core.path import FLOW, HIGHEST_PICTURED, widen
from fewstep.core.role import Method, Models
from fewstep.core.state import Run, read_json
from fewstep.data.digits import StackedDigits, digits
from fewstep.grid.karras import karras
from fewstep.measure.features import Classifier, digits_extractor
from fewstep.measure.modes import classes

# What a run's log does not say: reference, start, floor and rollbacks.
FILE = "health.json"
SEED = 20_231
SAMPLES = 64
# As many are kept for a picture.
SHOWN = 16
# What is compared with the reference, and what a message calls it.
SPREADS = {
    "variance": "their variance over the batch",
    "distance": "their mean distance from each other",
    "nearest": "the distance to their nearest neighbour",
    "modes": "the number of modes that they hit",
}
# A measure counts as lost when it was at least ARMED, in units of the reference, and fell below this share of its best.
# Healthy runs of digits kept 0.4 of theirs and more, collapsed ones less than these within ten steps.
ARMED = 0.2
LOST = {"variance": 0.1, "distance": 0.3, "nearest": 0.3, "modes": 0.2}
# Samples that still are this close to constant when LATE of the budget is spent, at LOOKS looks or more.
CONSTANT, LATE, LOOKS = 1e-3, 0.5, 8
# Samples that vary more than this many times as much as the reference, and as at the start.
BLOWN = 10.0
BANDS = 8


def spread(x: Tensor) -> dict[str, float]:
    """How much samples ``x`` (n, ...), n >= 2, differ from each other, all per pixel.

    ``variance`` is the variance over the batch, averaged over pixels; ``distance`` the mean root mean square difference
    of two samples, ``nearest`` that of a sample and its nearest neighbour. One picture for every noise makes all three
    0; a few pictures that are repeated make the last one 0.
    """
    flat = x.detach().float().flatten(1)
    # Without the trick of inner products, whose rounding would hide the differences of nearly constant samples.
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    own = torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    values = torch.stack(
        [flat.var(0).mean(), apart[~own].mean(), apart.masked_fill(own, math.inf).amin(1).mean()],
    )
    return dict(zip(("variance", "distance", "nearest"), values.tolist(), strict=True))


def across(x: Tensor, y: Tensor) -> float:
    """The mean root mean square difference of a sample of ``x`` (n, ...) and one of ``y`` (m, ...), per pixel.

    Pairs at the same place are left out, because both may come from the same noise.
    """
    flat, other = x.detach().float().flatten(1), y.detach().float().flatten(1)
    apart = torch.cdist(flat, other, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    same = torch.eye(len(flat), len(other), dtype=torch.bool, device=flat.device)
    return float(apart[~same].mean())


def modes(x: Tensor, classifier: Classifier) -> float:
    """How many of the classifier's classes occur among the pictures ``x`` (n, C, H, W)."""
    return float(len(classes(x.detach().float().clamp(-1, 1), classifier).unique()))


def rounded(value: float) -> float | None:
    """Six digits, as a log holds them; None for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def collapsed(looks: Sequence[Mapping[str, Any]], start: Mapping[str, Any], progress: float) -> str | None:
    """What is wrong with the newest of ``looks``, in words, or None.

    ``looks`` and ``start`` hold the measures of :data:`SPREADS` in units of the reference's, None where they are not
    finite. A one-step student starts as a blur that looks like a collapse, so a measure is only lost where it was had:
    the best is of the start and of all looks, at most 1, and counts from :data:`ARMED` on.
    """
    now = looks[-1]
    bad = [key for key, value in now.items() if value is None]
    if bad:
        return "samples are no longer finite"
    most = BLOWN * max(1.0, start.get("variance") or 0.0)
    if now.get("variance", 0.0) > most:
        return f"samples have blown up: their variance over the batch is {now['variance']:.3g} times the reference's"
    for key, said in SPREADS.items():
        if key not in now:
            continue
        best = min(1.0, max(entry.get(key) or 0.0 for entry in (start, *looks)))
        if best >= ARMED and now[key] < LOST[key] * best:
            what = "lost modes" if key == "modes" else "become alike"
            return f"samples have {what}: {said} is {now[key]:.2g} of the reference's and was {best:.2g}"
    if progress >= LATE and len(looks) >= LOOKS and now.get("variance", 1.0) < CONSTANT:
        return f"samples are still constant: {SPREADS['variance']} is {now['variance']:.2g} of the reference's"
    return None


class Watch:
    """Looks at the samples of a run's shipped average, always from the same noise and conditions.

    Args:
        method, models, shipped, start, data, options: of the run, before its first step.
        log: the entries so far, when the run resumes.

    Attributes:
        reference: what measures are relative to: the data's pictures, or the teacher's where there are none.
        start: the measures of the student before training.
        floor: the denoising loss that the fake score starts from, see :func:`fake_floor`; None without one.
        looks: the measures so far, oldest first.
        seen: the first samples (16, ...) of the newest look, or of the start before the first.
        compared: the reference's own pictures or samples (n, ...), on the CPU.
    """

    def __init__(
        self,
        method: Method,
        models: Models,
        shipped: Generator,
        start: Generator,
        data: Data,
        options: FitOptions,
        log: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.models, self.shipped = models, shipped
        # An offloaded teacher's weights are not where it runs.
        self.device = shipped.device if options.offload else start.device
        self.batch = max(1, options.batch // options.micro)
        self.classifier = classifier_of(data, start)
        pictures, told = self._pictures(data, start)
        # Large pictures would take a good part of an accelerator's memory for something that is rarely looked at.
        self.compared = pictures.cpu()
        self.whole = self._measures(pictures)
        self.matched = {"teacher", "fake"} <= models.networks.keys() and hasattr(method, "fake_update")
        self.floor = rounded(fake_floor(method, models, pictures, told)) if self.matched else None
        x = self.samples(shipped, shipped.device)[0]
        self.start = self.measures(x)
        self.start_energy = self.energy(x, self.start)
        self.seen = x[:SHOWN].clone()
        self.looks = [found for entry in log if (found := measures_in(entry)) is not None]

    def _pictures(self, data: Data, start: Generator) -> tuple[Tensor, Cond]:
        """The reference (n, ...) and its conditions: evenly spaced data, or samples of what the run starts from."""
        count = min(SAMPLES, len(data))
        found = data.take(torch.arange(count) * len(data) // count)
        if found.x is not None and found.x.shape[1:] == tuple(start.denoiser.shape) and count > 1:
            self.reference = f"{count} pictures of the data"
            found = found.to(self.shipped.device)
            assert found.x is not None
            return found.x, found.cond
        self.reference = f"{SAMPLES} samples of the teacher"
        return self.samples(start, self.device)

    @torch.no_grad()
    def samples(self, made: Generator, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """:data:`SAMPLES` samples as the denoiser knows them, not decoded and not clamped, and their conditions."""
        noise = Noise.of(SEED, SAMPLES, device)
        cond, D, use = made.conditions(None, noise), made.denoiser, made.sampler
        parts = []
        for i in range(0, SAMPLES, self.batch):
            rows = slice(i, i + self.batch)
            x = made.start_std() * noise[rows].normal(D.shape, "start")
            parts.append(use(D, x, take(cond, rows), noise=noise[rows].fold("sampler")))
        return torch.cat(parts), cond

    def _measures(self, x: Tensor) -> dict[str, float]:
        found = spread(x)
        if self.classifier is not None and all(math.isfinite(v) for v in found.values()):
            found["modes"] = modes(x, self.classifier)
        return found

    def measures(self, x: Tensor) -> dict[str, float | None]:
        """The measures of samples in units of the reference's; without those that the reference has none of."""
        found = self._measures(x)
        return {key: rounded(value / self.whole[key]) for key, value in found.items() if self.whole[key] > 0}

    def energy(self, x: Tensor, found: Mapping[str, float | None]) -> float | None:
        """The energy distance of samples with the measures ``found`` to the reference, in units of its mean distance.

        ``2 E|X-Y| - E|X-X'| - E|Y-Y'|`` (Szekely and Rizzo, Journal of Statistical Planning and Inference 143, 2013):
        0 for the same law, and by chance a little below. None where the reference has no spread, or for samples that
        are not finite.
        """
        own = found.get("distance")
        return (
            None
            if own is None
            else rounded(2 * across(x, self.compared.to(x.device)) / self.whole["distance"] - own - 1)
        )

    def look(self, report: Report) -> dict[str, Any]:
        """What the log says of the samples now: ``health/`` and a name, and ``collapsed``, where they have."""
        x, cond = self.samples(self.shipped, self.shipped.device)
        self.seen, found = x[:SHOWN].clone(), self.measures(x)
        self.looks.append(found)
        told: dict[str, Any] = {f"health/{key}": value for key, value in found.items()}
        told["health/energy"] = self.energy(x, found)
        if self.matched:
            directions = by_level(self.models.teacher, self.models.fake, x, cond, self.batch)
            told |= {f"health/direction@{level:.4g}": rounded(value) for level, value in directions.items()}
        why = collapsed(self.looks, self.start, report.progress)
        return told if why is None else told | {"collapsed": why}

    def facts(self) -> dict[str, Any]:
        """What the log does not say: reference, start and floor."""
        start = {"start": self.start, "start_energy": self.start_energy}
        return {"reference": self.reference, "of_reference": self.whole, **start, "fake_floor": self.floor}


def measures_in(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The measures that a log entry holds; None where nobody looked."""
    found = {key: entry[f"health/{key}"] for key in SPREADS if f"health/{key}" in entry}
    return found or None


def history(run: Run) -> list[dict[str, Any]]:
    """A run's log for its curves: with the start's measures as step 0, and the fake score's floor in every entry."""
    path = run.folder / FILE
    facts = read_json(path) if path.is_file() else {}
    floor = {} if facts.get("fake_floor") is None else {"health/fake_floor": facts["fake_floor"]}
    start = {f"health/{key}": value for key, value in facts.get("start", {}).items()}
    if start and facts.get("start_energy") is not None:
        start["health/energy"] = facts["start_energy"]
    entries = [entry | floor for entry in run.read_log()]
    return [{"step": 0, **start, **floor}, *entries] if start else entries


def classifier_of(data: Data, start: Generator) -> Classifier | None:
    """The packaged classifier where data or teacher are known to be digits, on the CPU; None elsewhere."""
    channels = start.denoiser.shape[0]
    if tuple(start.denoiser.shape) not in ((1, 8, 8), (3, 8, 8)):
        return None
    known = digits() if channels == 1 else StackedDigits()
    # Without data the teacher's card says what it was trained on.
    found = getattr(data, "fingerprint", None) or start.card.get("data")
    named = getattr(data, "name", None) == known.name
    return digits_extractor(channels=channels) if named or found == known.fingerprint else None


@torch.no_grad()
def fake_floor(method: Any, models: Models, x: Tensor, cond: Cond) -> float:
    """The fake score's denoising loss on the reference ``x`` (n, ...) before training, when it still is the teacher.

    An estimate of the loss that the fake score has to reach: that of a perfect denoiser of the student's samples, which
    nobody knows. The teacher stands for the perfect denoiser and the reference for the student's samples, under the
    method's own draw and weight; so it is too high for a student that is less varied than the reference.
    """
    noise = Noise.of(SEED, len(x), x.device)
    total = 0.0
    for again in range(4):
        made = method.fake_update(models, x, Batch(x, dict(cond)), noise.fold("floor", again)).loss()
        losses = {"loss": made} if isinstance(made, Tensor) else made
        total += float(losses.get("denoising", losses["loss"])) / 4
    return total


def bands(D: Any) -> Tensor:
    """:data:`BANDS` noise levels (BANDS,) float32 from high to low, spread over those where pictures form."""
    low, high = float(D.sigma_min), float(D.sigma_max)
    if high > HIGHEST_PICTURED:
        # Karras' grid from pure noise would have hardly a level where pictures form.
        times = torch.linspace(0.98, 0.02, BANDS, dtype=torch.float64)
        return FLOW.sigma(times).float()
    return karras(BANDS + 1, low, high, to_zero=False)[1:-1].float()


@torch.no_grad()
def by_level(teacher: Denoiser, fake: Denoiser, x: Tensor, cond: Cond, batch: int) -> dict[float, float]:
    """The mean of ``|D_fake - D_teacher|`` over samples ``x`` (n, ...) noised to each level of :func:`bands`.

    This is the direction in which distribution matching moves a sample, before any weight (arXiv 2311.18828, eq. 7):
    each level sees the share ``1 / BANDS`` of the samples, so that all levels cost two evaluations of ``x``.
    """
    levels = bands(teacher)
    noise = Noise.of(SEED, len(x), x.device).fold("direction")
    band = torch.arange(len(x), device=x.device) % len(levels)
    sigma = levels.to(x.device)[band]
    y = x + widen(sigma, x) * noise.normal(x.shape[1:], "n")
    parts = []
    for i in range(0, len(x), batch):
        rows = slice(i, i + batch)
        own = take(cond, rows)
        parts.append((fake(y[rows], sigma[rows], own) - teacher(y[rows], sigma[rows], own)).abs().flatten(1).mean(1))
    each = torch.cat(parts).float()
    sums = torch.zeros(len(levels), device=x.device).index_add_(0, band, each)
    means = sums / torch.bincount(band, minlength=len(levels)).clamp_min(1)
    return dict(zip(levels.tolist(), means.tolist(), strict=True))
