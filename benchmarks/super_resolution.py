"""Small digits made large in a few evaluations: CoDi, adversarial consistency and TAD-SR beside full sampling.

    python benchmarks/super_resolution.py        # about 15 minutes on one core

Trains a network that reads the 4x4 picture (the teacher), and students of it without and with the adversarial term.
CoDi starts from a U-Net that knows no pictures, and so does the fine-tune beside it: the same branch, trained to
denoise. The last 297 digits are held out and what is measured. Writes benchmarks/results/super-resolution.json: PSNR,
SSIM, colour shift, Frechet distance and seconds per evaluations. A method that was measured before with the same
teacher and the same settings keeps its rows until it is measured again.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import Generator
from fewstep.core.cond import Batch
from fewstep.core.noise import Noise
from fewstep.core.path import widen
from fewstep.core.role import Models, Optim, Role, Update
from fewstep.core.sample import Sampler
from fewstep.core.state import read_json, write_text
from fewstep.data import Images
from fewstep.data.conditions import ImageConditions
from fewstep.data.digits import digits
from fewstep.data.sr import SuperResolution
from fewstep.distill import distill
from fewstep.distill.adversarial_consistency import AdversarialCD
from fewstep.distill.codi import CoDi
from fewstep.distill.tad_sr import TADSR
from fewstep.grid.karras import karras
from fewstep.measure import evaluate
from fewstep.measure.paired import colour_bias, paired
from fewstep.models.control import controlled
from fewstep.models.frozen import network_under
from fewstep.models.image_conditioned import image_conditioned, upsampled
from fewstep.solve.dpmpp import dpmpp
from fewstep.train import EDMTraining, train, untrained

HELD_OUT, WINDOW = 297, 7
COLUMNS = ("psnr", "ssim", "colour_shift", "fd", "pixel_fd", "seconds")


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        free: a U-Net of digits that knows no 4x4 pictures, for CoDi; see benchmarks/digits.py.
        network: of the teacher, resmlp or unet.
        methods: consistency, adversarial, fine-tune, codi, codi-noise, codi-controlled, codi-no-data, tad-sr,
            tad-sr-no-score, tad-sr-sds, tad-sr-data, tad-sr-no-game and tad-sr-unaware.
        teacher_steps: training steps of the teacher.
        steps: training steps of each student of it.
        codi_steps: training steps of CoDi and of the fine-tune.
        batch: pictures per step.
        lr: peak learning rate of the students.
        nfes: evaluations.
        repeats: pictures made of each held-out one.
        noise: on the 4x4 pictures.
        seed: of the pictures.
        threads: of torch.
        out: folder of the runs.
        results: where the numbers go.
    """

    free: Path = Path("runs/bench-digits/teacher-unet")
    network: str = "resmlp"
    methods: tuple[str, ...] = ("consistency", "adversarial", "fine-tune", "codi", "tad-sr")
    teacher_steps: int = 2000
    steps: int = 300
    codi_steps: int = 300
    batch: int = 64
    lr: float = 1e-3
    nfes: tuple[int, ...] = (1, 2, 4)
    repeats: int = 3
    noise: float = 0.0
    seed: int = 11
    threads: int = 1
    out: Path = Path("runs/bench-super-resolution")
    results: Path = Path("benchmarks/results")


@dataclass(frozen=True)
class FineTune(CoDi):
    """CoDi's branch on the same frozen network, trained as a diffusion model is: slow to sample from, and its match."""

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The student alone, in the form of the teacher."""
        conds, D = teacher.conds, network_under(teacher.denoiser)
        assert isinstance(conds, ImageConditions)
        return {"student": Role(lambda: controlled(D, conds.shape, held=True), self.optim, self.ema, ships=True)}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """EDM's loss (arXiv 2206.00364, table 1)."""
        x0, D = batch.x, m.student
        assert x0 is not None
        sigma = (-1.2 + 1.2 * noise.normal((), "level", dtype=torch.float64)).exp()
        weight = widen(1 / sigma.square() + 1 / D.sigma_data**2, x0)
        x = x0 + widen(sigma, x0) * noise.normal(x0.shape[1:], "n")
        yield Update("student", lambda: (weight * (D(x, sigma, batch.cond) - x0).square()).mean())


def halves(flags: Flags) -> tuple[SuperResolution, SuperResolution]:
    """The digits to learn from, and those held out."""
    whole = digits()
    cut = len(whole) - HELD_OUT

    def part(rows: slice) -> SuperResolution:
        assert whole.labels is not None
        made = Images("digits", whole.pixels[rows], whole.labels[rows], scale=whole.scale, classes=10)
        return SuperResolution(made, noise=flags.noise)

    return part(slice(0, cut)), part(slice(cut, None))


def teacher_of(flags: Flags, data: SuperResolution) -> tuple[Generator, float]:
    """The teacher, trained once, and the seconds that it took."""
    start = untrained(data, flags.network)
    D = image_conditioned(start.network, data.image_shape)  # type: ignore[arg-type]
    start = replace(start, denoiser=D, conds=ImageConditions(data))
    method, out = EDMTraining(class_dropout=0.0, optim=Optim(lr=2e-3, warmup=50, decay="cosine", clip=1.0)), flags.out
    resume = (out / "teacher" / "recipe.json").is_file()
    made = train(
        start, method, data, out=out / "teacher", budget=flags.teacher_steps, batch=flags.batch, resume=resume,
        save_every=0,
    )  # fmt: skip
    return made, float(made.card["trained"]["seconds"])


def methods_of(flags: Flags) -> dict[str, Any]:
    """The methods by name; all have the same optimizer."""
    optim = Optim(lr=flags.lr, warmup=20, decay="cosine", clip=1.0)
    codi, tad = CoDi(optim=optim), TADSR(student=optim, critic=optim)
    return {
        "fine-tune": FineTune(optim=optim),
        "codi": codi,
        "codi-noise": replace(codi, form="noise"),
        "codi-controlled": replace(codi, move="controlled"),
        "codi-no-data": replace(codi, data_weight=0.0),
        "consistency": AdversarialCD(adversarial=0.0, optim=optim),
        "adversarial": AdversarialCD(optim=optim),
        "tad-sr": tad,
        "tad-sr-no-score": replace(tad, score="none"),
        "tad-sr-sds": replace(tad, score="sds"),
        "tad-sr-data": replace(tad, target="data"),
        "tad-sr-no-game": replace(tad, adversarial=0.0),
        "tad-sr-unaware": replace(tad, time_aware=False),
    }


def measure(flags: Flags, made: Generator, sampler: Sampler, name: str, held: SuperResolution) -> dict[str, Any]:
    """One row; every picture is made ``repeats`` times, and the clock runs after a first small batch."""
    ids = torch.arange(len(held)).repeat(flags.repeats)
    batch = held.take(ids)
    assert batch.x is not None
    images = batch.cond["image"]
    # A model that knows no pictures is told none.
    told = [None if made.conds is None else {"image": part} for part in (images[:8], images)]
    made.sample(8, told[0], sampler=sampler, progress=False)
    clock = time.perf_counter()
    pictures = made.sample(len(ids), told[1], seed=flags.seed, sampler=sampler, batch=len(ids), progress=False)
    seconds = time.perf_counter() - clock
    return {"name": name, "nfe": sampler.nfe, **scores(pictures, batch.x), "seconds": round(seconds, 3)}  # type: ignore[attr-defined]


def scores(pictures: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
    """All that needs pictures alone; the Frechet distances are to all digits."""
    found = evaluate(pictures, digits(), metrics=("fd", "pixel_fd"))
    plain = {k.split("@")[0]: round(v, 4) for k, v in found.items()}
    pairs = {k: round(v, 4) for k, v in paired(pictures, right, window=WINDOW)._asdict().items()}
    return {**pairs, "colour_bias": [round(v, 4) for v in colour_bias(pictures, right)], **plain}


def main(flags: Flags) -> None:
    """Trains what is not there yet, and measures everything."""
    torch.set_num_threads(flags.threads)
    data, held = halves(flags)
    teacher, spent = teacher_of(flags, data)
    first = held.take(torch.arange(len(held)))
    assert first.x is not None
    enlarged = upsampled(first.cond["image"], (8, 8)).clamp(-1, 1)
    rows = [{"name": "bilinear", "nfe": 0, **scores(enlarged, first.x), "seconds": 0.0}]
    rows.append({**measure(flags, teacher, teacher.sampler, "teacher, Heun", held), "training_seconds": spent})
    rows += [measure(flags, teacher, fast(teacher, nfe), "teacher, DPM++", held) for nfe in flags.nfes]
    rows += [row for row in earlier(flags, teacher) if row["method"] not in flags.methods]
    for name in flags.methods:
        rows += students(flags, teacher, data, held, name)
        save(flags, teacher, rows)
    show(rows)


def file_of(flags: Flags) -> Path:
    """Where the numbers go."""
    return flags.results / "super-resolution.json"


def earlier(flags: Flags, teacher: Generator) -> list[dict[str, Any]]:
    """The students' rows of an earlier call, if they are of this teacher and these settings."""
    body = read_json(file_of(flags)) if file_of(flags).is_file() else {}
    if body.get("teacher") != teacher.fingerprint() or body.get("settings") != settings(flags):
        return []
    return [row for row in body["rows"] if "method" in row]


def settings(flags: Flags) -> dict[str, Any]:
    """What all rows of a file have in common, as JSON has it."""
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items() if k not in ("methods", "results")}
    return dict(json.loads(json.dumps(told)))


def students(
    flags: Flags, teacher: Generator, data: SuperResolution, held: SuperResolution, name: str
) -> list[dict[str, Any]]:
    """One training, one row for every number of evaluations."""
    method, out = methods_of(flags)[name], flags.out / name
    codi = isinstance(method, CoDi)
    start = replace(Generator.load(flags.free), conds=None) if codi else teacher
    options: dict[str, Any] = {"batch": flags.batch, "resume": (out / "recipe.json").is_file(), "save_every": 0}
    made = distill(start, method, data, out=out, budget=flags.codi_steps if codi else flags.steps, **options)
    spent = float(made.card["trained"]["seconds"])
    if isinstance(method, FineTune):
        rows = [measure(flags, start, start.sampler, "U-Net without the branch, Heun", held)]
        tables = [start.sampler, *(fast(start, nfe) for nfe in flags.nfes)]
    else:
        counts = (1,) if isinstance(method, TADSR) else flags.nfes
        rows, tables = [], [replace(method, steps=nfe).sampler(start) for nfe in counts]
    rows += [{**measure(flags, made, table, name, held), "training_seconds": spent} for table in tables]
    return [{**row, "method": name} for row in rows]


def fast(made: Generator, nfe: int) -> Sampler:
    """DPM-Solver++ of second order on Karras' grid."""
    D = made.denoiser
    return dpmpp(karras(nfe, D.sigma_min, D.sigma_max), 2)


def save(flags: Flags, teacher: Generator, rows: list[dict[str, Any]]) -> None:
    """What has been measured so far."""
    body = {
        "benchmark": "super-resolution",
        "settings": settings(flags),
        "teacher": teacher.fingerprint(),
        "machine": f"{platform.machine()}, {flags.threads} threads, torch {torch.__version__}",
        "rows": rows,
    }
    flags.results.mkdir(parents=True, exist_ok=True)
    write_text(file_of(flags), json.dumps(body, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table("sampler", "NFE", *COLUMNS)
    for row in rows:
        table.add_row(row["name"], str(row["nfe"]), *(f"{row[c]:.3f}" if c in row else "" for c in COLUMNS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Flags))
