"""The page docs/measurements.md: a table of every file of benchmarks/results/ that no other page shows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from tables import DOCS, RESULTS, number, spread, table, unique

METRICS = ("fd", "pixel_fd", "precision", "recall", "accuracy", "rmse")


def calibrations(body: dict[str, Any]) -> str:
    """The ways to find a sampler, at equal evaluations."""
    rows = body["rows"]
    counts = sorted({r["nfe"] for r in rows})
    cells = []
    for method in unique(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        errors = [[r["rmse"] for r in own if r["nfe"] == n] for n in counts]
        scores = [[r["fd"] for r in own if r["nfe"] == n] for n in counts] if "fd" in rows[0] else []
        seconds = statistics.mean(r["seconds"] for r in own)
        cells.append([method, *(spread(v) for v in errors), *(spread(v) for v in scores), f"{seconds:.0f}"])
    named = [f"{what}, {n}" for what in ("RMSE", *(["FD"] if "fd" in rows[0] else [])) for n in counts]
    where = {
        "exact": "digits as one Gaussian per class, whose solution is known",
        "teacher": "a trained digits teacher, whose converged end points are what errors are measured to",
    }[body["where"]]
    return (
        f"Ways to find a sampler, on {where}, on {body['settings']['samples']} fresh starts; mean of seeds "
        f"{body['settings']['seeds']}, half their range after +-. Columns are evaluations; empty: the method makes no "
        "sampler of that many. Seconds: mean time of a fit.\n\n" + table(["method", *named, "seconds"], cells)
    )


def students(body: dict[str, Any]) -> str:
    """Rows of generators with their scores at each seed of pictures."""
    names = {k.partition("@")[0]: k for k, v in body["rows"][-1].items() if isinstance(v, list) and k != "seeds"}
    metrics = {m: names[m] for m in METRICS if m in names}
    cells = [
        [r["name"], str(r["nfe"]), *(spread(r.get(key)) for key in metrics.values())]
        for r in sorted(body["rows"], key=lambda r: (r["nfe"] > 20, r["nfe"], r["name"]))
    ]
    return (
        f"{body['settings']['samples']} pictures per row, picture seeds {body['settings']['seeds']}, half their range "
        "after +-, one training seed.\n\n" + table(["sampler", "NFE", *metrics], cells)
    )


def exports(body: dict[str, Any]) -> str:
    """How far exported folders are from the generators that they were made of."""
    cells = [
        [
            r["family"], str(r["nfe"]), r["scheduler"], f"{r['difference']:.1e}",
            "yes" if r["trust_remote_code"] else "no", ", ".join(f"{t:g}" for t in r["asked"]),
        ]
        for r in body["rows"]
    ]  # fmt: skip
    return (
        f"The largest difference of a pixel, of a range of 1, between fewstep and the folder it exported, opened where "
        f"fewstep cannot be imported: tiny random pipelines, {body['dtype']}.\n\n"
        + table(["family", "NFE", "scheduler", "difference", "code in the folder", "times asked at"], cells)
    )


def memory(body: dict[str, Any]) -> str:
    """What dry runs tell and what processes take."""
    cells = [
        [r["setting"], f"{r['estimated'] / 2**20:.0f}", f"{r['measured'] / 2**20:.0f}", f"{r['ratio']:.3f}"]
        for r in body["rows"]
    ]
    return f"Batch {body['batch']}; [memory.md](memory.md) explains both.\n\n" + table(
        ["setting", "told, MiB", "measured, MiB", "ratio"], cells
    )


def measures(body: dict[str, Any]) -> str:
    """What measures cost."""
    distance, streamed, pairs = body["distance"], body["fd"], body["pairs"]
    cells = [
        ["`fd`, streaming", f"{streamed['n']} a side", str(streamed["dim"]), number(streamed["cpu_seconds"]),
         number(streamed["peak_mib"])],
        ["metrics of pairs", f"{pairs['n']} a side", str(pairs["dim"]), number(pairs["cpu_seconds"]),
         number(pairs["peak_mib"])],
        ["distance of two Gaussians", "", str(distance["dim"]), number(distance["distance_cpu_seconds"]), ""],
        ["the same by scipy's `sqrtm`", "", str(distance["dim"]), number(distance["scipy_cpu_seconds"]), ""],
    ]  # fmt: skip
    return (
        f"CPU seconds and memory added at the peak, {body['threads']} thread; the benchmark's "
        "defaults are 50 000 pictures a side for `fd` and 10 000 for metrics of pairs. The two distances differ by "
        f"{distance['relative_difference']:.0e} of their value.\n\n"
        + table(["what", "pictures", "features", "CPU s", "peak, MiB"], cells)
    )


def super_resolution(body: dict[str, Any]) -> str:
    """4x4 digits made 8x8."""
    cells = [
        [r["name"], str(r["nfe"]), *(number(r[k]) for k in ("psnr", "ssim", "colour_shift", "fd", "pixel_fd"))]
        for r in sorted(body["rows"], key=lambda r: (r["nfe"] > 20, r["nfe"], r["name"]))
    ]
    told = body["settings"]
    return (
        f"Digits of 4x4 pixels made 8x8, {told['repeats']} pictures of each held-out one; the teacher had "
        f"{told['teacher_steps']} steps, its students {told['steps']}, CoDi and the fine-tune {told['codi_steps']}.\n\n"
    ) + table(["method", "NFE", "PSNR, dB", "SSIM", "colour shift", "FD", "pixel FD"], cells)


def forgetting(body: dict[str, Any]) -> str:
    """One-step students that forget classes."""
    told = body["settings"]
    keys = ("forgotten", "overridden", "kept_accuracy", "kept_fd", "kept_recall")
    cells = [[r["name"], str(r["nfe"]), *(number(r[k]) for k in keys)] for r in body["rows"]]
    return (
        f"Digits; classes {told['forget']} are to be forgotten, class {told['override']} takes their place; "
        f"{told['iterations']} updates of {told['batch']}, {told['each']} pictures of each class. Shares of the "
        "pictures whose label was to be forgotten: seen as that class, and as the one in its place. The other classes "
        "against the real ones.\n\n"
    ) + table(["student", "NFE", "seen as forgotten", "as its override", "accuracy", "FD", "recall"], cells)


def collaboration(body: dict[str, Any]) -> str:
    """A teacher that refines its student's worst pictures."""
    keys = ("fd", "pixel_fd", "precision", "recall", "accuracy")
    cells = [
        [r["mode"], number(r["share"]), number(r["nfe"]), *(spread(r[k]) for k in keys)]
        for r in sorted(body["rows"], key=lambda r: r["nfe"])
    ]
    return (
        f"Digits, {body['settings']['samples']} pictures of each seed; the share of the student's pictures that the "
        "teacher gets, and the mean number of evaluations.\n\n"
    ) + table(["mode", "share", "NFE", "FD", "pixel FD", "precision", "recall", "accuracy"], cells)


# file: title, the call that writes it, what makes its section
SECTIONS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "calibrations-exact": ("Calibration on a known problem", "python benchmarks/calibrations.py", calibrations),
    "calibrations-teacher": (
        "Calibration on a trained teacher",
        "python benchmarks/calibrations.py --teacher runs/bench-quality/digits",
        calibrations,
    ),
    "progressive": ("Progressive distillation, stage by stage", "python benchmarks/progressive.py", students),
    "consistency": ("Consistency students", "python benchmarks/consistency.py", students),
    "super-resolution": ("Super-resolution", "python benchmarks/super_resolution.py", super_resolution),
    "forgetting": ("Forgetting", "python benchmarks/forgetting.py --teacher FOLDER", forgetting),
    "collaboration": ("Teacher and student together", "python benchmarks/collaboration.py", collaboration),
    "exports": ("Exports", "python benchmarks/exports.py", exports),
    "memory": ("Memory", "python benchmarks/memory.py", memory),
    "measures": ("Costs of the measures", "python benchmarks/measures.py", measures),
}


def page() -> str:
    """The page, of the results that are there."""
    parts = [
        "# Further measurements\n\nWritten by `make docs` from `benchmarks/results/`; each section names its command. "
        "FD is the Frechet distance in the features of [measures.md](measures.md), where 100 is the variance of the "
        "real features; NFE are evaluations of the network per picture.\n"
    ]
    for name, (title, command, section) in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            body = json.loads(path.read_text())
            machine = f"Machine: {body['machine']}. " if "machine" in body else ""
            parts.append(f"## {title}\n\n{section(body)}\n{machine}Command: `{command}`.\n")
    return "\n".join(parts)


def main() -> None:
    """Writes the page."""
    (DOCS / "measurements.md").write_text(page())


if __name__ == "__main__":
    main()
