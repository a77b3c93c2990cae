"""Health curves of two short DMD2 runs on digits, one healthy and one whose learning rates are far too high.

    python benchmarks/health.py --teacher FOLDER --out FOLDER [--picture docs/img/health.png]

The teacher is a folder that ``fewstep train --data digits`` wrote. Both runs go on whatever their samples do. The
picture stands in docs/health.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.core.generator import Generator
from fewstep.core.role import Optim
from fewstep.core.state import Run
from fewstep.data import load_data
from fewstep.distill import DMD2, distill
from fewstep.report.plots import health_figures
from fewstep.train.health import history

RUNS = {"healthy": 2e-4, "failing": 1e-2}


def trained(teacher: Generator, rate: float, out: Path, steps: int) -> list[dict[str, Any]]:
    """The log of one run at this learning rate."""
    optim = Optim(lr=rate)
    method = replace(DMD2(), student=optim, fake=optim, ratio=1)
    options = {"batch": 64, "log_every": 5, "check_every": 5, "save_every": 0, "on_collapse": "ignore"}
    distill(teacher, method, load_data("digits"), out=out, budget=steps, overwrite=True, progress=False, **options)
    return history(Run(out))


def picture(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The figures of each run in a column, as one PNG."""
    import matplotlib.image
    import numpy as np

    columns = []
    for name, entries in logs.items():
        parts = []
        # Marks of the same collapse at every report would hide the curves: the first one tells.
        first = next((k for k, e in enumerate(entries) if "collapsed" in e), len(entries))
        kept = [{k: v for k, v in e.items() if k != "collapsed" or i == first} for i, e in enumerate(entries)]
        for title, _, figure in health_figures(kept):
            figure.suptitle(f"{name}: {title}", fontsize=9)
            figure.set_dpi(75)
            parts.append(drawn(figure))
        columns.append(np.concatenate(parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.image.imsave(path, np.concatenate(columns, 1), pil_kwargs={"optimize": True})


def drawn(figure: Any) -> Any:
    """The figure's pixels (H, W, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def main() -> None:
    """Trains both, prints the looks, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, default=Path("docs/img/health.png"))
    parser.add_argument("--steps", type=int, default=80)
    flags = parser.parse_args()
    teacher = Generator.load(flags.teacher)
    logs = {name: trained(teacher, rate, flags.out / name, flags.steps) for name, rate in RUNS.items()}
    for name, entries in logs.items():
        for e in entries:
            told = {k: v for k, v in e.items() if k.startswith("health/") and "@" not in k}
            print(name, e["step"], told, e.get("collapsed", ""))
    picture(logs, flags.picture)


if __name__ == "__main__":
    main()
