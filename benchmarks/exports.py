"""How far exported pipelines are from fewstep's own pictures: every family, opened where fewstep cannot be imported.

``python benchmarks/exports.py`` makes a tiny random pipeline of each family, exports it with its own scheduler in four
steps and with one step, and writes the largest difference of a pixel (of a range of 1) and the times that the network
was asked about. Two processes a row; some minutes in all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.core.state import read_json, write_text
from fewstep.solve import euler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tiny_models as tiny

FAMILIES: dict[str, Callable[[], Any]] = {
    "SD epsilon": tiny.stable_diffusion,
    "SD v": lambda: tiny.stable_diffusion("v_prediction"),
    "SDXL": tiny.sdxl,
    "DiT": tiny.dit,
    "PixArt": tiny.pixart,
    "SD3": tiny.sd3,
    "Flux": tiny.flux,
    "Sana": tiny.sana,
    "DDPM": tiny.ddpm,
}


def rows_of(name: str, place: Path) -> list[dict[str, Any]]:
    """The rows of one family."""
    teacher = fewstep.load(tiny.folder_of(FAMILIES[name]()), steps=4)
    top = torch.tensor([teacher.denoiser.sigma_max, 0.0], dtype=torch.float64)
    rows = []
    for sampler in (teacher.sampler, euler(top)):
        out = teacher.with_sampler(sampler).to_diffusers(place / f"{name}-{sampler.nfe}", tolerance=1e-3)
        facts = read_json(out / "fewstep.json")
        found = {k: facts[k] for k in ("nfe", "scheduler", "trust_remote_code")}
        seen = facts["checked"]
        rows.append({"family": name, **found, "difference": seen["largest_difference"], "asked": seen["asked"]})
        print(f"{name:12} {sampler.nfe} {facts['scheduler']:32} {seen['largest_difference']:.1e}", flush=True)
    return rows


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exports.json")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in given.families:
            rows += rows_of(name, Path(place))
    write_text(given.out, json.dumps({"seed": 0, "dtype": "float32", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
