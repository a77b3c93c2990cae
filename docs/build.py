"""Writes the pages of docs/ that are made from code and results: ``make docs``.

methods.md comes from the methods' own docstrings and defaults, results.md from benchmarks/results/*.json, the lower
part of sampling.md (its plots too) from those of sampling, methods-measured.md, with its plots, from those of
benchmarks/methods.py and benchmarks/steps.py, and measurements.md from what no other page shows.
"""

from __future__ import annotations

import inspect
import json
import statistics
from pathlib import Path
from typing import Any

import measurements
import sampling
import torch
from tables import CARDS, DOCS, RESULTS, spread, table

from fewstep.cli.methods import card
from fewstep.distill import METHODS
from fewstep.report.plots import inked, quality_figure
from fewstep.report.results import Results, Row

SHOWN = ("fd", "pixel_fd", "precision", "recall", "accuracy")


def exact_page(body: dict[str, Any]) -> str:
    """The problem with a known solution."""
    rows = []
    for n, ratio in body["mean_ratio_to_best_peer"].items():
        known = [r for r in body["rows"] if str(r["nfe"]) == n and r["name"] != "calibrated"]
        fitted = [r for r in body["rows"] if str(r["nfe"]) == n and r["name"] == "calibrated"]
        best = min(known, key=lambda r: r["rmse"])
        mean = statistics.mean(r["rmse"] for r in fitted)
        named = f"{best['name']}, {best['grid']}: {best['rmse']:.4f}"
        euler = min(r["rmse"] for r in known if r["name"] == "euler")
        cells = [n, f"{euler:.4f}", named, f"{body['best_peer'][n]:.4f}", f"{mean:.4f}", f"{ratio:.2f}"]
        rows.append(cells)
    head = [
        "NFE",
        "Euler",
        "best solver of ours",
        "best of all peers' settings",
        "calibrated",
        "calibrated / best peer",
    ]
    return (
        "## A problem with a known solution\n\n"
        "One Gaussian per class of scikit-learn's digits, 64 dimensions; mean RMSE over 256 starts to the exact "
        "solution of the probability-flow ODE. Peers: the best of every solver, schedule and search of diff-sampler, "
        "k-diffusion, diffusers, edm, smalldiffusion and flow_matching. Calibration saw other "
        "trajectories than those scored; three seeds. Command: `python benchmarks/exact.py`.\n\n" + table(head, rows)
    )


def floor_page(body: dict[str, Any]) -> str:
    """Real data against real data."""
    rows = [[k, f"{v['mean']:.3f} +- {v['sd']:.3f}", str(v["draws"])] for k, v in body.items() if k != "benchmark"]
    return (
        "## The floor of the Frechet distance on digits\n\nReal data against real data, mean and standard deviation "
        "over draws. Command: `python benchmarks/digits_floor.py`.\n\n" + table(["what", "fd", "draws"], rows)
    )


def digits_page(body: dict[str, Any]) -> str:
    """A trained teacher, its samplers and its students."""
    names = {k.split("@")[0]: k for k in body["rows"][0] if "@" in k}
    count = body["settings"]["samples"]
    rows = []
    for row in sorted(body["rows"], key=lambda r: (r["nfe"] > 20, r["nfe"], r["name"])):
        cells = [row["name"], str(row["nfe"]), *(spread(row.get(names.get(m, ""))) for m in SHOWN)]
        rows.append([*cells, spread(row.get("rmse"))])
    head = ["sampler", "NFE", *(f"{m}@{count}" for m in SHOWN), "RMSE to converged"]
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in body["seconds"].items())
    return (
        f"## Digits, teacher: {body['settings']['network']}\n\n"
        f"{count} pictures per row, mean of the picture seeds {body['settings']['seeds']} (half their range "
        f"after +-), one training seed. Machine: {body['machine']}. Command: "
        f"`{command(body['settings'])}`. Frechet distances: 100 is the variance of the real features. RMSE: to the "
        f"teacher's own converged end points at the same noise.\n\n{table(head, rows)}\n"
        f"Seconds, with other programs on the same two cores: {seconds}.\n"
    )


def command(settings: dict[str, Any]) -> str:
    """The call that makes these numbers again."""
    flags = ("network", "steps", "batch", "samples", "seeds", "nfes", "sid_steps", "sfd_steps", "sfd_nfes")
    words = []
    for name in flags:
        value = settings[name]
        shown = " ".join(str(v) for v in value) if isinstance(value, list) else str(value)
        words.append(f"--{name.replace('_', '-')} {shown}")
    return f"python benchmarks/digits.py {' '.join(words)}"


# What the benchmark changes of the defaults, which are for networks a hundred times as large.
CHANGED = {"SFD": "lr 1e-3, clip 1", "SiD": "lr 3e-4 and 6e-4 for the fake score, 20 steps of warm-up"}


def measured(method: type) -> str:
    """A method's rows beside Euler and the calibrated sampler at as many evaluations, and the teacher."""
    body = json.loads((RESULTS / "digits-resmlp.json").read_text())
    own = [r for r in body["rows"] if r["name"] == method.__name__]
    if not own:
        # Measured by a benchmark of its own, whose numbers stand on the method's card.
        home = inspect.getmodule(method)
        place = str(home.__name__).rpartition(".")[2].removesuffix("_training").replace("_", "-")
        place = CARDS.get(place, place)
        return f"Measured in [cards/{place}.md](cards/{place}.md).\n"
    beside = ("euler rho 7", "calibrated")
    rows = [r for r in body["rows"] if r["name"] in beside and r["nfe"] in {o["nfe"] for o in own}]
    names = {k.split("@")[0]: k for k in body["rows"][0] if "@" in k}
    cells = [
        [r["name"], str(r["nfe"]), *(spread(r.get(names[m])) for m in SHOWN)]
        for r in sorted(own + rows, key=lambda r: (r["nfe"], r["name"])) + body["rows"][:1]
    ]
    seconds = ", ".join(f"{k}: {v:.0f} s" for k, v in body["seconds"].items() if method.__name__ in k)
    return (
        f"Measured on digits, {body['settings']['samples']} pictures, picture seeds {body['settings']['seeds']}, "
        f"training seed 0, {body['machine']}, by `python benchmarks/digits.py` with "
        f"{CHANGED[method.__name__]} ({seconds}, with other programs on the same cores):\n\n"
        + table(["sampler", "NFE", *SHOWN], cells)
    )


def methods_measured(place: Path = RESULTS, docs: Path = DOCS) -> None:
    """The page docs/methods-measured.md: every task of benchmarks/methods.py, and the costs of steps."""
    parts = [
        "# Methods, measured\n\nWritten by `make docs` from `benchmarks/results/`; each section names its command.\n\n"
        "How to read it: a training had three minutes of one core (cifar8 three to seven, stacked digits two), so that "
        "methods which need long runs (MeanFlow, sCM in one step, GET) stand worse than in their papers. Features "
        "are those of the packaged networks of digits and CIFAR-10. Modes of stacked digits are counted on 25,600 "
        "pictures. Sections that end in -claims compare settings of one method: in -claims after 15 seconds of an MLP, "
        "where many are not at their best yet, in -claims-long after as many updates. One training seed each, so that "
        "differences of a few percent say nothing. Pictures show the three best students at each number of "
        "evaluations.\n"
    ]
    for path in sorted(place.glob("methods-*.json")):
        parts.append(task_page(path.stem.removeprefix("methods-"), json.loads(path.read_text()), docs))
    steps = place / "steps.json"
    parts += [steps_page(json.loads(steps.read_text()))] if steps.is_file() else []
    if len(parts) > 1:
        (docs / "methods-measured.md").write_text("\n".join(parts))


def task_page(name: str, body: dict[str, Any], docs: Path) -> str:
    """One teacher: a plot of the defaults, all rows, and the claims."""
    rows = [r for r in body["rows"] if "refused" not in r]
    metrics = [k for k, v in rows[0].items() if isinstance(v, list) and k != "seeds"]
    first, count = metrics[0], body["settings"]["samples"]
    groups: dict[str, Any] = {"teacher": "teacher", "calibrated": "calibrated"}
    plotted = [
        Row(r["name"], groups.get(r["name"], "student"), r["nfe"], {f"{first}@{count}": statistics.mean(r[first])},
            None, 0.0, count, "", torch.empty(0))
        for r in rows
        if r.get("method", r["name"]) == r["name"]
    ]  # fmt: skip
    figure = quality_figure(Results(name, [], name, legible(plotted, f"{first}@{count}")))
    if figure is not None:
        (docs / "img").mkdir(exist_ok=True)
        with inked():
            figure.savefig(docs / "img" / f"methods-{name}.svg", metadata={"Date": None})
    cells = [
        [
            r["name"],
            str(r["nfe"]),
            *(spread(r.get(m)) for m in metrics),
            *(str(r.get(k, "")) for k in ("images", "cpu_seconds")),
        ]
        for r in sorted(rows, key=lambda r: (r["nfe"] > 20, r["nfe"], statistics.mean(r[first])))
    ]
    flags = body["settings"]
    text = (
        f"## {name}\n\nOne teacher of {body['parameters'] / 1e6:.2g} M parameters, {count} pictures per row, mean of "
        f"the picture seeds {flags['seeds']} (half their range after +-), one training seed. Machine: "
        f"{body['machine']}. Command: `python benchmarks/methods.py --task {body['task']}`"
        f"{' --label ' + flags['label'] if flags.get('label') else ''}; budget of the last call: "
        f"{budget(flags)}.\n\n![{first} against evaluations](img/methods-{name}.svg)\n\n"
    )
    claims = [claim_row(key, claim, rows, first) for key, claim in body["claims"].items()]
    if claims:
        head = ["claim", "what is compared", f"{first} with, by NFE", f"{first} without", "better with at"]
        text += "One part of a method, with and without it:\n\n" + table(head, claims) + "\nAll rows:\n\n"
    text += table(["sampler", "NFE", *metrics, "images", "CPU s"], cells)
    refused = [f"- {r['name']}: {r['refused']}" for r in body["rows"] if "refused" in r]
    return text + ("\nNot for this teacher:\n\n" + "\n".join(refused) + "\n" if refused else "")


def budget(flags: dict[str, Any]) -> str:
    """What each training of a call had."""
    return f"{flags['iterations']} updates" if flags["iterations"] else f"{flags['seconds']:g} s of CPU"


def legible(rows: list[Row], metric: str, most: int = 3) -> list[Row]:
    """The rows that one picture can hold: of the students those that are best at some number of evaluations."""
    kept: set[str] = set()
    for nfe in {row.nfe for row in rows}:
        students = [row for row in rows if row.group == "student" and row.nfe == nfe]
        kept |= {row.name for row in sorted(students, key=lambda row: row.metrics[metric])[:most]}
    return [row for row in rows if row.group != "student" or row.name in kept]


def claim_row(key: str, claim: dict[str, str], rows: list[dict[str, Any]], metric: str) -> list[str]:
    """Both variants of a claim at each number of evaluations."""
    sides = [{r["nfe"]: statistics.mean(r[metric]) for r in rows if r["name"] == claim[s]} for s in ("with", "without")]
    shared = sorted(sides[0].keys() & sides[1].keys())
    shown = [" / ".join(f"{side[n]:.3f}" for n in shared) for side in sides]
    better = [str(n) for n in shared if sides[0][n] < sides[1][n]]
    return [key, claim["compared"], *shown, f"{', '.join(better) or 'none'} of {', '.join(map(str, shared))}"]


def steps_page(body: dict[str, Any]) -> str:
    """What steps cost beside their network passes."""
    rows = [
        [
            r["method"], r["size"], ", ".join(f"{n} {kind}" for kind, n in r["calls"].items()), f"{r['step_ms']:.1f}",
            f"{r['passes_ms']:.1f}", f"{r['ratio']:.2f}",
            f"{r['peak_bytes'] / r['allowed_bytes']:.2f}" if r["peak_bytes"] else "",
        ]
        for r in body["rows"]
        if "refused" not in r
    ]  # fmt: skip
    head = ["method", "size", "passes", "step, ms", "bare passes, ms", "ratio", "peak / allowed memory"]
    return (
        "## What a step costs\n\nFrom data in memory until the averages are done, beside the recorded network passes "
        "alone: CPU milliseconds, medians of turns in one process. Memory: the estimated peak over 1.15 times weights, "
        "optimizer states, gradients, averages and the activations of one pass. "
        f"Machine: {body['machine']}, other programs beside. Command: `python benchmarks/steps.py`.\n\n"
        + table(head, rows)
    )


def main() -> None:
    """Writes the pages."""
    head = "# Methods\n\nWritten by `make docs` from the code and `benchmarks/results/`.\n\n"
    cards = [f"{card(name)}\n{measured(method)}" for name, method in METHODS.items()]
    (DOCS / "methods.md").write_text(head + "\n".join(cards))
    parts = ["# Results\n\nWritten by `make docs` from `benchmarks/results/*.json`; each section names its command.\n"]
    for path in sorted(RESULTS.glob("*.json")):
        body = json.loads(path.read_text())
        page = {"exact": exact_page, "digits": digits_page, "floor": floor_page}.get(body.get("benchmark", ""))
        # The other benchmarks are about sampling and stand on the page of their own.
        parts += [] if page is None else [page(body)]
    (DOCS / "results.md").write_text("\n".join(parts))
    sampling.main()
    measurements.main()
    methods_measured()


if __name__ == "__main__":
    main()
