"""What the measures cost at the size of FID: the distance beside scipy's in the same run, and the memory of streaming.

Pictures are noise, and their features a fixed random layer of 2048, so that nothing but the measures costs anything.
Times are CPU seconds of this process, so that a busy machine changes them little. Memory is what a part adds to the
process at its peak, as Linux counts it.

Parts that are not run keep their earlier numbers, each with the sizes that it was run at.

    python benchmarks/measures.py [--parts fd distance pairs] [--n 50000] [--keep 10000] [--dim 2048]
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.state import read_json, write_text
from fewstep.measure import Moments, Target, evaluate

BATCH, SIDE = 250, 8
PAIRS = ("kid", "precision", "recall", "density", "coverage")
PARTS = ("fd", "distance", "pairs")


class Noise:
    """``n`` pictures of noise, drawn when they are asked for."""

    name, shape = "noise", (1, SIDE, SIDE)

    def __init__(self, n: int) -> None:
        self.n, self.fingerprint = n, f"noise {n}"

    def __len__(self) -> int:
        return self.n

    def take(self, ids: Tensor) -> Batch:
        """The pictures ``ids`` (B,), the same at every call."""
        return Batch(pictures(len(ids), int(ids[0])), {})


class Layer:
    """``dim`` features of a random layer whose scales fall as 1 / sqrt(i), as the spectra of networks do."""

    name = "layer"

    def __init__(self, dim: int) -> None:
        self.dim, self.fingerprint = dim, f"layer {dim}"
        scale = torch.arange(1, dim + 1).float().rsqrt()
        self.weight = torch.randn(SIDE * SIDE, dim, generator=torch.Generator().manual_seed(1)) * scale

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, dim)."""
        return (images.flatten(1) @ self.weight).relu_()


def pictures(n: int, seed: int) -> Tensor:
    """(n, 1, 8, 8) in [-1, 1]."""
    return torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made(n: int) -> Iterator[Tensor]:
    """Batches of generated pictures, a little darker than the real ones."""
    return (pictures(BATCH, 10**6 + start) * 0.9 for start in range(0, n, BATCH))


def said(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def added(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds, and the MiB that ``work`` adds to this process at its peak."""
    gc.collect()
    # This sets the peak back to what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    before, clock = said("VmRSS"), time.process_time()
    work()
    return time.process_time() - clock, said("VmHWM") - before


def scores(n: int, keep: int, dim: int, metrics: Sequence[str]) -> tuple[float, float]:
    """Seconds and memory of evaluating ``n`` pictures against ``n`` real ones without a cache."""
    with tempfile.TemporaryDirectory() as cache:
        return added(
            lambda: evaluate(
                made(n), Noise(n), metrics=metrics, extractor=Layer(dim), batch=BATCH, keep=keep, cache=cache
            )
        )


def distance(dim: int) -> dict[str, float]:
    """Our distance and scipy's, of the same full-rank covariances."""
    draw, sides = torch.Generator().manual_seed(0), []
    for scale in (1.0, 1.1):
        rows = torch.randn(2 * dim, dim, generator=draw) * torch.arange(1, dim + 1).float().rsqrt() * scale
        sides.append(Moments.of(rows.split(BATCH)))
    clock = time.process_time()
    value = Target.of(sides[1]).distance(sides[0], normalise=False)
    ours = time.process_time() - clock
    a, b = (side.covariance().numpy() for side in sides)
    step = float((sides[0].mean - sides[1].mean).square().sum())
    clock = time.process_time()
    root = scipy.linalg.sqrtm(a @ b)
    theirs = time.process_time() - clock
    expected = step + float(np.trace(a) + np.trace(b) - 2 * np.trace(root).real)
    return {
        "dim": dim,
        "distance_cpu_seconds": ours,
        "scipy_cpu_seconds": theirs,
        "ratio_to_scipy": ours / theirs,
        "relative_difference": abs(value / expected - 1),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--keep", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/measures.json"))
    options = parser.parse_args()
    n, keep, dim = options.n, options.keep, options.dim
    found: dict[str, Any] = read_json(options.out) if options.out.is_file() else {}
    found["threads"] = torch.get_num_threads()
    # Libraries are loaded before memory is counted.
    scores(2 * BATCH, BATCH, 64, ("fd", *PAIRS))
    for part in options.parts:
        if part == "fd":
            seconds, mib = scores(n, n, dim, ("fd",))
            found[part] = {"n": n, "dim": dim, "cpu_seconds": seconds, "peak_mib": mib}
        elif part == "pairs":
            # The real side keeps as many features as there are pictures, up to 10 000.
            seconds, mib = scores(keep, keep, dim, PAIRS)
            rows = 2 * keep * dim * 4 / 2**20
            found[part] = {"n": keep, "dim": dim, "cpu_seconds": seconds, "peak_mib": mib, "features_mib": rows}
        else:
            found[part] = distance(dim)
        write_text(options.out, json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
