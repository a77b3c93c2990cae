"""Pictures that are to be measured, as files of a run folder: a killed run goes on, and processes share the work.

A shard holds one batch. What is in it depends on the seed and the numbers of its pictures alone, so that scores do not
depend on how often a run was stopped or on how many processes filled the folder: they read the same files.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.cond import Cond, take
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.sample import Sampler
from fewstep.core.state import load_tensors, save_tensors
from fewstep.errors import InputError


@torch.no_grad()
def pictures_of(generator: Generator, sampler: Sampler, ids: Tensor, *, seed: int, cond: Cond | None = None) -> Tensor:
    """(B, C, H, W) in [-1, 1] on the CPU: the pictures ``ids`` (B,) of ``seed``, those of :meth:`Generator.sample`.

    ``cond`` has a row for each id; None draws conditions by each picture's own seed.

    Raises:
        InputError: pictures that are not finite, or conditions that the generator cannot take.
    """
    noise = Noise.of(seed, ids, generator.device)
    conds = generator.conditions(cond, noise)
    x = generator.start_std(sampler) * noise.normal(generator.denoiser.shape, "start")
    x = sampler(generator.denoiser, x, conds, noise=noise.fold("sampler"))
    pictures = generator.decode(x, sampler.end).float().cpu()
    wrong = (~pictures.flatten(1).isfinite().all(1)).nonzero()
    if len(wrong):
        raise InputError(
            f"{len(wrong)} of {len(ids)} pictures are not finite, the first is number {int(ids[wrong[0]])}: "
            f"mend the generator or choose another sampler"
        )
    return pictures.clamp_(-1, 1)


@dataclass(frozen=True)
class Shards:
    """``n`` pictures of ``seed`` in files of ``batch`` pictures each; iterating gives the batches in order.

    Attributes:
        folder: where the files are.
        n: how many pictures.
        seed: of the pictures.
        batch: pictures in a file, and in one call of the sampler.
    """

    folder: Path
    n: int
    seed: int
    batch: int

    def __len__(self) -> int:
        return -(-self.n // self.batch)

    def ids(self, shard: int) -> Tensor:
        """(B,) int64: the numbers of the pictures in one file."""
        return torch.arange(shard * self.batch, min(self.n, (shard + 1) * self.batch))

    def place(self, shard: int) -> Path:
        """The file of one shard."""
        return self.folder / f"shard-{shard:06d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that have no file yet."""
        return [i for i in range(len(self)) if not self.place(i).is_file()]

    def fill(
        self, generator: Generator, sampler: Sampler, *, cond: Cond | None = None, rank: int = 0, world: int = 1
    ) -> int:
        """Makes what is missing, of every ``world`` missing shards one. Returns how many this call made.

        ``cond`` has a row for each of the ``n`` pictures; None draws them.

        Raises:
            InputError: see :func:`pictures_of`, or a folder that cannot be written.
        """
        own = [i for i in range(rank, len(self), world) if not self.place(i).is_file()]
        if own:
            # What a machine does only once must not count as the sampler's time.
            first = self.ids(own[0])[:8]
            pictures_of(generator, sampler, first, seed=self.seed, cond=_rows(cond, first))
        for shard in own:
            ids = self.ids(shard)
            clock = time.perf_counter()
            made = pictures_of(generator, sampler, ids, seed=self.seed, cond=_rows(cond, ids))
            seconds = torch.tensor(time.perf_counter() - clock, dtype=torch.float64)
            save_tensors(self.place(shard), {"pictures": made, "seconds": seconds})
        return len(own)

    def read(self, shard: int) -> tuple[Tensor, float]:
        """Pictures and the seconds that they took.

        Raises:
            InputError: no such file, or one that holds something else.
        """
        held, expected = load_tensors(self.place(shard)), len(self.ids(shard))
        if set(held) != {"pictures", "seconds"} or len(held["pictures"]) != expected:
            raise InputError(
                f"{self.place(shard)} does not hold {expected} pictures: delete it and go on with --resume"
            )
        return held["pictures"], float(held["seconds"])

    def __iter__(self) -> Iterator[Tensor]:
        return (self.read(i)[0] for i in range(len(self)))

    def first(self, count: int) -> Tensor:
        """The first ``count`` pictures, or all where there are fewer."""
        files = range(min(len(self), -(-count // self.batch)))
        return torch.cat([self.read(i)[0] for i in files])[:count]

    def seconds(self) -> tuple[float, float]:
        """Seconds of all pictures, and seconds per picture of the fastest full shard.

        The fastest one is the least disturbed by whatever else the machine did.
        """
        times = [self.read(i)[1] for i in range(len(self))]
        sizes = [len(self.ids(i)) for i in range(len(self))]
        return sum(times), min(t / s for t, s in zip(times, sizes, strict=True) if s == max(sizes))

    def delete(self) -> None:
        """Removes the files; scores and a few pictures are kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _rows(cond: Cond | None, ids: Tensor) -> Cond | None:
    return None if cond is None else take(cond, ids)


class Opens(Protocol):
    """Opens a generator and its sampler in another process; picklable, such as the flags of a command."""

    def opened(self, rank: int) -> tuple[Generator, Sampler, Cond | None]:
        """For process ``rank``: generator, sampler, and the conditions of all pictures, or None to draw them."""
        ...


def fill_with(opens: Opens, shards: Shards, processes: int) -> None:
    """:meth:`Shards.fill` by several processes of this machine, each of which opens the generator for itself.

    Raises:
        InputError: what one of them refused; the files that are there by then stay.
    """
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(_work, opens, shards, rank, processes) for rank in range(processes)]:
            job.result()


def _work(opens: Opens, shards: Shards, rank: int, world: int) -> int:
    generator, sampler, cond = opens.opened(rank)
    return shards.fill(generator, sampler, cond=cond, rank=rank, world=world)
