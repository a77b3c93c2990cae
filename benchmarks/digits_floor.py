"""How far the Frechet distance on digits can be trusted: real data against real data, 20 draws.

    python benchmarks/digits_floor.py        # seconds

Two random halves of the data, and a bootstrap of 2000 against all of it. Writes benchmarks/results/digits-floor.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

from fewstep import Noise
from fewstep.core.state import write_text
from fewstep.data import load_data
from fewstep.measure import Moments, digits_extractor, frechet

DRAWS = 20
RESULTS = Path("benchmarks/results")


def main() -> None:
    """Runs everything and writes the results."""
    data = load_data("digits")
    batch = data.take(torch.arange(len(data)))
    assert batch.x is not None
    features = digits_extractor()(batch.x)
    whole, half = Moments.of(features), len(features) // 2
    found: dict[str, list[float]] = {"halves": [], "bootstrap 2000": []}
    for draw in range(DRAWS):
        order = Noise.of(draw, len(features)).bits(1, "halves")[:, 0].argsort()
        parts = Moments.of(features[order[:half]]), Moments.of(features[order[half:]])
        found["halves"].append(frechet(*parts))
        again = Noise.of(draw, 2000).integers(0, len(features), (), "bootstrap")
        found["bootstrap 2000"].append(frechet(Moments.of(features[again]), whole))
    said = {k: {"mean": statistics.mean(v), "sd": statistics.stdev(v), "draws": DRAWS} for k, v in found.items()}
    write_text(RESULTS / "digits-floor.json", json.dumps({"benchmark": "floor", **said}, indent=1) + "\n")
    for name, facts in said.items():
        print(f"{name}: {facts['mean']:.3f} +- {facts['sd']:.3f}")


if __name__ == "__main__":
    main()
