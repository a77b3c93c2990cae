"""The picture of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fewstep.core.tableau import Tableau

TITLES = {"P": "points $y_{k-j}$", "W": "denoiser outputs $D_{k-j}$", "Z": "noises"}


def tableau_figure(tableau: Tableau) -> Figure:
    """Heat maps of the non-zero tables, one line per row, labelled with the levels it steps between.

    Colours are symmetric-log so that weights from 1e-3 to 1e3 can be told apart; red adds, blue takes away.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    shown = [key for key in ("P", "W", "Z") if getattr(tableau, key).any()]
    rows, depth = tableau.P.shape
    cell = 0.62
    figure = Figure(figsize=(2.0 + len(shown) * (depth * cell + 0.6), 0.9 + rows * 0.36), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    limit = max(float(torch.stack([tableau.P.abs().max(), tableau.W.abs().max()]).max()), 1e-3)
    for axis, key in zip(axes, shown, strict=True):
        table = getattr(tableau, key)
        image = axis.imshow(table.numpy(), cmap="RdBu_r", norm=SymLogNorm(0.01, vmin=-limit, vmax=limit), aspect="auto")
        for k in range(rows):
            for j in range(min(k + 1, table.shape[1])):
                w = float(table[k, j])
                if w:
                    shade = "white" if abs(float(image.norm(w)) - 0.5) > 0.38 else "black"
                    axis.text(j, k, f"{w:.2g}", ha="center", va="center", fontsize=7, color=shade)
        axis.set_title(TITLES[key], fontsize=9)
        axis.set_xticks(range(table.shape[1]), [f"j={j}" for j in range(table.shape[1])], fontsize=7)
        axis.set_yticks([])
    levels = tableau.levels.tolist()
    calls = ["" if s != s else "*" for s in tableau.sigmas.tolist()]
    names = [f"{a:.3g} → {b:.3g} {c}" for a, b, c in zip(levels[:-1], levels[1:], calls, strict=True)]
    axes[0].set_yticks(range(rows), names, fontsize=8)
    figure.suptitle(f"{tableau.name}: {tableau.nfe} evaluations (*)", fontsize=10)
    return figure


def error_figure(sampler: Any) -> Figure:
    """Of a sampler that is no table: its error on fresh trajectories before and after it was learned."""
    from matplotlib.figure import Figure

    facts = sampler.meta["calibration"]
    figure = Figure(figsize=(4.2, 1.8), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(
        [f"{facts['started_from']}, before", f"{sampler.name}, after"],
        [facts["check_rmse_start"], facts["check_rmse_fitted"]],
        color=["#9a9a9a", "#3b6fb6"],
    )
    axis.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel("RMSE to the teacher's end points, fresh trajectories", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return figure
