"""Methods side by side: one teacher, the same picture seeds, the same time of training, one, two and four evaluations.

    python benchmarks/methods.py --task digits --methods cd sfd --seconds 60
    python benchmarks/methods.py --task digits --claims cd-target sfd-between --seconds 60
    python benchmarks/methods.py --task cifar8 --data cifar10/train.parquet

A budget is given in seconds of CPU (of the wall on an accelerator). A short run measures how many iterations fit, and
the training then takes that number, so that it can be repeated. Methods that need a training for every number of
evaluations get the budget for each; the stages of progressive distillation share it. Writes
benchmarks/results/methods-<task>.json; a method that was measured before keeps its rows until it is measured again.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep import Generator
from fewstep.cli.calibrate import calibrate_generator
from fewstep.core.options import FitOptions
from fewstep.core.role import Optim
from fewstep.core.state import read_json, write_text
from fewstep.data import Pairs, make_pairs
from fewstep.distill import DMD2, METHODS
from fewstep.distill.front import distill
from fewstep.distill.published import scaled, small
from fewstep.distill.several import distill_steps
from fewstep.errors import CollapseError, InputError, unknown
from fewstep.train.memory import estimate_memory
from tasks import Task, task

# Settings for trainings of minutes, of networks that start afresh. The published GET is four times the teacher here;
# its twin has as many blocks to run, none of them shared.
SHORT: dict[str, dict[str, Any]] = {
    "get": {
        "width": 64, "depth": 2, "tied": 2, "tied_mlp": 4.0, "iterations": 4, "vit_depth": 10,
        "optim": Optim(lr=2e-3, warmup=100, decay="cosine", clip=1.0),
    },
}  # fmt: skip
# The momentum that small networks are trained without.
HEAVY = replace(small(DMD2()).student, betas=(0.9, 0.999))


@dataclass(frozen=True)
class Variant:
    """A method with some of its settings changed; ``start`` names a class method that makes it instead."""

    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""

    @property
    def name(self) -> str:
        """What rows are called: the method, and what was changed of its defaults."""
        plain = self._plain()
        shown = {k: f"lr {v.lr:g} betas {v.betas}" if isinstance(v, Optim) else v for k, v in self.fields.items()}
        changed = [f"{k}={shown[k]}" for k, v in self.fields.items() if getattr(plain, k) != v]
        return ", ".join([self.method + (f" ({self.start})" if self.start else ""), *changed])

    def _plain(self) -> Any:
        kind = METHODS[self.method]
        made = small(getattr(kind, self.start)() if self.start else kind())
        return replace(made, **SHORT.get(self.method, {}))

    def made(self, teacher: Generator) -> Any:
        """The method, with learning rates for this teacher's size, or those of :data:`SHORT`."""
        return replace(scaled(self._plain(), teacher), **{**SHORT.get(self.method, {}), **self.fields})


@dataclass(frozen=True)
class Claim:
    """That a part of a method helps: both variants, and what is compared."""

    true: Variant
    false: Variant
    compared: str


def pair(method: str, compared: str, with_: Mapping[str, Any], without: Mapping[str, Any]) -> Claim:
    """A claim on settings of one method."""
    return Claim(Variant(method, with_), Variant(method, without), compared)


# They learn from what `fewstep pairs` makes.
ON_PAIRS = ("reflow", "slimflow", "get", "dmd", "sdxs")

# Both sides are written out, whatever the defaults are; a side that is the default shares its row with the method's.
CLAIMS: dict[str, Claim] = {
    "pd-weight": pair(
        "progressive", "truncated SNR against the error of x0", {"weight": "truncated-snr"}, {"weight": "constant"}
    ),
    "pd-draw": pair(
        "progressive", "only the sampler's levels against any between", {"draw": "discrete"}, {"draw": "continuous"}
    ),
    "pd-grid": pair("progressive", "cosine levels against Karras'", {"grid": "cosine"}, {"grid": "karras"}),
    "cd-target": pair("cd", "an average as target against the student itself", {"target": "ema"}, {"target": "self"}),
    "cd-distance": pair("cd", "pseudo-Huber against mean square", {"distance": "huber"}, {"distance": "l2"}),
    "cd-solver": pair("cd", "Heun's step of the teacher against Euler's", {"solver": "heun"}, {"solver": "euler"}),
    "sfd-between": pair("sfd", "three teacher levels between the student's, or none", {"between": 3}, {"between": 0}),
    "sfd-sigma-min": pair("sfd", "lowest level .006 against .002", {"sigma_min": 0.006}, {"sigma_min": 0.002}),
    "ct-improved": Claim(Variant("ct"), Variant("ct", start="original"), "iCT against the first paper's training"),
    "ct-curriculum": pair("ct", "a grid that gets finer, or the finest throughout", {"first": 10}, {"first": 1280}),
    "ct-weight": pair(
        "ct", "pairs weighted by the inverse of their gap against alike", {"weighted": True}, {"weighted": False}
    ),
    "cd-weight": pair("cd", "pairs weighted by the inverse of their gap", {"weighted": True}, {"weighted": False}),
    "sfd-afs": pair("sfd", "an analytical first step against a network's", {"afs": True}, {"afs": False}),
    "sfd-against-pd": Claim(Variant("sfd"), Variant("progressive"), "whole trajectories against halving"),
    "scm-adaptive": pair("scm", "a learned weight of each level", {"adaptive": True}, {"adaptive": False}),
    "scm-tangent": pair("scm", "tangents put below 1 against left alone", {"tame": "norm"}, {"tame": "none"}),
    "ctm-reach": pair("ctm", "targets a random way ahead against one step", {"reach": "soft"}, {"reach": "local"}),
    "ctm-dsm": pair("ctm", "denoising beside", {"dsm": 1.0}, {"dsm": 0.0}),
    "mean-flow-source": pair(
        "mean-flow", "the teacher's flow or the data's", {"source": "teacher"}, {"source": "data"}
    ),
    "tdd-target": pair("tdd", "targets at levels of few-step samplers", {"target": "drawn"}, {"target": "end"}),
    "tdd-weight": pair("tdd", "EDM's weight of levels against the paper's", {"weight": "edm"}, {"weight": "landing"}),
    "imagine-backward": pair(
        "imagine-flash", "learning on its own trajectory, or on noised data", {"backward": True}, {"backward": False}
    ),
    "imagine-shift": pair("imagine-flash", "a teacher asked at a shifted level", {"shift": 1.5}, {"shift": None}),
    "imagine-noise": pair(
        "imagine-flash", "the true noise in the first step", {"noise_correction": True}, {"noise_correction": False}
    ),
    "scflow-gan": pair("scflow", "an adversarial term", {"gan": 0.1}, {"gan": 0.0}),
    "scflow-correction": pair("scflow", "self-correction", {"correction": 0.1}, {"correction": 0.0}),
    "sana-adversarial": pair("sana-sprint", "the adversarial term", {"adversarial": 0.5}, {"adversarial": 0.0}),
    "sana-consistency": pair("sana-sprint", "the consistency term", {"consistency": 1.0}, {"consistency": 0.0}),
    "slimflow-guide": pair("slimflow", "guidance by two steps of the flow", {"guide": 1.0}, {"guide": 0.0}),
    "get-vit": pair("get", "an equilibrium against a deeper transformer", {"network": "get"}, {"network": "vit"}),
    "icd-preservation": pair("icd", "cycles that must end where they began", {"preserve": 1.5}, {"preserve": 0.0}),
    "dmd2-gan": pair("dmd2", "the GAN term", {"gan": 3e-3}, {"gan": 0.0}),
    "dmd2-momentum": pair("dmd2", "no momentum for either player", {}, {"student": HEAVY, "fake": HEAVY}),
    "dmd2-ratio": pair("dmd2", "five updates of the fake score for each of the student", {"ratio": 5}, {"ratio": 1}),
    "f-distill-js": pair(
        "f-distill",
        "Jensen-Shannon against reverse KL",
        {"divergence": "jensen-shannon"},
        {"divergence": "reverse-kl"},
    ),
    "f-distill-kl": pair(
        "f-distill", "forward against reverse KL", {"divergence": "forward-kl"}, {"divergence": "reverse-kl"}
    ),
    "f-distill-bins": pair("f-distill", "ratios relative to those of their noise level", {"bins": 10}, {"bins": 0}),
    "vsd-normaliser": pair("vsd", "DMD's normaliser against none", {"normaliser": "sample"}, {"normaliser": "none"}),
    "sid-alpha": pair("sid", "the loss's second term", {"alpha": 1.0}, {"alpha": 0.0}),
    "sid-alpha-paper": pair("sid", "alpha 1.2, the paper's, against 1", {"alpha": 1.2}, {"alpha": 1.0}),
    "sid-alpha-half": pair("sid", "alpha 0.5, half the Fisher divergence, against 1", {"alpha": 0.5}, {"alpha": 1.0}),
    "sid-against-vsd": Claim(Variant("sid"), Variant("vsd"), "Fisher divergence against Diff-Instruct"),
    "sida-gan": pair("sida", "an adversarial term beside SiD", {"gan": 1e-4}, {"gan": 0.0}),
    "emd-against-vsd": Claim(Variant("emd"), Variant("vsd"), "chains of an E-step against none"),
    "emd-cancel": pair("emd", "cancelling the chains' noise", {"cancel": True}, {"cancel": False}),
    "emd-latent": pair("emd", "latents that move against fixed ones", {"latent_step": 1e-3}, {"latent_step": 0.0}),
    "disback-nodes": pair("disback", "a teacher that comes back, or stands at its end", {"nodes": 5}, {"nodes": 0}),
    "snoopi-range": Claim(
        Variant("snoopi"), Variant("swiftbrush", {"guidance": 4.5}), "guidance drawn from a range against its middle"
    ),
    "sdxs-features": pair("sdxs", "features matched beside", {"feature_weight": 1.0}, {"feature_weight": 0.0}),
    # Each of the four is trained as long as the one: a picture costs the same.
    "msd-students": pair(
        "msd", "four students against one", {"students": 4, "divided": False}, {"students": 1, "divided": False}
    ),
    "ect-against-ct": Claim(Variant("ect"), Variant("ct"), "pairs whose gap closes against neighbours of a grid"),
}


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        task: digits, stacked-digits, cifar8, cifar32 or ring.
        methods: by their names on the command line; "all" is every one.
        claims: names of claims, each of which runs two variants; "all" is every one.
        data: the Parquet file of a cifar task.
        teacher: a generator of the task; it is trained, in ``out``, where none is given.
        label: added to the name of the results, for another teacher's, such as a flow-matching one's.
        teacher_steps: of that training; 0 is the task's own number.
        nfes: evaluations.
        seconds: of CPU for each training.
        iterations: of each training instead; 0 goes by the seconds.
        batch: pictures per step; 0 is the task's.
        pairs: noises with the teacher's pictures, for the methods that learn from such.
        samples: pictures per row and seed.
        seeds: of the pictures.
        device: cpu or cuda.
        threads: of torch.
        out: folder of the teachers.
        results: where the numbers go.
    """

    task: str = "digits"
    methods: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    data: str = ""
    teacher: Path | None = None
    label: str = ""
    teacher_steps: int = 0
    nfes: tuple[int, ...] = (1, 2, 4)
    seconds: float = 60.0
    iterations: int = 0
    batch: int = 0
    pairs: int = 8192
    samples: int = 4000
    seeds: tuple[int, ...] = (11, 12)
    device: str = "cpu"
    threads: int = 1
    out: Path = Path("runs/bench-methods")
    results: Path = Path("benchmarks/results")


def main(flags: Flags) -> None:
    """Runs everything."""
    how, chosen = task(flags.task), variants(flags)
    torch.set_num_threads(flags.threads)
    data, path = how.load(flags.data), results_of(flags)
    if flags.teacher is None:
        teacher = how.teacher(data, flags.out / flags.task, steps=flags.teacher_steps or None, device=flags.device)
    else:
        teacher = Generator.load(flags.teacher, device=flags.device)
    rows = earlier(path, teacher) or [measure(flags, how, data, teacher, teacher.sampler, "teacher")]
    known = {row["nfe"] for row in rows if row["name"] == "calibrated"}
    rows += [measure(flags, how, data, teacher, *fitted(teacher, nfe)) for nfe in flags.nfes if nfe not in known]
    write(flags, path, teacher, rows)
    for variant in chosen:
        try:
            made = list(students(flags, how, data, teacher, variant))
        except (InputError, CollapseError) as error:
            made = [{"name": variant.name, "method": variant.method, "refused": str(error)}]
            print(f"{variant.name}: {error}", flush=True)
        # Read again: another call may have measured other methods meanwhile.
        rows = [row for row in earlier(path, teacher) or rows if row["name"] != variant.name] + made
        write(flags, path, teacher, rows)
    write(flags, path, teacher, rows)
    show(rows)


def results_of(flags: Flags) -> Path:
    """The file of this task and teacher."""
    return flags.results / f"methods-{flags.task}{'-' * bool(flags.label)}{flags.label}.json"


def variants(flags: Flags) -> list[Variant]:
    """What is to be trained, once each.

    Raises:
        InputError: an unknown method or claim.
    """
    names = tuple(METHODS) if flags.methods == ("all",) else flags.methods
    claims = tuple(CLAIMS) if flags.claims == ("all",) else flags.claims
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    for name in claims:
        if name not in CLAIMS:
            raise unknown("claim", name, CLAIMS)
    found = [Variant(name) for name in names]
    found += [side for name in claims for side in (CLAIMS[name].true, CLAIMS[name].false)]
    return list({variant.name: variant for variant in found}.values())


def earlier(path: Path, teacher: Generator) -> list[dict[str, Any]]:
    """The rows of an earlier call, if they are of the same teacher."""
    body = read_json(path) if path.is_file() else {}
    return list(body["rows"]) if body.get("teacher") == teacher.fingerprint() else []


def fitted(teacher: Generator, nfe: int) -> tuple[Any, str]:
    """The calibrated sampler and its name."""
    return calibrate_generator(teacher, nfe=nfe), "calibrated"


def students(flags: Flags, how: Task, data: Any, teacher: Generator, variant: Variant) -> Iterator[dict[str, Any]]:
    """The training or trainings of a variant, and a row for every number of evaluations."""
    method, batch = variant.made(teacher), flags.batch or how.batch
    source = data if method.needs_data else None
    if variant.method in ON_PAIRS:
        source = pairs_of(flags, teacher)
    options: dict[str, Any] = {"batch": batch, "device": flags.device, "progress": False, "save_every": 0}
    iterations = flags.iterations or fitting(teacher, method, source, flags.seconds, options)
    if "iterations" in {f.name for f in fields(method)}:
        method = replace(method, iterations=iterations)
    several = "steps" in {f.name for f in fields(method)}
    if torch.device(flags.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        place: dict[str, Any] = {"out": Path(folder) / "run", "budget": iterations, **options}
        if several:
            found = distill_steps(teacher, method, source, steps=possible(method, flags.nfes), **place)
        else:
            only = distill(teacher, method, source, **place)
            found = {only.sampler.nfe: only}
    trainings = len(found) if several and not (getattr(method, "any_steps", False) or hasattr(method, "run")) else 1
    facts = {
        "method": variant.method,
        "settings": json.loads(json.dumps(asdict(method), default=str)),
        "iterations": iterations,
        "trainings": trainings,
        "batch": batch,
        "images": iterations * batch * trainings,
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **peak(flags, teacher, method, source, batch),
    }
    for student in found.values():
        yield {**measure(flags, how, data, student, student.sampler, variant.name), **facts}


def pairs_of(flags: Flags, teacher: Generator) -> Pairs:
    """Noises and the teacher's pictures, made once; their time is not in any method's budget."""
    out = flags.out / f"pairs-{flags.task}-{teacher.fingerprint()}"
    make_pairs(teacher, out, n=flags.pairs, batch=1024, resume=out.exists(), progress=False)
    return Pairs(out)


def possible(method: Any, nfes: tuple[int, ...]) -> tuple[int, ...]:
    """Those numbers of evaluations that the method can have; many are made for one alone."""
    found = []
    for nfe in nfes:
        with contextlib.suppress(InputError):
            found.append(replace(method, steps=nfe).steps)
    return tuple(found)


def fitting(teacher: Generator, method: Any, data: Any, seconds: float, options: Mapping[str, Any]) -> int:
    """Iterations that fit in ``seconds``, from two short runs: what happens once counts in both."""
    clock = time.process_time if torch.device(options["device"]).type == "cpu" else time.perf_counter
    found = {}
    # The first run only warms up.
    for count in (4, 4, 16):
        with tempfile.TemporaryDirectory() as folder:
            start = clock()
            distill(teacher, method, data, out=Path(folder) / "run", budget=count, **options)
            found[count] = clock() - start
    each = max((found[16] - found[4]) / 12, found[16] / 100)
    return max(16, int(seconds / each))


def peak(flags: Flags, teacher: Generator, method: Any, data: Any, batch: int) -> dict[str, Any]:
    """Bytes at the worst moment: measured on an accelerator, estimated from one step elsewhere."""
    if torch.device(flags.device).type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak": "measured"}
    try:
        found = estimate_memory(method, teacher, data, FitOptions(batch=batch))
    except InputError as error:
        return {"peak_bytes": None, "peak": str(error)}
    return {"peak_bytes": found.total, "peak": "estimated"}


def measure(flags: Flags, how: Task, data: Any, made: Generator, sampler: Any, name: str) -> dict[str, Any]:
    """One row: every metric at every seed of pictures."""
    found = [how.measure(made, sampler, data, flags.samples, seed) for seed in flags.seeds]
    row: dict[str, Any] = {"name": name, "nfe": int(found[0]["nfe"]), "seeds": list(flags.seeds)}
    row |= {k: [round(scores[k], 4) for scores in found] for k in found[0] if k != "nfe"}
    print(name, row["nfe"], *(f"{k} {statistics.mean(row[k]):.4g}" for k in found[0] if k != "nfe"), flush=True)
    return row


def write(flags: Flags, path: Path, teacher: Generator, rows: list[dict[str, Any]]) -> None:
    """The numbers, with the claims that they bear on."""
    names = {row["name"] for row in rows if "refused" not in row}
    body = {
        "benchmark": "methods",
        "task": flags.task,
        "settings": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items() if k not in ("data", "results")
        },
        "machine": f"{platform.machine()}, {flags.device}, {flags.threads} threads, torch {torch.__version__}",
        "teacher": teacher.fingerprint(),
        "parameters": sum(p.numel() for p in teacher.network.parameters()),
        "claims": {
            key: {"with": claim.true.name, "without": claim.false.name, "compared": claim.compared}
            for key, claim in CLAIMS.items()
            if {claim.true.name, claim.false.name} <= names
        },
        "rows": rows,
    }
    write_text(path, json.dumps(body, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """The means over the seeds."""
    metrics = [k for k, v in rows[0].items() if isinstance(v, list) and k != "seeds"]
    table = Table("sampler", "NFE", *metrics, "images", "CPU s")
    for row in rows:
        if "refused" in row:
            continue
        cells = [f"{statistics.mean(row[m]):.4g}" if m in row else "" for m in metrics]
        table.add_row(row["name"], str(row["nfe"]), *cells, str(row.get("images", "")), str(row.get("cpu_seconds", "")))
    Console(width=160).print(table)


if __name__ == "__main__":
    main(tyro.cli(Flags))
