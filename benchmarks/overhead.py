"""What a sampler costs beside its denoiser: microseconds per evaluation at 16x3x32x32 in float32 on one thread.

    python benchmarks/overhead.py      # about three minutes on one core

The denoiser returns a fixed tensor. ``fewstep.sample`` runs against the bare update ``y + (D - y) c`` (the floor), the
schedulers of diffusers and the samplers of k-diffusion, where installed, and the published recurrences as plain loops:
``loop`` with Python numbers, ``loop0d`` with levels as 0-dimensional tensors, as diff-sampler writes them. The random
numbers of the plain loops are ``randn_like``. Contenders take turns in random order; times are CPU seconds of the one
thread, so that other programs do not count. Setting up (building a table, ``set_timesteps``) is reported apart.

Beside that: tensors held at once, capture by torch.compile, and on a CUDA device a run without synchronisation and as
one CUDA graph. Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import gc
import importlib
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep import Noise, sample
from fewstep.core.state import write_text
from fewstep.errors import unknown
from fewstep.grid import karras
from fewstep.solve import build
from loops import DIFFUSERS, KDIFFUSION, plain

LOW, HIGH, SHAPE = 0.002, 80.0, (16, 3, 32, 32)
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("euler", {}),
    "heun": ("heun", {}),
    "dpm2": ("dpm2", {}),
    "dpmpp2s": ("dpmpp2s", {}),
    "dpmpp2m": ("dpmpp2m", {}),
    "dpmpp3m": ("dpmpp3m", {}),
    "ipndm2": ("ipndm2", {}),
    "ipndm3": ("ipndm3", {}),
    "ipndm4": ("ipndm4", {}),
    "lms4": ("lms", {"order": 4}),
    "deis3": ("deis", {"order": 3, "basis": "rho"}),
    "unipc2": ("unipc", {"order": 2}),
    "unipc3": ("unipc", {"order": 3}),
    "euler_ancestral": ("euler_ancestral", {}),
    "dpmpp2m_sde": ("dpmpp2m_sde", {}),
}
CAPTURED = ("euler", "ipndm4", "unipc3", "euler_ancestral")


@dataclass(frozen=True)
class Overhead:
    """What to run.

    Attributes:
        steps: numbers of steps.
        solvers: names; all without any.
        evaluations: per contender and number of steps, which sets the repeats; there are ``least`` at least.
        least: repeats.
        slow: a peer that takes this many times as long as the fastest peer is not run with more steps.
        compile: backend of torch.compile for capturing 10 steps, or "" to leave that out; aot_eager generates no code.
        results: where the numbers go.
    """

    steps: tuple[int, ...] = (10, 20, 100, 1000)
    solvers: tuple[str, ...] = ()
    evaluations: int = 400
    least: int = 3
    slow: float = 4.0
    compile: str = "aot_eager"
    results: Path = Path("benchmarks/results")


@dataclass
class Contender:
    """Something to time: ``ready()`` is what each run needs anew, ``run(what ready gave)`` the run itself."""

    solver: str
    name: str
    run: Callable[[Any], Tensor]
    evaluations: int
    ready: Callable[[], Any] = lambda: None
    seconds: list[float] = field(default_factory=list)
    ready_seconds: list[float] = field(default_factory=list)


class Fixed:
    """The denoiser that costs nothing. Counts its calls."""

    def __init__(self) -> None:
        self.out = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        """The fixed tensor."""
        self.calls += 1
        return self.out


def contenders(solver: str, steps: int, missing: dict[str, str]) -> list[Contender]:
    """Everything that runs a solver; ``missing`` collects what could not be had, and why."""
    D, x = Fixed(), HIGH * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    grid = karras(steps, LOW, HIGH, to_zero=False)
    t, noise = grid.tolist(), Noise.of(0, len(x))
    found = []

    def add(name: str, run: Callable[[Any], Tensor], ready: Callable[[], Any] = lambda: None) -> None:
        before = D.calls
        try:
            if not run(ready()).isfinite().all():
                raise FloatingPointError("the result is not finite")
        except Exception as error:  # whatever a peer's own code raises is the reason it has no number
            missing[f"{solver}: {name}"] = f"{type(error).__name__}: {error}"
            return
        found.append(Contender(solver, name, run, D.calls - before, ready))

    name, options = OURS[solver]
    table = build(name, grid, **options)

    def prepared() -> Any:
        made = build(name, grid, **options)
        return made.plan and made

    add("fewstep", lambda made: sample(D, x, made, noise=noise if table.noisy else None), prepared)
    if found[0].evaluations != table.nfe:
        raise AssertionError(f"{solver} calls its denoiser {found[0].evaluations} times, its table says {table.nfe}")
    for label, loop in plain(solver, t).items():
        add(label, lambda _, loop=loop: loop(D, x))
    diffusers = _module("diffusers", missing)
    for kind, settings in DIFFUSERS.get(solver, []) if diffusers else []:
        add(f"diffusers {kind.removesuffix('Scheduler')}", partial(_pipeline, D, x), _scheduler(kind, settings, steps))
    samplers = _module("k_diffusion.sampling", missing) if solver in KDIFFUSION else None
    if samplers:
        calm: dict[str, Any] = {"eta": 0.0} if solver in ("dpmpp2s", "dpmpp3m") else {}
        if table.noisy or calm:
            calm["noise_sampler"] = lambda a, b: torch.randn_like(x)
        function, levels = getattr(samplers, KDIFFUSION[solver]), grid.float()
        add("k-diffusion", lambda _: function(D, x, levels, disable=True, **calm))
    return found


def _scheduler(kind: str, settings: dict[str, Any], steps: int) -> Callable[[], Any]:
    """A function that resets a scheduler to its first step and returns it; that is ``set_timesteps``."""
    made = getattr(importlib.import_module("diffusers"), kind)(**settings)

    def reset() -> Any:
        made.set_timesteps(steps)
        return made

    return reset


def _pipeline(D: Fixed, x: Tensor, scheduler: Any) -> Tensor:
    """The loop of a pipeline."""
    for t in scheduler.timesteps:
        out = D(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


def _module(name: str, missing: dict[str, str]) -> Any:
    """A peer's module, or None with the reason noted."""
    if name not in missing:
        try:
            return importlib.import_module(name)
        except Exception as error:  # broken installations raise all kinds of errors
            missing[name] = f"left out, because it cannot be imported here: {type(error).__name__}: {error}"
    return None


def floor(steps: int) -> Contender:
    """The cheapest update there is."""
    out, start = torch.randn(SHAPE), torch.randn(SHAPE)

    def run(_: Any) -> Tensor:
        y = start
        for _ in range(steps):
            y = y + (out - y) * 0.1
        return y

    return Contender("floor", "y + (D - y) c", run, steps)


def race(entries: list[Contender], repeats: int) -> None:
    """Every contender once per repeat, in random order; the first repeat warms up and is not kept."""
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for repeat in range(repeats + 1):
                for entry in order.sample(entries, len(entries)):
                    start = time.thread_time()
                    given = entry.ready()
                    middle = time.thread_time()
                    entry.run(given)
                    end = time.thread_time()
                    if repeat:
                        entry.ready_seconds.append(middle - start)
                        entry.seconds.append(end - middle)
    finally:
        gc.enable()


def measured(flags: Overhead, missing: dict[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of times in microseconds per evaluation, and rows of fewstep against the fastest peer."""
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    slow: set[tuple[str, str]] = set()
    for steps in flags.steps:
        base = floor(steps)
        entries = [c for name in flags.solvers or OURS for c in contenders(name, steps, missing)]
        entries = [c for c in entries if (c.solver, c.name) not in slow]
        race([base, *entries], max(flags.least, flags.evaluations // steps))
        low = 1e6 * min(base.seconds) / steps
        for entry in (base, *entries):
            times = [1e6 * s / entry.evaluations for s in entry.seconds]
            row: dict[str, Any] = {"solver": entry.solver, "steps": steps, "name": entry.name}
            row |= {"evaluations": entry.evaluations, "us_min": round(min(times), 2)}
            row |= {"us_median": round(statistics.median(times), 2), "over_floor": round(min(times) / low, 3)}
            rows.append({**row, "setup_us": round(1e6 * min(entry.ready_seconds), 1)})
        for name in flags.solvers or OURS:
            own = [r for r in rows if (r["solver"], r["steps"]) == (name, steps)]
            if len(own) > 1:
                ratios.append(_ratio(own))
                most = flags.slow * ratios[-1]["peer_us_min"]
                slow |= {(name, r["name"]) for r in own if r["us_min"] > most and r["name"] != "fewstep"}
    return rows, ratios


def _ratio(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """fewstep against the fastest of the others by minimum, and against each other's best median."""
    own = next(r for r in rows if r["name"] == "fewstep")
    others = [r for r in rows if r["name"] != "fewstep"]
    best = min(others, key=lambda r: r["us_min"])
    row = {k: own[k] for k in ("solver", "steps", "us_min", "us_median")}
    row |= {"fastest_peer": best["name"], "peer_us_min": best["us_min"]}
    medians = own["us_median"] / min(r["us_median"] for r in others)
    return {**row, "ratio": round(own["us_min"] / best["us_min"], 3), "ratio_of_medians": round(medians, 3)}


def draws(repeats: int = 50) -> dict[str, float]:
    """Microseconds of one batch of noise: ours, keyed by sample, and torch's global generator."""
    noise, like = Noise.of(0, SHAPE[0]), torch.empty(SHAPE)
    kinds = {"Noise.normal": lambda: noise.normal(SHAPE[1:], "step", 3), "randn_like": lambda: torch.randn_like(like)}
    entries = [Contender("noise", name, lambda _, make=make: make(), 1) for name, make in kinds.items()]
    race(entries, repeats)
    return {e.name: round(1e6 * min(e.seconds), 1) for e in entries}


def shrink(x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
    """The denoiser of unit Gaussian data: something to compile and to capture."""
    return x / (1 + sigma**2)


def compiled(backend: str, solver: str) -> dict[str, Any]:
    """Ten steps under torch.compile: graphs and breaks, the output against the plain run, the time per evaluation."""
    name, options = OURS[solver]
    table = build(name, karras(10, LOW, HIGH, to_zero=False), **options)
    x = HIGH * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    noise = Noise.of(0, len(x)) if table.noisy else None

    def whole(x: Tensor) -> Tensor:
        return sample(shrink, x, table, noise=noise)  # type: ignore[arg-type]

    torch._dynamo.reset()
    told = torch._dynamo.explain(whole)(x)
    found: dict[str, Any] = {"solver": solver, "backend": backend, "graphs": told.graph_count}
    found["graph_breaks"] = told.graph_break_count
    torch._dynamo.reset()
    try:
        clock = time.perf_counter()
        fast = torch.compile(whole, fullgraph=told.graph_break_count == 0, backend=backend)
        out = fast(x)
        found["compile_seconds"] = round(time.perf_counter() - clock, 1)
    except Exception as error:  # a machine without a compiler still has the rest
        return {**found, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    plainly = whole(x)
    found["largest_difference"] = float((out - plainly).abs().max() / plainly.abs().max())
    pair = [Contender(solver, "compiled", lambda _: fast(x), 10), Contender(solver, "plain", lambda _: whole(x), 10)]
    race(pair, 50)
    return {**found, **{f"{e.name}_us": round(1e5 * min(e.seconds), 1) for e in pair}}


def on_cuda(solver: str) -> dict[str, Any]:
    """Ten steps on the CUDA device: without any synchronisation, and captured as one graph that replays the same."""
    name, options = OURS[solver]
    table = build(name, karras(10, LOW, HIGH, to_zero=False), **options)
    x = HIGH * torch.randn(SHAPE, device="cuda")
    noise = Noise.of(0, len(x), device="cuda") if table.noisy else None

    def whole() -> Tensor:
        return sample(shrink, x, table, noise=noise)  # type: ignore[arg-type]

    expected = whole()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = whole()
    times: dict[str, list[float]] = {"graph": [], "plain": []}
    for _ in range(50):
        for label, call in (("graph", graph.replay), ("plain", whole)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[label].append(time.perf_counter() - start)
    same = bool(torch.equal(held, expected))
    return {"solver": solver, "synchronises": False, "graph_same": same} | {
        f"{k}_us": round(1e5 * min(v), 2) for k, v in times.items()
    }


def main(flags: Overhead) -> None:
    """Runs everything and writes the results."""
    for name in flags.solvers:
        if name not in OURS:
            raise unknown("solver", name, OURS)
    torch.set_num_threads(1)
    missing: dict[str, str] = {}
    rows, ratios = measured(flags, missing)
    body: dict[str, Any] = {
        "benchmark": "overhead",
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, Python {platform.python_version()}",
        "shape": "x".join(map(str, SHAPE)),
        "left_out": missing,
        "slower_than_fastest_peer": [r for r in ratios if r["ratio"] > 1],
        "ratios": ratios,
        "rows": rows,
        "noise_us": draws(),
        "live_tensors_of_1000_ancestral_steps": build("euler_ancestral", karras(1000, LOW, HIGH)).live,
        "compiled": [compiled(flags.compile, name) for name in CAPTURED] if flags.compile else [],
        "cuda": "not measured: no CUDA device",
    }
    if torch.cuda.is_available():
        body["cuda"] = [{"device": torch.cuda.get_device_name()}, *map(on_cuda, CAPTURED)]
    text = json.dumps(body, indent=0, separators=(",", ":"))
    text = text.replace(',\n"', ', "').replace("{\n", "{").replace("\n}", "}")
    write_text(flags.results / "overhead.json", text + "\n")
    show(ratios)


def show(ratios: list[dict[str, Any]]) -> None:
    """fewstep against the fastest peer of the same solver."""
    table = Table("solver", "steps", "fewstep us", "fastest peer", "its us", "ratio", "of medians")
    for r in ratios:
        times = (f"{r['us_min']:.1f}", r["fastest_peer"], f"{r['peer_us_min']:.1f}")
        table.add_row(r["solver"], str(r["steps"]), *times, f"{r['ratio']:.2f}", f"{r['ratio_of_medians']:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Overhead))
