"""The page docs/sampling.md and its plots, from benchmarks/results/quality-*.json, solvers.json and overhead.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
TITLES = {"digits": "Digits, 8x8", "stacked-digits": "Stacked digits, 3x8x8", "cifar10-8": "CIFAR-10 at 8x8"}


def family(name: str) -> str:
    """A peer's solver without its grid, but for GITS, which is more than a grid."""
    return name if name.endswith("gits") else name.split(",")[0]


def lines(rows: list[dict[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    """For every solver its best grid's value at each number of evaluations."""
    best: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["group"] in ("teacher", "converged"):
            continue
        own = best.setdefault(family(row["name"]), {})
        own[row["nfe"]] = min(own.get(row["nfe"], float("inf")), row[key])
    return {name: sorted(points.items()) for name, points in best.items()}


def plot(body: dict[str, Any], path: Path) -> None:
    """Distance and paired error against evaluations, one column per guidance."""
    metric, rows = body["metric"], body["rows"]
    scales = list(dict.fromkeys(r["guidance"] for r in rows))
    figure = Figure(figsize=(4.4 * len(scales), 6.4), layout="constrained")
    axes = figure.subplots(2, len(scales), squeeze=False, sharex=True)
    for column, scale in enumerate(scales):
        own = [r for r in rows if r["guidance"] == scale]
        for axis, key, title in (
            (axes[0, column], metric, "Frechet distance"),
            (axes[1, column], "rmse", "RMSE to end"),
        ):
            for name, points in lines(own, key).items():
                mine = name == "calibrated"
                style = {"color": "#c23b22", "lw": 2.4, "zorder": 3} if mine else {"lw": 1.0, "alpha": 0.8}
                axis.plot(*zip(*points, strict=True), marker="o", ms=4 if mine else 2.5, label=name, **style)
            if key == metric:
                level = min(r[key] for r in own if r["group"] == "teacher")
                axis.axhline(level, ls="--", lw=1, color="black", label="teacher, 35 evaluations")
                axis.set_title("no guidance" if scale == 1 else f"guidance {scale:g}", fontsize=10)
            axis.set_yscale("log")
            axis.set_ylabel(title, fontsize=9)
            axis.set_xticks(sorted({r["nfe"] for r in own if r["group"] == "calibrated"}))
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=8, which="both")
        axes[1, column].set_xlabel("evaluations", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def command(name: str, settings: dict[str, Any]) -> str:
    """The call that makes these numbers again; the pictures of CIFAR-10 are wherever the reader keeps them."""
    data = " --data cifar10/train.parquet" if name.startswith("cifar10") else ""
    rhos = " ".join(f"{rho:g}" for rho in settings.get("rhos", ()))
    return f"python benchmarks/quality.py --task {name}{data} --samples {settings['samples']}" + (
        f" --rhos {rhos}" if rhos else ""
    )


def quality(name: str, body: dict[str, Any]) -> str:
    """One task: the plot and the summary."""
    metric = body["metric"]
    what = (
        "Frechet distance in pixels" if metric == "pixel_fd" else "Frechet distance in the features of docs/measures.md"
    )
    head = [
        "guidance",
        "NFE",
        "calibrated RMSE",
        "closest other",
        "ratio",
        "calibrated FD",
        "best other FD",
        "teacher FD",
        "its ODE",
    ]
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in body["summary"]:
        cells = [
            f"{row['guidance']:g}",
            str(row["nfe"]),
            f"{row['calibrated_rmse']:.4f}",
            f"{row['best_peer_rmse']:.4f} ({row['closest_peer']})",
            f"{row['rmse_ratio']:.2f}",
            f"{row[f'calibrated_{metric}']:.3f}",
            f"{row[f'best_peer_{metric}']:.3f} ({row['best_peer']})",
            f"{row[f'teacher_{metric}']:.3f}",
            f"{row[f'converged_{metric}']:.3f}",
        ]
        table.append(f"| {' | '.join(cells)} |")
    seconds = [row["calibration_seconds"] for row in body["summary"]]
    settings = body["settings"]
    return (
        f"### {TITLES.get(name, name)}\n\n![{name}](img/quality-{name}.svg)\n\n"
        f"{what}, {settings['samples']} pictures a row, picture seeds {settings['seeds']}; teacher: "
        f"{body['teacher']['network']}, {body['teacher']['steps']} steps of {body['teacher']['batch']}, seed 0. "
        "Teacher FD is its own sampler's, of 35 evaluations; its ODE was followed in 96 steps of third order. "
        f"Calibration took {min(seconds):.0f} to {max(seconds):.0f} s. Machine: {body['machine']}, other programs on "
        f"the same cores. Command: `{command(name, settings)}`.\n\n" + "\n".join(table) + "\n"
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def fixed(body: dict[str, Any]) -> str:
    """Every solver on every grid, on the exact problem."""
    rows = []
    for nfe, peer in body["best_peer"].items():
        cells = [nfe]
        for key in ("best_fixed", "best_searched"):
            best = min((r for r in body[key] if str(r["nfe"]) == nfe), key=lambda r: r["rmse"])
            cells.append(f"{best['rmse']:.4f} ({best['name']}, {best['grid']})")
        for kind in ("fixed", "any"):
            cells.append(f"{peer[kind]['rmse']:.4f} ({peer[kind]['peer']} {peer[kind]['solver']})")
        rows.append(cells)
    agree = body["agreement_with_peers"]
    return (
        "### Every solver on every grid, where the solution is known\n\n"
        f"Mean RMSE on the exact digits problem, {body['starts']} starts, {body['scored']} settings, `python "
        "benchmarks/solvers.py`. The best cell of each is chosen on the starts that score it. Many of ours win by the "
        "rescaled AYS grid, which no peer was run on: read those as wins of the grid. "
        f"{agree['within_0.1_percent']} of {agree['cells']} settings that peers' own code was run on agree with ours "
        "within 0.1 %.\n\n" + markdown(["NFE", "fixed grids", "GITS grids", "peers, fixed", "peers, any"], rows)
    )


def overhead(body: dict[str, Any]) -> str:
    """Work beside the network."""
    rows: dict[str, dict[int, str]] = {}
    for row in body["ratios"]:
        rows.setdefault(row["solver"], {})[row["steps"]] = f"{row['ratio']:.2f} ({row['fastest_peer']})"
    steps = sorted({r["steps"] for r in body["ratios"]})
    noise = body["noise_us"]
    return (
        "### Work beside the network\n\n"
        f"Per evaluation at {body['shape']} float32, one thread, {body['machine']}, over that of the fastest peer (in "
        "brackets; a loop is the recurrence in plain Python with a history list), by number of steps; other programs "
        "ran on the same cores. `python benchmarks/overhead.py`. A 1000-step ancestral run holds "
        f"{body['live_tensors_of_1000_ancestral_steps']} tensors. Noisy samplers pay for noise that is keyed by sample "
        f"and step: {noise['Noise.normal']:.0f} us a draw, `randn_like` {noise['randn_like']:.0f} us.\n\n"
        + markdown(
            ["solver", *(f"{n} steps" for n in steps)],
            [[name, *(found.get(n, "") for n in steps)] for name, found in rows.items()],
        )
    )


def calibrations(body: dict[str, Any]) -> str:
    """All calibration methods beside what they start from."""
    exact = body["where"] == "exact"
    rows = []
    for method in dict.fromkeys(r["method"] for r in body["rows"]):
        for nfe in dict.fromkeys(r["nfe"] for r in body["rows"] if r["method"] == method):
            own = [r for r in body["rows"] if r["method"] == method and r["nfe"] == nfe]
            mean = {k: sum(r[k] for r in own) / len(own) for k in ("check_rmse_start", "rmse", "seconds")}
            kept = sum(r["kept"] == "fitted" for r in own)
            cells = [method, str(nfe), ", ".join(dict.fromkeys(r["started_from"] for r in own))]
            cells += [f"{mean['check_rmse_start']:.4f}", f"{mean['rmse']:.4f}", f"{kept} of {len(own)}"]
            rows.append([*cells, f"{mean['seconds']:.0f}", *([] if exact else [f"{own[0]['fd']:.3f}"])])
    what = "the exact digits problem" if exact else "a trained digits teacher (residual MLP)"
    head = ["method", "NFE", "starts from", "start", "result, fresh", "kept", "seconds", *([] if exact else ["FD"])]
    where = "" if exact else " --teacher runs/bench-quality/digits"
    return (
        f"### Calibration methods on {what}\n\nMean RMSE; the start on the front door's own check, the result on "
        f"further starts; calibration seeds {body['settings']['seeds'] if exact else [0]}. `Kept` counts how often the "
        f"fitted sampler was better on the check. `python benchmarks/calibrations.py{where}`, {body['machine']}, other "
        "programs on the same cores.\n\n" + markdown(head, rows)
    )


def main() -> None:
    """Writes the plots, and the part of sampling.md below its marker."""
    parts = []
    for name in TITLES:
        file = RESULTS / f"quality-{name}.json"
        if file.is_file():
            body = json.loads(file.read_text())
            plot(body, DOCS / "img" / f"quality-{name}.svg")
            parts.append(quality(name, body))
    pages = (("calibrations-exact", calibrations), ("calibrations-teacher", calibrations), ("solvers", fixed))
    for name, make in (*pages, ("overhead", overhead)):
        file = RESULTS / f"{name}.json"
        parts += [make(json.loads(file.read_text()))] if file.is_file() else []
    page = DOCS / "sampling.md"
    marker = "<!-- below: written by make docs -->\n"
    page.write_text(page.read_text().partition(marker)[0] + marker + "\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
