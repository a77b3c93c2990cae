"""``fewstep pairs``: pairs of a noise and the teacher's picture, for methods that learn from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fewstep.cli.base import SamplerFlags, SourceFlags, next_folder, recipe_of
from fewstep.core import distributed
from fewstep.data.pairs import Stored, make_pairs


@dataclass(frozen=True)
class Pairs:
    """Runs a teacher's ODE from keyed noise and keeps what it ends with; the folder is data for `fewstep distill`.

    Attributes:
        teacher: a folder of fewstep or diffusers, a Hub id, or a checkpoint.
        n: how many pairs.
        seed: pair i is a function of (seed, i) alone, and is none of the pictures of `fewstep sample`.
        batch: pairs at a time.
        shard: pairs in a file.
        dtype: of the stored pictures or latents: float32, float16 or bfloat16.
        store_conditions: also stores the conditions; else they are drawn again when pairs are read.
        out: folder; runs/pairs-<number> without one.
        device: cpu, cuda, cuda:1 or mps.
        resume: goes on in out after a break, to the same bytes.
        overwrite: deletes earlier pairs in out.
        source: how to open the teacher.
        flags: how to sample.
    """

    teacher: Annotated[str, tyro.conf.Positional]
    n: int = 50_000
    seed: int = 0
    batch: int = 256
    shard: int = 4096
    dtype: Stored = "float32"
    store_conditions: bool = True
    out: Path | None = None
    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)
    flags: Annotated[SamplerFlags, tyro.conf.arg(name="")] = field(default_factory=SamplerFlags)

    def run(self) -> None:
        """Runs the command."""
        made = self.flags.guided(self.source.open(self.teacher, self.device))
        name, sampler = self.flags.resolve(made)
        out = self.out or next_folder("pairs")
        pairs = make_pairs(
            made,
            out,
            n=self.n,
            sampler=sampler,
            seed=self.seed,
            batch=self.batch,
            shard=self.shard,
            dtype=self.dtype,
            store_conditions=self.store_conditions,
            resume=self.resume,
            overwrite=self.overwrite,
            recipe=recipe_of("pairs", self),
        )
        if distributed.rank() == 0:
            told = f"{out}: {len(pairs)} pairs, {name}, {sampler.nfe} evaluations each; pass --data {out}"
            Console(stderr=True).print(told, highlight=False)
