"""``fewstep train``: a denoiser from pictures."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from fewstep.cli.base import next_folder, recipe_of
from fewstep.core import distributed
from fewstep.data import load_data
from fewstep.errors import InputError
from fewstep.train import EDMTraining, FlowMatching, train, untrained
from fewstep.train.rollback import OnCollapse


@dataclass(frozen=True)
class RunFlags:
    """How to run.

    Attributes:
        out: run folder; runs/<command>-<number> without one.
        budget: how long: "2000 steps", "200k images", "90s", "5m", "2h".
        batch: pictures per step, over all micro-batches and processes.
        micro: micro-batches per step, to save memory; the result is the same.
        seed: of weights, noise and data order.
        device: cpu, cuda, cuda:1 or mps.
        bf16: networks in bfloat16; weights stay float32.
        log_every: steps between log entries.
        save_every: steps between checkpoints; 0 saves at the end only.
        keep: checkpoints kept.
        grid_every: steps between pictures of samples; 0 makes one at the end.
        patience: non-finite updates in a row before training stops.
        on_collapse: when samples become alike, lose modes or blow up: stop with exit code 3, rollback to the last good
            checkpoint with learning rates halved (at most three times), or ignore.
        check_every: steps between looks at the samples; chosen so that they cost at most 2 % without one; 0 never.
        page: writes run.html into the run folder, a page of curves and samples that follows the run while it is open.
        checkpointing: recomputes blocks in the backward pass instead of keeping activations; slower, the same result.
        offload: keeps frozen networks in host memory; for accelerators.
        resume: goes on from the newest checkpoint in out, to the same result.
        overwrite: deletes an earlier run in out.
    """

    out: Path | None = None
    budget: str = "2000 steps"
    batch: int = 256
    micro: int = 1
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    log_every: int = 20
    save_every: int = 500
    keep: int = 2
    grid_every: int = 500
    patience: int = 10
    on_collapse: OnCollapse = "stop"
    check_every: int | None = None
    page: bool = False
    checkpointing: bool = False
    offload: bool = False
    resume: bool = False
    overwrite: bool = False

    def options(self) -> dict[str, Any]:
        """The keyword arguments of :func:`fewstep.train.train` that these flags are."""
        return {k: v for k, v in vars(self).items() if k != "out"}

    def tell(self, out: Path) -> None:
        """Says where the page is, before there is one, where it was asked for."""
        if self.page and distributed.rank() == 0:
            from fewstep.report.run_page import PAGE

            # Not on stderr, where bad input is told on a line of its own.
            told = f"open {out / PAGE}, or that of each stage in {out / 'stages'}: it follows the run"
            Console().print(told, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Train:
    """Trains a denoiser and leaves a generator folder.

    Attributes:
        data: digits, stacked-digits, a folder of images, Parquet files, or an array.
        resize: side that encoded images are resized to, in pixels.
        network: unet or resmlp (for tiny pictures).
        width: of a resmlp, or channels of a unet; a size that suits the pictures without one.
        path: edm for EDM's preconditioning and objective; flow for flow matching from pure noise.
        run_flags: how to run.
        method: the objective.
    """

    data: str = "digits"
    resize: int | None = None
    network: Literal["unet", "resmlp"] = "unet"
    width: int | None = None
    path: Literal["edm", "flow"] = "edm"
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")] = field(default_factory=RunFlags)
    method: Annotated[EDMTraining | FlowMatching, tyro.conf.arg(name="")] = field(default_factory=EDMTraining)

    def run(self) -> None:
        """Runs the command."""
        flags = self.run_flags
        if self.width is not None and self.width < 1:
            raise InputError(f"--width must be at least 1, got {self.width}")
        pictures = load_data(self.data, resize=self.resize)
        # Not on stderr, where bad input is told on a line of its own.
        Console().print(f"{pictures.name}: {pictures.report}", highlight=False)
        size = {} if self.width is None else {"channels" if self.network == "unet" else "width": self.width}
        start = untrained(pictures, self.network, seed=flags.seed, path=self.path, **size)
        out = flags.out or next_folder("train")
        options = {**flags.options(), "recipe": clean(recipe_of("train", self))}
        flags.tell(out)
        train(start, self.method, pictures, out=out, **options)
        if distributed.rank() == 0:
            told = f"{out}: look at {out}/samples, try `fewstep sample {out}`"
            Console(stderr=True).print(told, highlight=False)


def command_for(argv: list[str], recipe: dict[str, Any] | None) -> tuple[type, list[str]]:
    """The command with the flags of the objective that belongs to ``--path``, or to the recipe's path."""
    words = [word for flag in argv for word in flag.split("=", 1)]
    said = [b for a, b in itertools.pairwise(words) if a == "--path"]
    path = said[-1] if said else (recipe or {}).get("path", "edm")
    method: Any = FlowMatching if path == "flow" else EDMTraining
    added: list[Any] = [("method", Annotated[method, tyro.conf.arg(name="")], field(default_factory=method))]
    if path == "flow":
        added.append(("path", Literal["edm", "flow"], field(default="flow")))
    made = make_dataclass("Train", added, bases=(Train,), frozen=True)
    made.__doc__ = Train.__doc__
    return made, argv


def clean(recipe: dict[str, Any]) -> dict[str, Any]:
    """A training recipe without what may differ between two runs of it: places, memory, what is done on collapse."""
    apart = ("out", "resume", "overwrite", "checkpointing", "offload", "on_collapse", "check_every", "page")
    inner = {k: v for k, v in recipe["arguments"]["run_flags"].items() if k not in apart}
    arguments = {k: v for k, v in recipe["arguments"].items() if k != "dry_run"}
    return {**recipe, "arguments": {**arguments, "run_flags": inner}}
