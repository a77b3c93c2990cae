"""The pictures of docs/concepts/, made of real objects: ``python docs/pictures.py`` (under a minute of one free core).

Nothing is trained. Denoisers are exact ones: of a Gaussian mixture, or of scikit-learn's digits themselves, each the
centre of a narrow Gaussian. Errors of samplers are those of benchmarks/results/exact.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from tables import DOCS, RESULTS

import fewstep
from fewstep.cli.methods import reference
from fewstep.core.path import COSINE, FLOW, VP
from fewstep.distill import METHODS
from fewstep.grid import karras
from fewstep.solve import build

IMG = DOCS / "img"
LEVELS = (0.1, 0.3, 0.6, 1.2, 3.0, 20.0)
ORANGE, BLUE, GREY, GREEN = "#d1602d", "#2f6db0", "#8a8a8a", "#2a8a6a"


def save(figure: Figure, name: str) -> None:
    """Writes a picture of the concepts."""
    IMG.mkdir(exist_ok=True)
    figure.savefig(IMG / f"{name}.png", dpi=110, metadata={"Software": None})


def shown(axis: Axes, picture: torch.Tensor, title: str = "") -> None:
    """A digit, (1, 8, 8) in [-1, 1], clipped to a little more than that."""
    axis.imshow(picture[0], cmap="gray", vmin=-1.3, vmax=1.3)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9)


def digits_mixture() -> tuple[torch.Tensor, fewstep.Mixture]:
    """Three digits, and the exact denoiser of all digits that are there."""
    batch = fewstep.data.load_data("digits").take(torch.arange(1797))
    assert batch.x is not None
    return batch.x[[3, 5, 8]], fewstep.Mixture(batch.x, 0.01)


def denoiser() -> None:
    """Noised digits, and what the best possible denoiser makes of them."""
    clean, D = digits_mixture()
    figure = Figure(figsize=(7.4, 3.0), layout="constrained")
    axes = figure.subplots(2, len(LEVELS) + 1)
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    shown(axes[0, 0], clean[0], "x0")
    axes[1, 0].axis("off")
    for k, level in enumerate(LEVELS, 1):
        x = clean[:1] + level * noise
        shown(axes[0, k], x[0], f"sigma {level:g}")
        shown(axes[1, k], D(x, level)[0])
    axes[0, 1].set_ylabel("x = x0 + sigma n", fontsize=8)
    axes[1, 1].set_ylabel("D(x, sigma)", fontsize=8)
    save(figure, "concept-denoiser")


def noise() -> None:
    """Every model's time is a noise level, and what a grid of few levels looks like."""
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    u = torch.linspace(0.01, 0.985, 200, dtype=torch.float64)
    flows = {"flow": (FLOW, ORANGE), "flow, shift 3": (FLOW(shift=3), GREY)}
    paths = {"VP (DDPM)": (VP, BLUE), "cosine": (COSINE, GREEN), **flows}
    for name, (path, colour) in paths.items():
        left.plot(u, path.sigma(u), color=colour, label=name)
    left.set_yscale("log")
    left.set_xlabel("the model's own time")
    left.set_ylabel("noise level sigma")
    left.legend(fontsize=8)
    for row, name in enumerate(("karras", "logsnr", "cosine", "vp_time", "flow_shift")):
        levels = fewstep.grid.grid(name, 8, 0.002, 80.0)[:-1]
        right.plot(levels, [row] * len(levels), "o", color=BLUE, ms=4)
        right.text(130, row, name, fontsize=8, va="center")
    right.set_xscale("log")
    right.set_xlim(0.0015, 4000)
    right.set_xticks([0.01, 0.1, 1, 10, 100])
    right.set_yticks([])
    right.set_xlabel("levels of a grid of 8 steps")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    save(figure, "concept-noise")


def tableau() -> None:
    """A solver as a table."""
    save(build("dpmpp2m", karras(6, 0.002, 80.0)).plot(), "concept-tableau")


def calibration() -> None:
    """Trajectories in the plane by three samplers, and errors on a known problem."""
    figure = Figure(figsize=(7.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    D = fewstep.Mixture(torch.tensor([[-1.0, -0.4], [0.2, 1.0], [1.0, -0.8]]), 0.02, sigma_max=10.0)
    table = fewstep.calibrate(D, nfe=5, trajectories=128, searches=20)
    grid = karras(5, D.sigma_min, D.sigma_max)
    x = D.sigma_max * fewstep.Noise.of(3, 9).normal((2,), "start", dtype=torch.float64)
    samplers: Sequence[tuple[str, Any, str, float]] = (
        ("converged", build("dpmpp3m_exact", karras(96, D.sigma_min, D.sigma_max)), GREY, 3.0),
        ("Euler, 5 evaluations", build("euler", grid), BLUE, 1.0),
        ("calibrated, 5 evaluations", table, ORANGE, 1.0),
    )
    for name, sampler, colour, width in samplers:
        points = torch.stack([step.point for step in fewstep.trajectory(D, x, sampler)])
        for i in range(points.shape[1]):
            line = left.plot(points[:, i, 0], points[:, i, 1], color=colour, lw=width, alpha=0.7)[0]
            left.plot(*points[-1, i], "o", color=colour, ms=4 if width == 1 else 7, alpha=0.9)
        line.set_label(name)
    left.set_xlim(-2.2, 2.2)
    left.set_ylim(-2.2, 3.4)
    left.legend(fontsize=7, loc="upper left")
    errors(right)
    save(figure, "concept-calibration")


def errors(axis: Axes) -> None:
    """RMSE to the exact solution against evaluations: the best grid of each solver, the mean fitted table."""
    body = json.loads((RESULTS / "exact.json").read_text())
    for name, colour in {"euler": BLUE, "dpmpp2m": GREEN, "ipndm3": GREY, "calibrated": ORANGE}.items():
        counts = sorted({r["nfe"] for r in body["rows"] if r["name"] == name})
        # a solver has a row for each grid, a fitted table one for each seed
        chosen = statistics.mean if name == "calibrated" else min
        best = [chosen([r["rmse"] for r in body["rows"] if r["name"] == name and r["nfe"] == n]) for n in counts]
        if counts:
            axis.plot(counts, best, "o-", color=colour, ms=3, label=name)
    axis.set_yscale("log")
    axis.set_xlabel("evaluations")
    axis.set_ylabel("RMSE to the exact solution")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)


def roles() -> None:
    """The networks of three methods, as their code declares them."""
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    names = ("cd", "sid", "dmd2")
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        made = reference(METHODS[name])[1]
        axis.set_title(name, fontsize=11)
        for row, (key, role) in enumerate(made.items()):
            colour = GREY if role.optim is None else ORANGE if role.ships else BLUE
            y = 0.8 - row * 0.24
            box = FancyBboxPatch((0.08, y), 0.84, 0.15, boxstyle="round,pad=0.02", fc=colour, ec="none", alpha=0.85)
            axis.add_patch(box)
            told = ["frozen" if role.optim is None else "trained"]
            told += ["average ships"] if role.ships else []
            axis.text(0.5, y + 0.11, key, ha="center", va="center", color="white", weight="bold", fontsize=9)
            axis.text(0.5, y + 0.04, ", ".join(told), ha="center", va="center", color="white", fontsize=8)
        axis.set_xlim(0, 1)
        axis.set_ylim(0.0, 1.0)
        axis.axis("off")
    save(figure, "concept-roles")


def evidence() -> None:
    """Real digits against real digits: the distance falls with the number of pictures, although nothing is wrong."""
    data = fewstep.data.load_data("digits")
    counts, lines = (125, 250, 500, 1000, 2000, 4000), []
    for n in counts:
        scores = []
        for seed in range(3):
            ids = fewstep.Noise.of(seed, n).integers(0, len(data), (), "draw")
            batch = data.take(ids)
            found = fewstep.measure.evaluate(batch.x, data, metrics=["fd"])
            scores.append(found[f"fd@{n}"])
        lines.append(scores)
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axis = figure.subplots()
    axis.plot(counts, [sum(s) / len(s) for s in lines], "o-", color=BLUE)
    for n, scores in zip(counts, lines, strict=True):
        axis.plot([n] * len(scores), scores, ".", color=GREY, ms=4)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    axis.set_xlabel("pictures")
    axis.set_ylabel("fd of real digits to all digits")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "concept-evidence")


def main() -> None:
    """Makes them all."""
    torch.set_num_threads(1)
    for make in (denoiser, noise, tableau, calibration, roles, evidence):
        make()


if __name__ == "__main__":
    main()
