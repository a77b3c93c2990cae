"""How long and how to train, as values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fewstep.core import distributed
from fewstep.errors import InputError

# What `fewstep.train.run.train` takes beside the options of the loop.
HANDED_ON = ("keep", "grid_every", "progress", "lora", "lora_roles", "on_collapse", "check_every", "page")


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, of images, or of seconds."""

    amount: float
    unit: str = "steps"

    @classmethod
    def parse(cls, text: str | int | float | Budget) -> Budget:
        """``"2000"`` or ``"2000 steps"``, ``"200k images"``, ``"90s"``, ``"5m"``, ``"2h"``.

        Raises:
            InputError: anything else, or not positive.
        """
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"\s*([0-9.]+)\s*([kM]?)\s*(steps?|images?|img|s|m|h)?\s*", str(text))
        units = {"s": ("seconds", 1), "m": ("seconds", 60), "h": ("seconds", 3600)}
        try:
            if match is None:
                raise ValueError
            name = match[3] or "steps"
            unit, factor = units.get(name, ("images" if name.startswith("im") else "steps", 1))
            amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]] * factor
            if amount <= 0:
                raise ValueError
        except ValueError:
            raise InputError(f"budget {text!r}: expected e.g. 2000 steps, 200k images, 90s, 5m or 2h") from None
        return cls(amount, unit)

    def progress(self, step: int, images: int, seconds: float) -> float:
        """The share that is spent."""
        return {"steps": step, "images": images, "seconds": seconds}[self.unit] / self.amount

    def part(self, share: float) -> Budget:
        """The ``share`` in (0, 1] of it; steps and images are counted whole, and at least 1."""
        amount = self.amount * share
        return replace(self, amount=amount if self.unit == "seconds" else float(math.ceil(amount - 1e-9)))


@dataclass(frozen=True)
class FitOptions:
    """How to run a method.

    Attributes:
        budget: see :class:`Budget`.
        batch: images per step over all processes and micro-batches.
        micro: micro-batches a step is split into, for memory; the result is the same.
        seed: of noise and data order.
        bf16: runs networks under bfloat16 autocast.
        log_every: steps between reports (a report synchronises with the device).
        save_every: steps between checkpoints; 0 saves only at the end.
        patience: non-finite updates in a row before training stops with an error; single ones are skipped.
        device: where the networks live.
        checkpointing: blocks run again in the backward pass instead of keeping their activations; same result.
        offload: frozen networks stay in host memory and visit the device layer by layer; same result.
    """

    budget: Budget = field(default_factory=lambda: Budget(1000))
    batch: int = 128
    micro: int = 1
    seed: int = 0
    bf16: bool = False
    log_every: int = 20
    save_every: int = 500
    patience: int = 10
    device: str = "cpu"
    checkpointing: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "micro", "log_every", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.save_every < 0:
            raise InputError(f"save_every must be at least 0, got {self.save_every}")
        if self.batch % (self.micro * distributed.world()):
            raise InputError(
                f"batch {self.batch} must divide into {self.micro} micro-batches on {distributed.world()} processes"
            )


class Report(NamedTuple):
    """What the loop says after some steps; ``losses`` are means since the last report."""

    step: int
    images: int
    seconds: float
    progress: float
    losses: dict[str, float]
    skipped: int
    done: bool
