"""The proof of an export: the folder is opened where fewstep cannot be imported, and its pictures are compared."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.state import load_tensors, read_json
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.export.calls import Call


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
        super().__init__(torch.zeros(count, dtype=torch.int64))
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
    folder: Path,
    call: Call,
    *,
    network: str,
    remote_code: bool,
    table: Tableau,
    expected: Sequence[float],
    snippet: str | None = None,
    keep: Path | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    timeout: float = 3600.0,
) -> Verified:
    """Compares the pictures of an exported ``folder`` with fewstep's own from the same random draws.

    ``table`` is what the exported scheduler does, as fewstep runs it; ``expected`` the times that the network should be
    asked about. ``snippet`` is also executed there, and its picture kept as ``keep``.

    Raises:
        InputError: the folder does not open or run, or pictures or times differ; the message holds both grids.
    """
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        request = {
            "folder": str(folder),
            "out": str(out),
            "seed": seed,
            "call": call.arguments,
            "network": network,
            "remote_code": remote_code,
            "snippet": snippet,
        }
        (out / "request.json").write_text(json.dumps(request))
        _run(out / "request.json", timeout)
        tensors, facts = load_tensors(out / "pictures.safetensors"), read_json(out / "facts.json")
        if keep is not None and (out / "snippet.png").is_file():
            keep.write_bytes((out / "snippet.png").read_bytes())
    theirs = tensors.pop("pictures")
    draws = [tensors[name] for name in sorted(tensors)]
    ours = replayed(generator, table, call, draws)
    difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else math.inf
    found = Verified(difference, facts["class"], tuple(facts["timesteps"]), tuple(facts["asked"]))
    wrong = len(found.asked) != len(expected) or any(
        abs(a - b) > 1e-3 * max(1.0, abs(b)) for a, b in zip(found.asked, expected, strict=True)
    )
    if wrong or not difference <= tolerance:
        raise InputError(
            f"the exported pipeline in {folder} does not make fewstep's pictures: they differ by {difference:.2g} "
            f"(allowed {tolerance:g}); {_grids(table, expected, found)}"
        )
    return found


@torch.no_grad()
def replayed(generator: Generator, table: Tableau, call: Call, draws: Sequence[Tensor]) -> Tensor:
    """Fewstep's pictures (B, C, H, W) in [0, 1] from recorded draws: the first is the start."""
    if not draws:
        raise InputError("the exported pipeline drew no noise to start from")
    device = generator.device
    x = generator.start_std(table) * draws[0][: call.count].reshape(call.count, *generator.denoiser.shape).to(device)
    noise = Replayed(draws[1:], call.count, table.meta.get("traced", {}).get("draws", {}))
    cond = {k: v.to(device) for k, v in call.cond.items()}
    x = table(generator.denoiser, x, cond, noise=noise)
    return (generator.decode(x, table.end).float().cpu().clamp(-1, 1) + 1) / 2


def _run(request: Path, timeout: float) -> None:
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
        raise InputError(f"the exported pipeline did not finish within {timeout:g} s in a process of its own") from None
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise InputError(f"the exported pipeline does not run where fewstep is not installed: {last}")


def _grids(table: Tableau, expected: Sequence[float], found: Verified) -> str:
    """Both grids side by side."""
    levels = [s for s in table.sigmas.tolist() if not math.isnan(s)]
    rows = [f"{s:.4g} -> {t:.6g}" for s, t in zip(levels, expected, strict=False)]
    return (
        f"fewstep's grid (sigma -> time): {', '.join(rows)}; {found.scheduler} asked the network at "
        f"{', '.join(f'{t:.6g}' for t in found.asked)}"
    )
