"""Measuring several generators at several numbers of evaluations, so that the rows can be compared with each other.

Every row makes its pictures from the same seeds and conditions and is scored against the same reference under the same
extractor. Beside its scores it keeps its Frechet distance without each of ten blocks of seeds, which is what
:mod:`fewstep.report.verdict` compares.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import module_of
from fewstep.core.generator import Generator
from fewstep.core.sample import Sampler
from fewstep.core.state import load_tensors, read_json, save_tensors, write_text
from fewstep.errors import InputError
from fewstep.measure import Moments, Reference, Scores, Statistics, Target, evaluate
from fewstep.measure.evaluate import applicable, extractor_for
from fewstep.measure.features import Extractor
from fewstep.measure.frechet import BLOCKS
from fewstep.measure.metrics import METRICS
from fewstep.measure.reference import RealData
from fewstep.report.shards import Shards

ROW, SHOWN, WORK = "row.json", "shown.safetensors", "shards"
FORMAT = "fewstep-comparison/1"
# Pictures of a row that the page may show.
KEPT = 16


@dataclass
class Entry:
    """A row: one generator under one sampler, measured.

    Attributes:
        model: short name of the generator.
        sampler: name of the sampler.
        how: how the row came about, in a few words.
        nfe: denoiser evaluations per picture.
        seconds: per picture, of the fastest batch.
        batch: pictures in that batch.
        parameters: of the network; None where it is no module.
        memory: most bytes that were allocated on a CUDA device while sampling; None elsewhere.
        fingerprint: 16 hex digits of the generator; None where it has none.
        fd: Frechet distance of all pictures.
        blocks: the same without one block of seeds at a time.
        scores: the other metrics by name with the sample count.
        errors: standard errors of those that have one.
        facts: extractor, reference and counts behind the scores.
        pictures: (n, C, H, W) in [-1, 1], the first ones; not part of the JSON.
    """

    model: str
    sampler: str
    how: str
    nfe: int
    seconds: float
    batch: int
    parameters: int | None
    memory: int | None
    fingerprint: str | None
    fd: float
    blocks: list[float]
    scores: dict[str, float]
    errors: dict[str, float]
    facts: dict[str, Any]
    pictures: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)

    @property
    def label(self) -> str:
        """What the verdict calls it."""
        return f"{self.model} with {self.sampler}, {self.nfe} evaluation{'s' * (self.nfe != 1)}"

    def body(self) -> dict[str, Any]:
        """All but the pictures, as JSON values."""
        return {key: value for key, value in asdict(self).items() if key != "pictures"}

    def save(self, folder: Path) -> None:
        """Writes the row, the numbers last: a folder with them is a whole row."""
        save_tensors(folder / SHOWN, {"pictures": self.pictures})
        write_text(folder / ROW, json.dumps(self.body(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Entry:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: a file is missing, damaged, or lacks something.
        """
        body = read_json(folder / ROW)
        names = {f.name for f in fields(cls)} - {"pictures"}
        if set(body) != names:
            raise InputError(f"{folder / ROW} is no row of a comparison: delete {folder} and go on with --resume")
        return cls(**body, pictures=load_tensors(folder / SHOWN)["pictures"])


class Blocks:
    """Moments of features in blocks of seeds: picture i belongs to block i modulo their number.

    Args:
        dim: features per picture.
        count: blocks.
    """

    def __init__(self, dim: int, count: int = BLOCKS) -> None:
        self.parts = [Moments(dim) for _ in range(count)]

    def add(self, features: Tensor, ids: Tensor) -> None:
        """Takes in features (B, dim) of the pictures ``ids`` (B,)."""
        for b, part in enumerate(self.parts):
            part.update(features[ids % len(self.parts) == b])

    def distances(self, target: Target, *, normalise: bool = True) -> tuple[float, list[float]]:
        """The Frechet distance of all pictures, and those without one block at a time.

        Raises:
            InputError: fewer than two pictures in a block.
        """
        if min(part.n for part in self.parts) < 2:
            raise InputError(
                f"{sum(part.n for part in self.parts)} pictures in {len(self.parts)} blocks, expected at least "
                f"{2 * len(self.parts)} pictures: raise --n"
            )

        def distance(without: int | None) -> float:
            joined = Moments(self.parts[0].dim)
            for b, part in enumerate(self.parts):
                if b != without:
                    joined.merge(part)
            return target.distance(joined, normalise=normalise)

        return distance(None), [distance(b) for b in range(len(self.parts))]


@dataclass(frozen=True)
class Measure:
    """What all rows are measured with.

    Attributes:
        real: pictures, or statistics of them.
        extractor: of the features.
        names: metrics; "fd" is one of them.
        n: pictures of each row.
        seed: of the pictures.
        batch: pictures at a time.
        normalise: True scales Frechet distances so that 100 is the variance of the real features.
    """

    real: RealData | Statistics
    extractor: Extractor
    names: list[str]
    n: int
    seed: int
    batch: int
    normalise: bool = True

    @classmethod
    def of(
        cls,
        real: RealData | Statistics,
        *,
        extractor: str | Extractor | None = None,
        metrics: Sequence[str] | str = "default",
        n: int = 2000,
        seed: int = 1,
        batch: int = 250,
        normalise: bool = True,
    ) -> Measure:
        """Checks everything that does not depend on a generator.

        Raises:
            InputError: too few pictures, a batch below 1, an unknown metric or one that does not apply, or a reference
                of another extractor.
        """
        if batch < 1:
            raise InputError(f"--batch must be at least 1, got {batch}")
        if n < 2 * BLOCKS:
            raise InputError(f"--n {n}: a comparison needs at least {2 * BLOCKS} pictures, two in each of its blocks")
        use = extractor_for(extractor, real)
        if isinstance(real, Statistics):
            real.check(use)
        shape = None if isinstance(real, Statistics) else tuple(real.shape)
        names = applicable(metrics, use, shape, statistics=isinstance(real, Statistics))
        for name in names:
            if n < METRICS[name].least:
                raise InputError(f"metric {name!r} needs at least {METRICS[name].least} pictures, got {n}: raise --n")
        return cls(real, use, list(dict.fromkeys(["fd", *names])), n, seed, batch, normalise)

    def target(self) -> Target:
        """The real side of the Frechet distance."""
        if isinstance(self.real, Statistics):
            return self.real.target
        return Target.of(Reference.of(self.real, self.extractor, keep=0).moments)

    def scores(self, shards: Shards, labels: Tensor | None) -> tuple[float, list[float], Scores]:
        """Frechet distance, the same by blocks, and the other scores of some pictures."""
        blocks, found = Blocks(self.extractor.dim), Scores({}, {}, {})
        rest = [name for name in self.names if name != "fd" and (name != "accuracy" or labels is not None)]
        if rest:
            found = evaluate(
                shards,
                self.real,
                metrics=rest,
                labels=labels,
                extractor=self.extractor,
                seed=self.seed,
                normalise=self.normalise,
                intervals=True,
                watch=blocks.add,
            )
        else:
            for shard, pictures in enumerate(shards):
                blocks.add(self.extractor(pictures).cpu(), shards.ids(shard))
        # After the other scores, whose reference serves the distance too.
        fd, without = blocks.distances(self.target(), normalise=self.normalise)
        return fd, without, found


def measured(
    folder: Path,
    generator: Generator,
    sampler: Sampler,
    measure: Measure,
    *,
    model: str,
    name: str,
    how: str,
    cond: Cond | None = None,
    fingerprint: str | None = None,
) -> Entry:
    """The row in ``folder``: read where it is whole, and otherwise made, going on with the pictures that are there.

    ``cond`` has a row for each picture; None draws them. The pictures are deleted once they are scored, but for the
    first few.

    Raises:
        InputError: see :func:`fewstep.report.shards.pictures_of` and :func:`fewstep.measure.evaluate`; or a row that
            was made with another generator or sampler.
    """
    if (folder / ROW).is_file():
        found = Entry.load(folder)
        if (found.model, found.sampler, found.nfe, found.fingerprint) != (model, name, sampler.nfe, fingerprint):
            raise InputError(
                f"{folder} was measured with {found.label} of another state ({found.fingerprint}, now {fingerprint}): "
                f"choose another --out, or --overwrite"
            )
        return found
    shards = Shards(folder / WORK, measure.n, measure.seed, measure.batch)
    cuda = generator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(generator.device)
    shards.fill(generator, sampler, cond=cond)
    memory = torch.cuda.max_memory_allocated(generator.device) if cuda else None
    labels = None if cond is None else cond.get("label")
    fd, blocks, scores = measure.scores(shards, labels)
    module = module_of(generator.denoiser)
    entry = Entry(
        model=model,
        sampler=name,
        how=how,
        nfe=sampler.nfe,
        seconds=shards.seconds()[1],
        batch=min(measure.batch, measure.n),
        parameters=None if module is None else sum(p.numel() for p in module.parameters()),
        memory=memory,
        fingerprint=fingerprint,
        fd=fd,
        blocks=blocks,
        scores=dict(scores),
        errors=scores.errors,
        facts=scores.facts,
        pictures=shards.first(KEPT),
    )
    entry.save(folder)
    shards.delete()
    return entry
