"""Tiny training runs that several test files share, and child processes to run them in."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.generator import Generator
from fewstep.core.role import Ema, Method, Optim
from fewstep.core.state import Run, load_tensors
from fewstep.core.tableau import Tableau
from fewstep.data import Images, Pairs, make_pairs
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill import SFD, SiD
from fewstep.train import EDMTraining, train, untrained

# A coarse eps, because Adam turns the rounding of a gradient near zero into a step of full size.
STEADY = Optim(lr=2e-3, eps=1e-4, warmup=2, decay="cosine", clip=1.0)
METHODS: dict[str, Method] = {
    "EDMTraining": EDMTraining(optim=STEADY, ema=Ema(rate=0.9)),
    "SFD": SFD(steps=2, between=1, optim=STEADY),
    "SiD": SiD(student=STEADY, fake=STEADY),
}


def tiny_data() -> Images:
    """48 random pictures of 4x4 in three classes."""
    g = torch.Generator().manual_seed(0)
    return Images("tiny", torch.rand(48, 1, 4, 4, generator=g) * 2 - 1, torch.arange(48) % 3)


def tiny(network: str = "resmlp", **size: Any) -> Generator:
    """A class-conditional generator of 4x4 pictures; its last layer is not zero, so every weight has a gradient."""
    size = size or {"width": 16, "embedding": 8, "blocks": 1}
    made = untrained(tiny_data(), network, **size)
    g = torch.Generator().manual_seed(1)
    for p in made.denoiser.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return made


class Stop(Exception):
    """What :class:`StopsAfter` raises."""


@dataclass
class StopsAfter:
    """Data that fails when it is asked for more than ``left`` micro-batches."""

    data: Any
    left: int

    @property
    def fingerprint(self) -> str | None:
        return getattr(self.data, "fingerprint", None)

    def __len__(self) -> int:
        return len(self.data)

    def take(self, ids: Tensor) -> Batch:
        if self.left == 0:
            raise Stop
        self.left -= 1
        return self.data.take(ids)


class Breaks(Pairs):
    """Pairs that stop everything after ``left`` micro-batches."""

    left = 10**9

    def take(self, ids: Tensor) -> Batch:
        if self.left == 0:
            raise Stop
        self.left -= 1
        return super().take(ids)


def tiny_pairs(out: Path, sampler: Tableau) -> Path:
    """40 pairs of :func:`tiny` in three shards."""
    make_pairs(tiny(), out, n=40, sampler=sampler, shard=16, progress=False)
    return out


def run(
    name: str,
    out: Path,
    *,
    budget: Any = 6,
    method: Method | None = None,
    start: Generator | None = None,
    stop: int | None = None,
    **options: Any,
) -> Generator:
    """Trains the method ``name`` in ``out``; ``stop`` ends it with :class:`Stop` after that many steps."""
    method, start = method or METHODS[name], start or tiny()
    options = {"batch": 8, "micro": 2, "log_every": 2, "save_every": 3, "progress": False} | options
    data = tiny_data() if method.needs_data else ConditionsOnly(start.conds, size=64)
    source = data if stop is None else StopsAfter(data, stop * options["micro"])
    return train(start, method, source, out=out, budget=budget, **options)


def log_of(out: Path) -> list[dict[str, Any]]:
    """The log without what a clock says, nan made comparable."""
    return [json.loads(json.dumps({k: v for k, v in e.items() if k != "seconds"})) for e in Run(out).read_log()]


def bits(out: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint and of the shipped generator, by file and name."""
    files = [*Run(out).checkpoints()[-1].rglob("*.safetensors"), *out.glob("*.safetensors")]
    return {f"{f.relative_to(out)}:{name}": t for f in files for name, t in load_tensors(f).items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same in every bit."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference relative to the largest entry of its tensor, and where."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max((float((a[k] - b[k]).abs().max() / (a[k].abs().max() + 1e-12)), k) for k in a)


def check_resume(name: str, method: Method, folder: Path) -> None:
    """:func:`check_restart` of :func:`run`."""
    check_restart(folder, lambda out, **more: run(name, out, method=method, **more), far=2e-3)


def check_restart(folder: Path, go: Callable[..., Any], *, far: float, stop: int = 5) -> Any:
    """A training that was stopped goes on to the same bits, and two micro-batches are one batch; returns what it made.

    ``go(out, **more)`` trains in ``out`` with micro-batches; ``more`` is ``stop``, steps after which the data raise
    :class:`Stop`, ``resume`` or ``micro``. Tensors of roles may be ``far`` apart between one micro-batch and several.
    """
    made = go(folder / "whole")
    with pytest.raises(Stop):
        go(folder / "cut", stop=stop)
    # What a process has drawn before does not matter.
    torch.manual_seed(1)
    go(folder / "cut", resume=True)
    assert differing(bits(folder / "whole"), bits(folder / "cut")) == []
    assert log_of(folder / "whole") == log_of(folder / "cut")
    go(folder / "one", micro=1)
    apart, where = furthest(*(of_roles(folder / name) for name in ("one", "whole")))
    assert apart < far, where
    return made


def of_roles(out: Path) -> dict[str, Tensor]:
    """The tensors of the roles in the checkpoints of a run."""
    return {k: v for k, v in bits(out).items() if k.startswith("checkpoints") and "roles/" in k}


def child(target: Callable[..., object], args: Sequence[object] = (), **kwargs: Any) -> BaseProcess:
    """A started process with one thread; the server that forks it has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo is what the first optimizer of a process imports, which takes seconds.
    context.set_forkserver_preload(["torch._dynamo", "rich.progress", "PIL.Image", "fewstep.distill", "tiny_runs"])
    process = context.Process(target=_single, args=(target, *args), kwargs=kwargs, daemon=True)
    process.start()
    return process


def _single(target: Callable[..., object], *args: object, **kwargs: Any) -> None:
    torch.set_num_threads(1)
    target(*args, **kwargs)
