"""Pairs of a noise and the picture that a teacher's ODE makes of it: on disk, memory-mapped, or made when asked for.

Pair ``i`` of a seed is a function of (seed, i) and the teacher. Its noise is keyed too, and so never stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fewstep.core import distributed
from fewstep.core.cond import Batch, Classes, take
from fewstep.core.denoiser import Denoiser, Wrapper, end_scale
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise, whole
from fewstep.core.pipeline import Conditions
from fewstep.core.sample import Sampler
from fewstep.core.state import Run, read_json, write_text
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.core.tableau import Tableau
from fewstep.data.base import LoadReport, check_ids, deviation, fingerprint
from fewstep.data.shards import digest_of, is_whole, mapped, shard_name, write_shard
from fewstep.errors import InputError, unknown

FILE, FORMAT, SAMPLER = "pairs.json", "fewstep-pairs/1", "sampler"
# What `Data` says of pictures; latents may have more dimensions.
Shape = tuple[int, int, int]
Stored = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def source_of(seed: int, ids: Tensor, device: torch.device | str = "cpu") -> Noise:
    """The noise sources of the pairs ``ids`` (B,): none that ``Generator.sample`` uses, whatever its seed."""
    return Noise.of(seed, ids, device).fold("pairs")


class _Paired:
    """What both kinds of pairs are: :class:`fewstep.data.Data` whose batches hold the noise beside the picture."""

    name: str
    shape: tuple[int, int, int]
    seed: int
    facts: Mapping[str, Any]

    @property
    def conds(self) -> Conditions | None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def take(self, ids: Tensor) -> Batch:
        raise NotImplementedError

    @property
    def frequencies(self) -> list[float]:
        """The share of each class; empty without classes."""
        conds = self.conds
        if not isinstance(conds, Classes):
            return []
        return [f / sum(conds.frequencies) for f in conds.frequencies]

    @property
    def classes(self) -> int:
        """Number of classes; 0 without."""
        return len(self.frequencies)

    @cached_property
    def std(self) -> float:
        """Root mean square deviation of the pictures or latents from their mean."""
        return deviation(self)

    @property
    def report(self) -> LoadReport:
        """All of them."""
        return LoadReport(len(self))

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what made them."""
        return fingerprint(dict(self.facts), [])  # type: ignore[arg-type]

    def noise(self, ids: Tensor) -> Tensor:
        """The unit noise (B, *shape) that the pairs ``ids`` were made from."""
        return source_of(self.seed, ids).normal(self.shape, "start") if len(ids) else torch.empty(0, *self.shape)

    def require(self, teacher: Generator) -> Any:
        """The pairs, after a check that ``teacher`` made them; they know its conditions then.

        Raises:
            InputError: another teacher did, or this one under another guidance.
        """
        made, own = self.facts["teacher"], teacher.fingerprint()
        if made != own or tuple(self.shape) != tuple(teacher.denoiser.shape):
            mine, its = guidance_of(teacher.denoiser), float(self.facts["guidance"])
            raise InputError(
                f"{self.name}: pairs on disk made by another teacher: fingerprint {made} with guidance {its:g} and "
                f"shape {tuple(self.shape)}, this teacher is {own} with guidance {mine:g} and shape "
                f"{tuple(teacher.denoiser.shape)}: make pairs of this one with `fewstep pairs`"
            )
        return self


class Pairs(_Paired):
    """Pairs from a folder that :func:`make_pairs` filled.

    Shards are mapped into memory when first touched, and only the rows that are taken are read. ``take`` gives
    ``Batch(x, cond, noise)``: what the sampler ended with (latents of a latent teacher), the conditions, and the unit
    noise it began with. ``conds`` draws conditions that were not stored, see :meth:`require`.

    Raises:
        InputError: no such folder, an unfinished one, or missing or shortened shards.
    """

    def __init__(self, folder: str | Path, conds: Conditions | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / FILE).is_file():
            begun = (self.folder / "recipe.json").is_file()
            todo = "they are unfinished, go on with --resume" if begun else "make some with `fewstep pairs`"
            raise InputError(f"{folder} holds no pairs (no {FILE}): {todo}")
        body = read_json(self.folder / FILE)
        if body.get("format") != FORMAT:
            raise InputError(f"{self.folder / FILE} has format {body.get('format')!r}, expected {FORMAT!r}")
        try:
            self.facts: Mapping[str, Any] = body["facts"]
            self.digests = [str(d) for d in body["shards"]]
            self.shape = cast(Shape, tuple(int(s) for s in self.facts["shape"]))
            self.seed, self.size, self.shard = (int(self.facts[k]) for k in ("seed", "n", "shard"))
            classes = self.facts["classes"]
            labelled = classes and Classes(tuple(classes["frequencies"]), tuple(classes["names"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder / FILE} is damaged: it lacks or garbles {error}") from None
        self._conds: Conditions | None = labelled or conds
        self.name = str(self.folder)
        self._maps: dict[int, dict[str, Tensor]] = {}
        for k in range(len(self.digests)):
            if not (self.folder / shard_name(k)).is_file():
                raise InputError(f"{self.folder / shard_name(k)} is missing: make the pairs again with --resume")

    @property
    def conds(self) -> Conditions | None:
        """Where the conditions came from, if known."""
        return self._conds

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what made them and of every shard's content."""
        return fingerprint([dict(self.facts), self.digests], [])

    def __len__(self) -> int:
        return self.size

    def require(self, teacher: Generator) -> Pairs:
        """See :meth:`_Paired.require`; conditions that were not stored are drawn from the teacher's from now on."""
        super().require(teacher)
        self._conds = self._conds or teacher.conds
        return self

    def take(self, ids: Tensor) -> Batch:
        """The pairs ``ids`` (B,) int64: x and noise float32 (B, *shape).

        Raises:
            InputError: ids out of range, a damaged shard, or conditions that were not stored and cannot be drawn.
        """
        check_ids(self.name, ids, len(self))
        parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        shards, places = ids // self.shard, ids % self.shard
        order = shards.argsort(stable=True)
        # One read per shard that is touched, not one per sample.
        found, counts = shards[order].unique_consecutive(return_counts=True)
        for k, rows in zip(found.tolist(), order.split(counts.tolist()), strict=True):
            parts.append((rows, take(self._map(k), places[rows])))
        names = parts[0][1] if parts else {}
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        held = {name: torch.cat([part[name] for _, part in parts])[back] for name in names}
        x = held.pop("x", torch.empty(0, *self.shape)).float()
        cond = {name.removeprefix("cond."): value for name, value in held.items()}
        if not self.facts["conditions"]:
            cond = self._drawn(ids)
        return Batch(x, cond, self.noise(ids))

    def _drawn(self, ids: Tensor) -> dict[str, Tensor]:
        if self._conds is None:
            raise InputError(
                f"{self.name}: the conditions of these pairs were not stored: call require(teacher), or make them anew "
                "with --store-conditions"
            )
        return self._conds.draw(source_of(self.seed, ids))

    def _map(self, k: int) -> dict[str, Tensor]:
        # Two threads may map a shard at once; either result is right.
        if k not in self._maps:
            self._maps[k] = mapped(self.folder / shard_name(k))
        return self._maps[k]


class OnlinePairs(_Paired):
    """Pairs that ``take`` makes by running the teacher: nothing on disk, new ones in every epoch's worth of ``size``.

    ``sampler`` is the teacher's own without one; ``batch`` is the most that run at once.

    Raises:
        InputError: bad numbers, or a teacher without a fingerprint.
    """

    def __init__(
        self, teacher: Generator, sampler: Sampler | None = None, *, seed: int = 0, size: int = 2**20, batch: int = 256
    ) -> None:
        if whole("size", size) < 1 or whole("batch", batch) < 1:
            raise InputError(f"online pairs need size >= 1 and batch >= 1, got {size} and {batch}")
        self.teacher, self.sampler = teacher, teacher.sampler if sampler is None else sampler
        self.shape = cast(Shape, tuple(teacher.denoiser.shape))
        self.seed, self.size, self.batch = whole("seed", seed), size, batch
        self.facts = {**_facts(teacher, self.sampler, self.seed), "n": size}
        self.name = "online pairs"

    @property
    def conds(self) -> Conditions | None:
        """The teacher's."""
        return self.teacher.conds

    def __len__(self) -> int:
        return self.size

    def take(self, ids: Tensor) -> Batch:
        """The pairs ``ids`` (B,) int64, on the teacher's device. Raises InputError for ids out of range."""
        check_ids(self.name, ids, len(self))
        parts = [pairs_of(self.teacher, self.sampler, self.seed, some) for some in ids.split(self.batch)]
        if not parts:
            return Batch(torch.empty(0, *self.shape), {}, torch.empty(0, *self.shape))
        conds = {name: torch.cat([p.cond[name] for p in parts]) for name in parts[0].cond}
        return Batch(torch.cat([_known(p.x) for p in parts]), conds, torch.cat([_known(p.noise) for p in parts]))


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


@torch.no_grad()
def pairs_of(teacher: Generator, sampler: Sampler, seed: int, ids: Tensor) -> Batch:
    """The pairs ``ids`` (B,) of a teacher, made now on its device; x is what the codec, if any, would decode.

    Raises:
        InputError: pictures that are not finite.
    """
    noise = source_of(seed, ids, teacher.device)
    cond = teacher.conditions(None, noise)
    n = noise.normal(teacher.denoiser.shape, "start")
    x = sampler(teacher.denoiser, teacher.start_std(sampler) * n, cond, noise=noise.fold("sampler"))
    scale = end_scale(teacher.denoiser, sampler.end)
    x = x if scale == 1 else x * scale
    wrong = (~x.flatten(1).isfinite().all(1)).nonzero()
    if len(wrong):
        raise InputError(f"{len(wrong)} of {len(x)} pairs are not finite, the first is number {int(ids[wrong[0, 0]])}")
    return Batch(x, cond, n)


def make_pairs(
    teacher: Generator,
    out: str | Path,
    *,
    n: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch: int = 256,
    shard: int = 4096,
    dtype: Stored = "float32",
    store_conditions: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    recipe: Mapping[str, Any] | None = None,
) -> Pairs:
    """Makes ``n`` pairs of ``teacher`` with ``sampler`` (its own without one) in the folder ``out``, and opens them.

    ``shard`` pairs share a file, which is written whole or not at all. With ``resume`` a broken run makes what is
    missing, to the same bytes. ``dtype`` is that of the stored pictures or latents. Text conditions are far larger than
    latents: without ``store_conditions`` they are drawn anew when pairs are taken, from the teacher's own. Under
    torchrun the processes share the shards. A sampler that adds noise makes no ODE pairs and is refused.

    Raises:
        InputError: bad numbers, a sampler with noise, an ``out`` that holds something else, or a full disk.
    """
    use = teacher.sampler if sampler is None else sampler
    for name, value in (("n", n), ("batch", batch), ("shard", shard)):
        if whole(name, value) < 1:
            raise InputError(f"pairs need {name} >= 1, got {value}")
    if dtype not in DTYPES:
        raise unknown("dtype of pairs", dtype, DTYPES)
    if getattr(use, "noisy", False):
        raise InputError(
            f"sampler {getattr(use, 'name', use)!r} adds noise on its way, so that the picture is no function of the "
            "first noise: take one of the ODE, such as --sampler heun"
        )
    folder = Path(out)
    facts = {**_facts(teacher, use, whole("seed", seed)), "n": n, "shard": shard, "batch": batch, "dtype": dtype}
    facts["conditions"] = store_conditions
    distributed.start(teacher.device)
    first = distributed.rank() == 0
    if first:
        Run.open(folder, {**(recipe or {}), "pairs": facts}, resume=resume, overwrite=overwrite)
        save_sampler(use, folder / SAMPLER)
    distributed.barrier()
    todo = range(distributed.rank(), math.ceil(n / shard), distributed.world())
    for k in _bar(todo, progress and first):
        if not is_whole(folder / shard_name(k)):
            _make_shard(teacher, use, folder / shard_name(k), torch.arange(k * shard, min(n, (k + 1) * shard)), facts)
    distributed.barrier()
    if first:
        digests = [digest_of(folder / shard_name(k)) for k in range(math.ceil(n / shard))]
        # Last, because a folder counts as pairs once this file is there.
        write_text(folder / FILE, json.dumps({"format": FORMAT, "facts": facts, "shards": digests}, indent=2) + "\n")
    distributed.barrier()
    return Pairs(folder, teacher.conds)


def require_pairs(data: Any, teacher: Generator, method: str) -> Pairs | OnlinePairs:
    """``data``, if it is pairs that ``teacher`` made.

    Raises:
        InputError: ordinary pictures, nothing, or pairs of another teacher; says how to make pairs.
    """
    if not isinstance(data, _Paired):
        got = "nothing" if data is None else f"{getattr(data, 'name', type(data).__name__)!r}, which has pictures alone"
        raise InputError(
            f"{method} learns from pairs of a noise and the teacher's picture, and got {got}: make them with "
            "`fewstep pairs TEACHER --out FOLDER` and pass --data FOLDER"
        )
    found: Pairs | OnlinePairs = data.require(teacher)
    return found


def sampler_of(folder: str | Path) -> Sampler:
    """The sampler that the pairs of a folder were made with. Raises InputError where there is none."""
    return load_sampler(Path(folder) / SAMPLER)


def guidance_of(D: Denoiser) -> float:
    """The product of the guidance scales around a denoiser; 1 without guidance."""
    scale = 1.0
    while isinstance(D, Wrapper):
        scale *= float(getattr(D, "scale", 1.0))
        D = D.denoiser
    return scale


def _facts(teacher: Generator, sampler: Sampler, seed: int) -> dict[str, Any]:
    """JSON-able: what decides the content of pairs."""
    table = sha256(sampler.to_json().encode()).hexdigest()[:16] if isinstance(sampler, Tableau) else None
    conds = teacher.conds
    return {
        "teacher": teacher.fingerprint(),
        "guidance": guidance_of(teacher.denoiser),
        "sampler": {"name": str(getattr(sampler, "name", type(sampler).__name__)), "nfe": sampler.nfe, "table": table},
        "seed": seed,
        "shape": list(teacher.denoiser.shape),
        "classes": json.loads(json.dumps(asdict(conds))) if isinstance(conds, Classes) else None,
    }


def _make_shard(teacher: Generator, sampler: Sampler, file: Path, ids: Tensor, facts: Mapping[str, Any]) -> None:
    parts = [pairs_of(teacher, sampler, facts["seed"], some) for some in ids.split(facts["batch"])]
    held = {"x": torch.cat([_known(p.x).to("cpu", DTYPES[facts["dtype"]]) for p in parts])}
    if facts["conditions"]:
        held |= {f"cond.{name}": torch.cat([p.cond[name].cpu() for p in parts]) for name in parts[0].cond}
    write_shard(file, held)


def _bar(shards: range, shown: bool) -> Iterable[int]:
    """The shards, with a live bar over them: done, time left."""
    if not shown:
        return shards
    from rich.console import Console
    from rich.progress import track

    return track(shards, "making pairs", console=Console(stderr=True))
