"""Writes the pages of docs/ that are made from code and results: ``make docs``.

methods.md comes from the methods' own docstrings and defaults, results.md from benchmarks/results/*.json, and the lower
part of sampling.md (its plots too) from those of sampling.
"""

from __future__ import annotations

import inspect
import json
import statistics
from pathlib import Path
from typing import Any

import sampling

from fewstep.cli.methods import card
from fewstep.distill import METHODS

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
SHOWN = ("fd", "pixel_fd", "precision", "recall", "accuracy")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(r)} |" for r in rows]) + "\n"


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


def spread(values: list[float] | None) -> str:
    """Mean and half range of the seeds."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f} +- {half:.3f}"


# What the benchmark changes of the defaults, which are for networks a hundred times as large.
CHANGED = {"SFD": "lr 1e-3, clip 1", "SiD": "lr 3e-4 and 6e-4 for the fake score, 20 steps of warm-up"}


def measured(method: type) -> str:
    """A method's rows beside Euler and the calibrated sampler at as many evaluations, and the teacher."""
    body = json.loads((RESULTS / "digits-resmlp.json").read_text())
    own = [r for r in body["rows"] if r["name"] == method.__name__]
    if not own:
        # Measured by a benchmark of its own, whose numbers stand on the method's card.
        home = inspect.getmodule(method)
        place = str(home.__name__).rpartition(".")[2].removesuffix("_training")
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


if __name__ == "__main__":
    main()
