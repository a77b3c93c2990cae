"""What a method's step costs beside the bare network passes that its equations need: time, and memory.

    python benchmarks/steps.py                      # every method, two sizes, one thread
    python benchmarks/steps.py --methods cd sfd --sizes small

A step runs from data in memory until the averages are done. Its network calls are recorded once, with their inputs,
what had a gradient, and the gradients that came back; then step and replay of the calls take turns in one process, and
the medians are compared, of CPU time, because other programs may want the same cores. The replay is forward passes
alone, those with a backward pass to the weights, to the input or to both, and forward-mode derivatives. A method whose
student is updated once in several steps is measured over all of these, per step. Passes that a method only makes to
save memory, or makes in parts of the batch, are not among the recorded ones: the recording takes every update whole.
Memory: the estimated peak of a step against 1.15 times the sum of weights, optimizer states, gradients, averages and
the activations of one pass. Writes benchmarks/results/steps.json.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewstep import Generator, edm
from fewstep.core.cond import Batch, Classes
from fewstep.core.denoiser import Precond
from fewstep.core.fit import _Loop, build_models
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions
from fewstep.core.path import FLOW
from fewstep.core.role import Update
from fewstep.core.state import read_json, write_text
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill import METHODS
from fewstep.errors import InputError, unknown
from fewstep.grid.karras import karras
from fewstep.models import UNet, UNetConfig
from fewstep.solve.euler import euler
from fewstep.solve.heun import heun
from fewstep.train.memory import estimate_memory
from passes import Call, activations, recording, replay

# 0.19 and 1.7 million parameters.
SIZES: dict[str, tuple[UNetConfig, int]] = {
    "small": (UNetConfig((3, 16, 16), 3, 16, (1, 2), 1, ()), 4),
    "large": (UNetConfig((3, 32, 32), 3, 40, (1, 2), 2, (16,)), 16),
}
EXAMPLES = 64
# The first step that is timed: not the very first, which some methods take differently.
TIMED = 3


@dataclass(frozen=True)
class Flags:
    """What to run.

    Attributes:
        methods: by their names on the command line; all without any.
        sizes: small (16x16, batch 4) and large (32x32, batch 16).
        repeats: turns of step and replay.
        results: where the numbers go.
    """

    methods: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("small", "large")
    repeats: int = 15
    results: Path = Path("benchmarks/results")


class Random:
    """Pictures, classes and paired noise in memory."""

    name = fingerprint = "random"

    def __init__(self, shape: tuple[int, ...]) -> None:
        keyed, self.shape = Noise.of(0, EXAMPLES), shape
        self.x, self.noise = keyed.uniform(shape, "x") * 2 - 1, keyed.normal(shape, "n")
        self.label = torch.arange(EXAMPLES) % 3

    def __len__(self) -> int:
        return EXAMPLES

    def take(self, ids: Tensor) -> Batch:
        """See :class:`fewstep.data.base.Data`."""
        return Batch(self.x[ids], {"label": self.label[ids]}, self.noise[ids])


class Loop(_Loop):
    """The training loop, which can take updates whole that it would take in parts."""

    whole = False

    def gradients(self, update: Update, count: int) -> dict[str, Tensor]:
        """See :class:`fewstep.core.role.Update`: its ``loss`` is what the equations say."""
        return super().gradients(update._replace(parts=()) if self.whole else update, count)


def teachers(config: UNetConfig) -> Iterator[Generator]:
    """An EDM teacher, then a flow-matching one, whose last layers are not zero."""
    torch.manual_seed(0)
    for kind in ("edm", "flow"):
        net = UNet(config)
        for p in net.parameters():
            p.data += 0.02 * torch.randn_like(p)
        if kind == "edm":
            D, sampler = edm(net, config.shape), heun(karras(4, 0.002, 80.0))
        else:
            D = Precond(net, config.shape, path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
            sampler = euler(torch.tensor([1e8, 1.0, 0.0], dtype=torch.float64))
        yield Generator(D, sampler, None, Classes((1 / 3,) * 3))


def prepared(name: str, config: UNetConfig, batch: int) -> tuple[Any, Generator, Loop]:
    """The method on the first teacher that it takes, ready to step.

    Raises:
        InputError: it takes neither.
    """
    method: Any = METHODS[name]()
    if name == "progressive":
        # A stage of the paper's, and not all stages at once.
        method = replace(method, start_steps=2 * method.steps)
    refused: list[InputError] = []
    for teacher in teachers(config):
        try:
            models = build_models(method.roles(teacher), "cpu")
            data = Random(config.shape) if method.needs_data else ConditionsOnly(teacher.conds)
            loop = Loop(method, models, data, FitOptions(batch=batch), None)
            loop.step(0, 0.0, loop.load(0))
            return method, teacher, loop
        except InputError as error:
            refused.append(error)
    raise refused[0]


def bare(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """What is called beside denoisers: heads, and the networks in denoisers, which some methods call themselves."""
    found: list[nn.Module] = []
    for network in networks:
        inner = [part.net for part in network.modules() if isinstance(part, Precond)]
        found += inner or [network]
    return found


def row_of(name: str, size: str, repeats: int) -> dict[str, Any]:
    """The numbers of a method at a size."""
    config, batch = SIZES[size]
    method, teacher, loop = prepared(name, config, batch)
    # Of the methods with two players; elsewhere it is a share.
    ratio = getattr(method, "ratio", 1)
    cycle, calls = ratio if isinstance(ratio, int) else 1, list[Call]()
    parts = {i: loop.load(i) for i in range(TIMED, TIMED + cycle)}
    for i in range(1, TIMED):
        loop.step(i, 0.0, loop.load(i))
    loop.whole = True
    with recording(calls, bare(loop.m.networks.values())):
        for i, given in parts.items():
            loop.step(i, 0.0, given)
    loop.whole = False
    times: dict[str, list[float]] = {"step": [], "passes": []}
    for turn in range(repeats + 1):
        clock = time.process_time()
        for i, given in parts.items():
            loop.step(i, 0.0, given)
        middle = time.process_time()
        for call in calls:
            replay(call)
        if turn:
            times["step"].append((middle - clock) / cycle)
            times["passes"].append((time.process_time() - middle) / cycle)
        loop.sums.clear()
    step, passes = (statistics.median(values) for values in times.values())
    kinds = [call.kind for call in calls]
    forward_mode = next((in_forwards(call, repeats) for call in calls if call.tangents), None)
    return {
        "method": name,
        "size": size,
        "parameters": sum(p.numel() for p in teacher.network.parameters()),
        "batch": batch,
        **({} if cycle == 1 else {"steps": cycle}),
        "calls": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "step_ms": round(1e3 * step, 2),
        "passes_ms": round(1e3 * passes, 2),
        "ratio": round(step / passes, 3),
        **({} if forward_mode is None else {"jvp_forwards": round(forward_mode, 2)}),
        "spread": round(max(max(v) / statistics.median(v) for v in times.values()), 2),
        **memory(method, teacher, config, batch, calls),
    }


def in_forwards(call: Call, repeats: int) -> float:
    """What a forward-mode pass costs, in forward passes of the same network."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        clock = time.process_time()
        replay(call)
        middle = time.process_time()
        with torch.no_grad():
            call.run(call.leaves)
        times.append((middle - clock, time.process_time() - middle))
    forward_mode, plain = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return forward_mode / plain


def memory(method: Any, teacher: Generator, config: UNetConfig, batch: int, calls: list[Call]) -> dict[str, Any]:
    """The peak of a step in bytes, and what it may be."""
    one = max((activations(call) for call in calls if call.gradients), default=0)
    try:
        data = Random(config.shape) if method.needs_data else None
        found = estimate_memory(method, teacher, data, FitOptions(batch=batch))
    except InputError as error:
        return {"peak_bytes": None, "allowed_bytes": None, "memory": str(error)}
    roles = found.roles.values()
    kept = sum(r.weights + r.optimizer + r.ema for r in roles) + max(r.gradients for r in roles)
    return {"peak_bytes": found.total, "allowed_bytes": round(1.15 * (kept + one)), "memory": "estimated"}


def main(flags: Flags) -> None:
    """Runs everything; a method that was measured before keeps its rows until it is measured again."""
    torch.set_num_threads(1)
    for what, given, known in (("method", flags.methods, METHODS), ("size", flags.sizes, SIZES)):
        for name in given:
            if name not in known:
                raise unknown(what, name, known)
    path = flags.results / "steps.json"
    rows: list[dict[str, Any]] = read_json(path)["rows"] if path.is_file() else []
    for name in flags.methods or tuple(METHODS):
        for size in flags.sizes:
            try:
                made = row_of(name, size, flags.repeats)
            except InputError as error:
                made = {"method": name, "size": size, "refused": str(error)}
            rows = [r for r in rows if (r["method"], r["size"]) != (name, size)] + [made]
            print(made, flush=True)
            body = {
                "benchmark": "steps",
                "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
                "settings": {f.name: str(getattr(flags, f.name)) for f in fields(flags)},
                "rows": rows,
            }
            write_text(path, json.dumps(body, indent=1) + "\n")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table("method", "size", "calls", "step, ms", "passes, ms", "ratio", "peak / allowed")
    for r in rows:
        if "refused" in r:
            table.add_row(r["method"], r["size"], r["refused"])
            continue
        calls = ", ".join(f"{n} {kind}" for kind, n in r["calls"].items())
        share = f"{r['peak_bytes'] / r['allowed_bytes']:.2f}" if r["peak_bytes"] else ""
        table.add_row(r["method"], r["size"], calls, str(r["step_ms"]), str(r["passes_ms"]), str(r["ratio"]), share)
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Flags))
