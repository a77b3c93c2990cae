"""What people hold: a denoiser with the sampler it is meant to be used with, as a folder that others can open."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.core.cond import Classes, Cond, take
from fewstep.core.denoiser import Denoiser, Precond, Wrapper, build_precond, module_of
from fewstep.core.noise import Noise
from fewstep.core.sample import OnStep, Sampler
from fewstep.core.state import load_tensors, load_weights, read_json, save_tensors, write_text
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError

CONFIG, WEIGHTS, SAMPLER = "fewstep.json", "student.safetensors", "sampler.json"
# Of a sampler that is no table.
SAMPLER_FOLDER = "sampler"
FORMAT = "fewstep-generator/1"


class Codec(Protocol):
    """A latent space: ``decode`` turns latents into pictures in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, ...) -> pictures (B, C, H, W)."""
        ...


@dataclass
class Generator:
    """A denoiser and how to use it.

    Attributes:
        denoiser: see :class:`fewstep.core.denoiser.Denoiser`.
        sampler: the default sampler.
        codec: decodes latents; None for pixel models.
        conds: where conditions come from when none are given; None for unconditional models.
        card: JSON-able facts about it: how it was made and what was measured.
    """

    denoiser: Denoiser
    sampler: Sampler
    codec: Codec | None = None
    conds: Classes | None = None
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        module = module_of(self.denoiser)
        return torch.device("cpu") if module is None else next(module.parameters()).device

    @property
    def network(self) -> torch.nn.Module:
        """The denoiser as a module, to be trained or copied.

        Raises:
            InputError: the denoiser is a plain function or object.
        """
        if not isinstance(self.denoiser, torch.nn.Module):
            raise InputError(f"{type(self.denoiser).__name__} has no weights to train: expected a torch module")
        return self.denoiser

    def to(self, device: str | torch.device) -> Generator:
        """Moves the network in place; returns the generator.

        Raises:
            InputError: there is no such device here.
        """
        place, module = check_device(device), module_of(self.denoiser)
        if module is not None:
            module.to(place)
        return self

    def conditions(self, cond: Cond | None, noise: Noise) -> dict[str, Tensor]:
        """The conditions of the samples of ``noise``: those given, checked, or drawn by each sample's own seed."""
        device = noise.seeds.device
        if not cond:
            return {} if self.conds is None else self.conds.draw(noise)
        if self.conds is None:
            raise InputError(f"this generator is unconditional: it cannot take {sorted(cond)}")
        self.conds.check(cond)
        return {k: v.to(device) for k, v in cond.items()}

    @torch.no_grad()
    def sample(
        self,
        n: int | None = None,
        cond: Cond | None = None,
        *,
        seed: int | Sequence[int] = 0,
        sampler: Sampler | None = None,
        batch: int = 256,
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """``n`` pictures (n, C, H, W) in [-1, 1], float32 on the CPU.

        Picture i is a function of (seed, i) alone: any ``batch`` gives the same. A sequence of seeds gives each
        picture its own. Without ``n`` there are as many as conditions or seeds, or one.

        Raises:
            InputError: counts that do not agree, n < 1, a label out of range, or pictures that are not finite.
        """
        count = _count(n, cond, seed)
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        noise = Noise.of(seed, count, self.device)
        conds = self.conditions(cond, noise)
        use = self.sampler if sampler is None else sampler
        parts = []
        for i in _bar(range(0, count, batch), progress and count > batch):
            own, rows = noise[i : i + batch], slice(i, i + batch)
            x = use.start * own.normal(self.denoiser.shape, "start")
            x = use(self.denoiser, x, take(conds, rows), noise=own.fold("sampler"), on_step=on_step)
            parts.append((x if self.codec is None else self.codec.decode(x)).float().cpu())
        pictures = torch.cat(parts)
        wrong = (~pictures.flatten(1).isfinite().all(1)).nonzero()
        if len(wrong):
            raise InputError(f"{len(wrong)} of {count} pictures are not finite, the first is number {int(wrong[0])}")
        return pictures.clamp_(-1, 1)

    def with_sampler(self, sampler: Sampler) -> Generator:
        """The same network with another default sampler."""
        return replace(self, sampler=sampler)

    def fingerprint(self) -> str:
        """16 hex digits of the weights and the description: which network a fitted sampler belongs to."""
        module = module_of(self.denoiser)
        if not isinstance(module, Precond) or not isinstance(self.denoiser, Precond | Wrapper):
            raise InputError(f"{type(self.denoiser).__name__} has no fingerprint: only a Precond's weights can be read")
        digest = sha256(json.dumps(self.denoiser.describe(), sort_keys=True).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> Path:
        """Writes ``fewstep.json``, ``student.safetensors`` and ``sampler.json``, each whole or not at all.

        Raises:
            InputError: a network, codec or sampler without a description, or a place that cannot be written.
        """
        folder = Path(folder)
        if not isinstance(self.denoiser, Precond) or self.codec is not None:
            raise InputError("only a Precond without a codec can be saved as a fewstep folder")
        body = {
            "format": FORMAT,
            "denoiser": self.denoiser.describe(),
            "classes": None if self.conds is None else asdict(self.conds),
            "card": self.card,
        }
        # The sampler first, because it may be of a kind that cannot be stored.
        if isinstance(self.sampler, Tableau):
            save_sampler(self.sampler, folder / SAMPLER)
        else:
            save_sampler(self.sampler, folder / SAMPLER_FOLDER)
            (folder / SAMPLER).unlink(missing_ok=True)
        save_tensors(folder / WEIGHTS, self.denoiser.state_dict())
        # Last, because a folder counts as a generator once this file is there.
        write_text(folder / CONFIG, json.dumps(body, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Generator:
        """Opens what :meth:`save` wrote. Nothing in the folder is executed.

        Raises:
            InputError: not such a folder, damaged weights, weights of another architecture, or no such device.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise InputError(f"{folder} is not a fewstep generator: it has no {CONFIG}")
        body = read_json(folder / CONFIG)
        if body.get("format") != FORMAT:
            raise InputError(f"{folder / CONFIG} has format {body.get('format')!r}, expected {FORMAT!r}")
        here = check_device(device)
        try:
            denoiser = build_precond(body["denoiser"]).to(here)
            classes = body.get("classes")
            conds = None if classes is None else Classes(tuple(classes["frequencies"]), tuple(classes["names"]))
            place = folder / SAMPLER if (folder / SAMPLER).is_file() else folder / SAMPLER_FOLDER
            if not place.exists():
                raise InputError(f"{folder} is incomplete: it has no {SAMPLER}")
            sampler = load_sampler(place)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder} is damaged: {CONFIG} or {SAMPLER} lacks or garbles {error}") from None
        load_weights(denoiser, load_tensors(folder / WEIGHTS), folder / WEIGHTS)
        denoiser.eval().requires_grad_(False)
        return cls(denoiser, sampler, None, conds, body.get("card", {}))


def load(source: str | Path, *, device: str | torch.device = "cpu") -> Generator:
    """A generator from a fewstep folder.

    Raises:
        InputError: the folder does not exist or holds no generator.
    """
    if not Path(source).exists():
        raise InputError(f"{source} does not exist: pass the folder of a fewstep generator or run")
    return Generator.load(source, device=device)


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        InputError: it does not, or the name means nothing.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}: use cpu, cuda, cuda:1 or mps") from None
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(wanted.type, True):
        raise InputError(f"device {device!r} was asked for and there is none here: use --device cpu")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} does not exist: there are {torch.cuda.device_count()}")
    return wanted


def _count(n: int | None, cond: Cond | None, seed: int | Sequence[int]) -> int:
    said = {"n": n} if n is not None else {}
    said |= {f"cond[{k!r}]": len(v) for k, v in (cond or {}).items()}
    said |= {} if isinstance(seed, int) else {"seed": len(seed)}
    if len(set(said.values())) > 1:
        raise InputError(f"how many pictures? {', '.join(f'{k} says {v}' for k, v in said.items())}")
    count = next(iter(said.values()), 1)
    if count < 1:
        raise InputError(f"the number of pictures must be at least 1, got {count}")
    return count


def _bar(steps: range, shown: bool) -> Any:
    if not shown:
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, "sampling", console=Console(stderr=True), transient=True)
