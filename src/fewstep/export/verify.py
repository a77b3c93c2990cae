"""The proof of an export: the folder is opened where fewstep cannot be imported, and its pictures are compared."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.state import load_tensors, read_json
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.export.calls import Call


class PictureDifference(InputError):
    """Pictures or times of an export that are not fewstep's; ``table`` is both grids, a line for each evaluation."""

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


@dataclass(frozen=True)
class Opened:
    """How the fresh process opens what is checked.

    Attributes:
        folder: of the pipeline; for a LoRA that of its base.
        network: the component that is the network.
        remote_code: whether the folder's own code has to be trusted.
        lora: folder of a LoRA with its scheduler, and the scheduler's class; None for a whole pipeline.
        options: further keyword arguments of ``from_pretrained``.
    """

    folder: Path
    network: str
    remote_code: bool = False
    lora: tuple[Path, str] | None = None
    options: Mapping[str, str | None] = field(default_factory=dict)

    def request(self) -> dict[str, object]:
        """JSON-able, for the process."""
        lora = None if self.lora is None else {"folder": str(self.lora[0]), "scheduler": self.lora[1]}
        return {
            "folder": str(self.folder),
            "network": self.network,
            "remote_code": self.remote_code,
            "lora": lora,
            "options": dict(self.options),
        }


@dataclass(frozen=True)
class Verified:
    """What the fresh process saw.

    Attributes:
        difference: largest difference of any pixel in [0, 1].
        scheduler: the class that the pipeline used.
        timesteps: its grid.
        asked: the times that the network was asked about, one per evaluation.
    """

    difference: float
    scheduler: str
    timesteps: tuple[float, ...]
    asked: tuple[float, ...]


class Replayed(Noise):
    """Noise that gives back recorded draws, in order, or the mixtures of them that a traced table asks for."""

    def __init__(self, draws: Sequence[Tensor], count: int, mixes: Mapping[str, Mapping[str, float]]) -> None:
        device = draws[0].device if draws else torch.device("cpu")
        super().__init__(torch.zeros(count, dtype=torch.int64, device=device))
        object.__setattr__(self, "draws", [d[:count] for d in draws])
        object.__setattr__(self, "mixes", mixes)
        object.__setattr__(self, "used", [])

    def normal(self, shape: Sequence[int], *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """See :meth:`Noise.normal`; ``key`` ends with the row."""
        draws: list[Tensor] = self.__dict__["draws"]
        mix = self.__dict__["mixes"].get(str(key[-1]))
        if mix is None:
            used: list[int] = self.__dict__["used"]
            used.append(len(used))
            mix = {str(used[-1]): 1.0}
        if max(int(i) for i in mix) >= len(draws):
            raise InputError(f"the exported scheduler drew {len(draws)} noises and the sampler needs more")
        mixed = sum(weight * draws[int(i)].to(dtype) for i, weight in mix.items())
        assert isinstance(mixed, Tensor)
        return mixed.reshape(len(self), *shape)


def verify(
    generator: Generator,
    opened: Opened,
    call: Call,
    *,
    table: Tableau,
    expected: Sequence[float],
    name: str | None = None,
    snippet: str | None = None,
    keep: Path | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    timeout: float = 3600.0,
) -> Verified:
    """Compares the pictures of an exported pipeline with fewstep's own from the same random draws.

    Both are made on the generator's device, in float32. ``table`` is what the exported scheduler does, as fewstep runs
    it; ``expected`` the times that the network should be told, one for each evaluation. ``name`` is what the export is
    called in errors. ``snippet`` is also executed there, and its picture kept as ``keep``.

    Raises:
        PictureDifference: pictures or times differ; the message holds both grids.
        InputError: the folder does not open or run.
    """
    name = str(opened.folder) if name is None else name
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        request = {
            **opened.request(),
            "out": str(out),
            "seed": seed,
            "call": call.arguments,
            "device": str(generator.device),
            "snippet": snippet,
        }
        (out / "request.json").write_text(json.dumps(request))
        _run(out / "request.json", name, timeout)
        tensors, facts = load_tensors(out / "pictures.safetensors"), read_json(out / "facts.json")
        if keep is not None and (out / "snippet.png").is_file():
            keep.write_bytes((out / "snippet.png").read_bytes())
    theirs = tensors.pop("pictures")
    draws = [tensors[name] for name in sorted(tensors)]
    with _all_digits():
        ours = replayed(generator, table, call, draws)
    difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else math.inf
    found = Verified(difference, facts["class"], tuple(facts["timesteps"]), tuple(facts["asked"]))
    times = [t for t in expected for _ in range(call.passes)]
    wrong = len(found.asked) != len(times) or any(
        abs(a - b) > 1e-3 * max(1.0, abs(b)) for a, b in zip(found.asked, times, strict=True)
    )
    if wrong or not difference <= tolerance:
        raise PictureDifference(
            f"the exported pipeline {name} does not make fewstep's pictures: they differ by {difference:.2g} "
            f"(allowed {tolerance:g}); {_grids(table, times, found, call.passes)}",
            _lines(table, times, found, call.passes),
        )
    return found


@torch.no_grad()
def replayed(generator: Generator, table: Tableau, call: Call, draws: Sequence[Tensor]) -> Tensor:
    """Fewstep's pictures (B, C, H, W) in [0, 1] from recorded draws: the first is the start.

    Raises:
        InputError: nothing was drawn, or less than the table needs.
    """
    if not draws:
        raise InputError("the exported pipeline drew no noise to start from")
    device = generator.device
    draws = [d.to(device) for d in draws]
    x = generator.start_std(table) * draws[0][: call.count].reshape(call.count, *generator.denoiser.shape)
    noise = Replayed(draws[1:], call.count, table.meta.get("traced", {}).get("draws", {}))
    cond = {k: v.to(device) for k, v in call.conditions(generator).items()}
    x = table(generator.denoiser, x, cond, noise=noise)
    return (generator.decode(x, table.end).float().cpu().clamp(-1, 1) + 1) / 2


@contextmanager
def _all_digits() -> Iterator[None]:
    """Products in full float32, as in the fresh process: on some devices they are not by default."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _run(request: Path, name: str, timeout: float) -> None:
    script = Path(__file__).with_name("fresh.py")
    # Offline, because whatever an export needs must be in it.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    # Code that a folder brings is copied before it runs: not to where other folders' code of this name lies.
    environment["HF_MODULES_CACHE"] = str(request.with_name("modules"))
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(script), str(request)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"the exported pipeline {name} did not finish within {timeout:g} s in a process of its own"
        ) from None
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise InputError(f"the exported pipeline {name} does not run where fewstep is not installed: {last}")


def _rows(table: Tableau, times: Sequence[float], found: Verified, passes: int) -> list[tuple[str, str, str]]:
    """Sigma, the time that belongs to it and the one that was asked, for every call of the network; - for none."""
    levels = [s for s in table.sigmas.tolist() if not math.isnan(s) for _ in range(passes)]
    return [
        (
            f"{s:.4g}" if s is not None else "-",
            f"{t:.6g}" if t is not None else "-",
            f"{a:.6g}" if a is not None else "-",
        )
        for s, t, a in zip_longest(levels, times, found.asked)
    ]


def _grids(table: Tableau, times: Sequence[float], found: Verified, passes: int) -> str:
    """Both grids, on one line."""
    rows = _rows(table, times, found, passes)
    own = ", ".join(f"{s} -> {t}" for s, t, _ in rows if t != "-")
    asked = ", ".join(a for *_, a in rows if a != "-")
    return f"fewstep's grid (sigma -> time): {own}; {found.scheduler} asked the network at {asked}"


def _lines(table: Tableau, times: Sequence[float], found: Verified, passes: int) -> str:
    """Both grids, a line for each call of the network."""
    rows = [("sigma", "time", f"asked by {found.scheduler}"), *_rows(table, times, found, passes)]
    return "\n".join(f"{s:>10}  {t:>10}  {a}" for s, t, a in rows)
