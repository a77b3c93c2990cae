"""``fewstep evaluate``: scores of a generator, or of pictures that are there, against real ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.cli.base import SamplerFlags, SourceFlags, next_folder, recipe_of
from fewstep.cli.candidates import check_shapes, reference
from fewstep.core import distributed
from fewstep.core.cond import Batch, Cond
from fewstep.core.generator import CONFIG, PIPELINE_INDEX, Generator, check_device
from fewstep.core.sample import Sampler
from fewstep.core.state import Run
from fewstep.data import SUFFIXES, Data, load_data, walk
from fewstep.errors import InputError, unknown
from fewstep.measure import METRICS, Scores, Statistics, evaluate, evaluate_by_class
from fewstep.measure.reference import RealData
from fewstep.report.pictures import save_grid
from fewstep.report.rows import SHOWN, check_metrics, converging, drawn_labels, evaluations
from fewstep.report.shards import Shards, fill_with
from fewstep.report.table import show

PICTURES = 2000
# Of the real pictures of each class, and of those generated in it, that its scores need.
LEAST = 6


@dataclass(frozen=True)
class Evaluate:
    """Scores a generator, or pictures that are there; the number of pictures is part of every metric's name.

    Pictures are made in batches that are kept until they are scored, so that a stopped run goes on with --resume. Under
    torchrun, or with --processes, several processes make them; the scores are the same.

    Attributes:
        generator: a folder of fewstep or diffusers, a Hub id, or a checkpoint; or pictures: a folder of image files, or
            a .npz, .npy or .parquet file.
        data: real pictures (digits, stacked-digits, a folder, Parquet files, an array), or an .npz of statistics.
        resize: side that encoded real pictures are resized to, in pixels.
        n: how many pictures to generate, 2000 without; or how many of those that are there, all without.
        seed: of the pictures.
        metrics: names separated by commas; all that apply without.
        extractor: features to compare in: digits, cifar10-8, cifar10-32, pixel, inception:<file>, dinov2:<folder>,
            clip:<folder>; see docs/measures.md. The packaged network of digits or CIFAR-10 without one.
        plain: Frechet distances as they are published, not scaled to 100.
        by_class: also the scores of each class for itself.
        paired: also the RMSE to the generator's own converged end points at the same noise.
        batch: pictures at a time.
        processes: how many processes of this machine make the pictures; with --device cuda, each on a GPU in turn.
        out: run folder; runs/evaluate-<number> without one.
        device: cpu, cuda, cuda:1 or mps.
        resume: goes on with an earlier run of the same flags.
        overwrite: deletes an earlier run in out.
        source: how to open the generator.
        flags: how to sample.
    """

    generator: Annotated[str, tyro.conf.Positional]
    data: str = "digits"
    resize: int | None = None
    n: int | None = None
    seed: int = 1
    metrics: str = "default"
    extractor: str | None = None
    plain: bool = False
    by_class: bool = False
    paired: bool = False
    batch: int = 1000
    processes: int = 1
    out: Path | None = None
    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)
    flags: Annotated[SamplerFlags, tyro.conf.arg(name="")] = field(default_factory=SamplerFlags)

    def run(self) -> None:
        """Runs the command."""
        self._check()
        device = check_device(self.device)
        real = reference(self.data, self.resize)
        distributed.start(device)
        if is_pictures(self.generator):
            self._pictures(real)
        else:
            self._generated(real)

    def _check(self) -> None:
        """Refuses flags that mean nothing."""
        for name in () if self.metrics == "default" else self._wanted():
            if name not in METRICS:
                raise unknown("metric", name, METRICS)
        if (self.n is not None and self.n < 1) or self.batch < 1 or self.processes < 1:
            raise InputError(
                f"--n, --batch and --processes must be at least 1, got {self.n}, {self.batch} and {self.processes}"
            )
        if self.resume and self.out is None:
            raise InputError("--resume needs --out: the folder of the run to go on with")

    def _wanted(self) -> tuple[str, ...] | str:
        return self.metrics if self.metrics == "default" else tuple(m.strip() for m in self.metrics.split(","))

    def _opened_run(self) -> Run:
        """The run folder, claimed by the first process; the others wait for it."""
        if distributed.world() > 1 and self.out is None:
            raise InputError("torchrun needs --out: all processes must know the folder")
        recipe = recipe_of("evaluate", self)
        # How many made the pictures changes none of them.
        recipe["arguments"].pop("processes")
        folder = self.out or next_folder("evaluate")
        if distributed.rank() == 0:
            Run.open(folder, recipe, resume=self.resume, overwrite=self.overwrite)
        distributed.barrier()
        return Run(folder)

    def opened(self, rank: int) -> tuple[Generator, Sampler, Cond | None]:
        """The generator and its sampler, on the device of a process; conditions are drawn."""
        device = self.device
        if device == "cuda" and self.processes > 1 and torch.cuda.device_count() > 1:
            device = f"cuda:{rank % torch.cuda.device_count()}"
        made = self.flags.guided(self.source.open(self.generator, device))
        return made, self.flags.resolve(made)[1], None

    def _generated(self, real: RealData | Statistics) -> None:
        made = self.flags.guided(self.source.open(self.generator, self.device))
        label, sampler = self.flags.resolve(made)
        n = PICTURES if self.n is None else self.n
        labels = drawn_labels(made, n, self.seed)
        check_metrics(self._wanted(), real, n, extractor=self.extractor, labelled=labels is not None)
        check_shapes({"the generator": made}, real)
        self._check_classes(real, labels)
        run = self._opened_run()
        if self._told(run):
            return
        shards = Shards(run.folder / "shards", n, self.seed, self.batch)
        self._fill(shards, made, sampler)
        facts: dict[str, Any] = {"sampler": label, "nfe": evaluations(made, sampler, self.seed)}
        ends = None
        if self.paired:
            ends = Shards(run.folder / "ends", n, self.seed, self.batch)
            ends.fill(made, converging(made), rank=distributed.rank(), world=distributed.world())
        distributed.barrier()
        if distributed.rank():
            return
        facts["seconds"], facts["seconds_per_picture"] = shards.seconds()
        scores, classes = self._scores(shards, real, labels)
        if ends is not None:
            facts["rmse_to_converged"] = rmse(shards, ends)
        save_grid(shards.first(SHOWN), run.folder / "samples.png")
        self._log(run, scores, classes, facts)
        for done in (shards, ends):
            if done is not None:
                done.delete()

    def _fill(self, shards: Shards, made: Generator, sampler: Sampler) -> None:
        if self.processes > 1 and shards.missing():
            fill_with(self, shards, self.processes)
        shards.fill(made, sampler, rank=distributed.rank(), world=distributed.world())

    def _pictures(self, real: RealData | Statistics) -> None:
        if self.paired or self.processes > 1 or self.flags != SamplerFlags():
            raise InputError(f"{self.generator} holds pictures: --paired, --processes and samplers need a generator")
        data = load_data(str(Path(self.generator).expanduser()), limit=self.n)
        if not isinstance(real, Statistics) and data.shape != tuple(real.shape):
            raise InputError(f"{self.generator} holds pictures of {data.shape} and {self.data} has {real.shape}")
        cond = data.take(torch.arange(len(data))).cond if self.by_class else data.take(torch.arange(1)).cond
        check_metrics(self._wanted(), real, len(data), extractor=self.extractor, labelled="label" in cond)
        self._check_classes(real, cond.get("label"))
        run = self._opened_run()
        if self._told(run) or distributed.rank():
            return
        scores, classes = self._scores(Batches(data, self.batch), real, None)
        save_grid(torch.cat([b.x for b in Batches(data, SHOWN) if b.x is not None][:1]), run.folder / "samples.png")
        self._log(run, scores, classes, {"sampler": "none", "nfe": 0})

    def _check_classes(self, real: RealData | Statistics, labels: Tensor | None) -> None:
        if not self.by_class:
            return
        if labels is None or isinstance(real, Statistics):
            what = "pictures with classes" if labels is None else f"real pictures, and {self.data} holds statistics"
            raise InputError(f"--by-class needs {what}: leave it out")
        counts = labels.bincount()
        few = [c for c in labels.unique().tolist() if counts[c] < LEAST]
        if few:
            raise InputError(f"--by-class: class {few[0]} has {counts[few[0]]} pictures, expected {LEAST}: raise --n")

    def _scores(
        self, pictures: Any, real: RealData | Statistics, labels: Tensor | None
    ) -> tuple[Scores, dict[int, Scores]]:
        """Scores of all pictures, and of each class if asked."""
        shared: dict[str, Any] = {
            "metrics": self._wanted(),
            "labels": labels,
            "extractor": self.extractor,
            "seed": self.seed,
            "normalise": not self.plain,
        }
        scores = evaluate(pictures, real, intervals=True, **shared)
        if not self.by_class or isinstance(real, Statistics):
            return scores, {}
        return scores, evaluate_by_class(pictures, real, **shared)

    def _log(self, run: Run, scores: Scores, classes: dict[int, Scores], facts: dict[str, Any]) -> None:
        intervals = {name: list(scores.interval(name)) for name in scores.errors}
        entry = {"step": 0, **facts, **scores, "intervals": intervals, "facts": scores.facts}
        if classes:
            entry["classes"] = {str(c): dict(found) for c, found in classes.items()}
        run.log(entry)
        self._told(run)

    def _told(self, run: Run) -> bool:
        """Prints what the run has measured, and whether it has."""
        entries = run.read_log()
        if entries and distributed.rank() == 0:
            print_scores(f"{self.generator}: {entries[0]['sampler']}, {entries[0]['nfe']} evaluations", entries[0])
        return bool(entries)


@dataclass(frozen=True)
class Batches:
    """The pictures of a data set with their labels, as often as they are asked for."""

    data: Data
    batch: int

    def __iter__(self) -> Iterator[Batch]:
        return (self.data.take(ids) for ids in torch.arange(len(self.data)).split(self.batch))


def is_pictures(place: str) -> bool:
    """Whether a path holds pictures and no generator."""
    path = Path(place).expanduser()
    if path.is_file():
        return path.suffix.lower() in (".npz", ".npy", ".parquet")
    if not path.is_dir() or any((path / name).exists() for name in (CONFIG, PIPELINE_INDEX)):
        return False
    return any(f.suffix.lower() in (*SUFFIXES, ".parquet") for f in walk(path))


def rmse(a: Shards, b: Shards) -> float:
    """Mean over the pictures of the root mean square difference."""
    total = sum(float((x - y).flatten(1).double().square().mean(1).sqrt().sum()) for x, y in zip(a, b, strict=True))
    return total / a.n


def print_scores(title: str, entry: dict[str, Any]) -> None:
    """A logged evaluation as tables."""
    table = Table("metric", "value", "95 %", title=title)
    for key, value in entry.items():
        if isinstance(value, float):
            span = entry["intervals"].get(key)
            table.add_row(key, f"{value:.4f}", "" if span is None else f"{span[0]:.4f} to {span[1]:.4f}")
    Console().print(table)
    classes = entry.get("classes", {})
    if classes:
        names = list(dict.fromkeys(name.partition("@")[0] for found in classes.values() for name in found))
        by_class = Table("class", *names, title="each class for itself, at its own count")
        for c, found in classes.items():
            short = {key.partition("@")[0]: value for key, value in found.items()}
            by_class.add_row(c, *(show(short.get(name)) or "0" for name in names))
        Console().print(by_class)
