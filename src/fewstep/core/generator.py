"""What people hold: a denoiser with the sampler it is meant to be used with, as a folder that others can open."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Classes, Cond, take, tensors
from fewstep.core.denoiser import (
    WRAPPERS,
    Denoiser,
    Precond,
    Wrapper,
    build_denoiser,
    end_scale,
    module_of,
    start_std,
    unsaved,
)
from fewstep.core.noise import Noise, Seed, seeds_of, shown, whole
from fewstep.core.pipeline import (
    Codec,
    Conditions,
    Pipeline,
    TextConditions,
    open_conditions,
    open_pipeline,
    stored_conditions,
)
from fewstep.core.sample import OnStep, Sampler
from fewstep.core.state import load_tensors, load_weights, read_json, save_tensors, write_text
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError

CONFIG, WEIGHTS, SAMPLER = "fewstep.json", "student.safetensors", "sampler.json"
# Of a sampler that is no table.
SAMPLER_FOLDER = "sampler"
FORMAT = "fewstep-generator/1"
# Makes a folder a pipeline of diffusers.
PIPELINE_INDEX = "model_index.json"


Prompts = str | Sequence[str]
Exporter = Callable[..., Any]
# Filled by the room that exports; nothing here knows of it.
EXPORTERS: dict[str, Exporter] = {}


@dataclass
class Generator:
    """A denoiser and how to use it.

    Attributes:
        denoiser: see :class:`fewstep.core.denoiser.Denoiser`.
        sampler: the default sampler.
        codec: decodes latents; None for pixel models.
        conds: where conditions come from when none are given; None for unconditional models.
        card: JSON-able facts about it: how it was made and what was measured.
        pipeline: where codec and conditions are found again, such as the folder of a diffusers pipeline.
    """

    denoiser: Denoiser
    sampler: Sampler
    codec: Codec | None = None
    conds: Conditions | None = None
    card: dict[str, Any] = field(default_factory=dict)
    pipeline: Pipeline | None = None

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
        """Moves the network, and what its pipeline has loaded, in place; returns the generator.

        Raises:
            InputError: there is no such device here.
        """
        place, module = check_device(device), module_of(self.denoiser)
        if module is not None:
            module.to(place)
        if self.pipeline is not None:
            self.pipeline.to(place)
        return self

    def encode(self, prompts: Prompts) -> dict[str, Tensor]:
        """The conditions of one or several prompts; the empty one is a prompt too.

        Raises:
            InputError: this generator takes no prompts.
        """
        if not isinstance(self.conds, TextConditions):
            takes = "labels" if self.conds is not None else "no condition"
            raise InputError(f"this generator takes {takes}: it cannot read the prompt {prompts!r}")
        return self.conds.encode([prompts] if isinstance(prompts, str) else list(prompts))

    def conditions(self, cond: Cond | Prompts | None, noise: Noise) -> dict[str, Tensor]:
        """The conditions of the samples of ``noise``: those given, checked, or drawn by each sample's own seed.

        One prompt, or a list of as many as there are samples, is encoded; the empty prompt is one. None, an empty list
        and an empty mapping are drawn for.

        Raises:
            InputError: a condition that the generator cannot take, or nothing to draw from.
        """
        device, given = noise.seeds.device, _given(cond)
        if isinstance(given, list) and given:
            given = self.encode(given * len(noise) if isinstance(cond, str) else given)
        if not given:
            return {} if self.conds is None else self.conds.draw(noise)
        assert isinstance(given, dict)
        if self.conds is None:
            raise InputError(f"this generator is unconditional: it cannot take {sorted(given)}")
        self.conds.check(given)
        return {k: v.to(device) for k, v in given.items()}

    @torch.no_grad()
    def sample(
        self,
        n: int | None = None,
        cond: Cond | Prompts | None = None,
        *,
        seed: Seed = 0,
        sampler: Sampler | None = None,
        batch: int = 256,
        progress: bool = True,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """``n`` pictures (n, C, H, W) in [-1, 1], float32 on the CPU.

        ``cond`` is a condition (lists and arrays of numbers are made tensors), or one prompt for all, or a list of
        prompts where the generator reads them. Picture i
        is a function of (seed, i) alone: any ``batch`` gives the same. A sequence of seeds gives each picture its own.
        Without ``n`` there are as many as conditions or seeds, or one.

        Raises:
            InputError: counts that do not agree or are no whole numbers, n < 1, a label out of range, or pictures that
                are not finite.
        """
        count, batch = _count(n, cond, seed), whole("batch", batch)
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        noise = Noise.of(seed, count, self.device)
        conds = self.conditions(cond, noise)
        use = self.sampler if sampler is None else sampler
        parts = []
        for i in _bar(range(0, count, batch), progress and count > batch):
            own, rows = noise[i : i + batch], slice(i, i + batch)
            x = self.start_std(use) * own.normal(self.denoiser.shape, "start")
            x = use(self.denoiser, x, take(conds, rows), noise=own.fold("sampler"), on_step=on_step)
            parts.append(self.decode(x, use.end).float().cpu())
        pictures = torch.cat(parts)
        wrong = (~pictures.flatten(1).isfinite().all(1)).nonzero()
        if len(wrong):
            raise InputError(f"{len(wrong)} of {count} pictures are not finite, the first is number {int(wrong[0])}")
        return pictures.clamp_(-1, 1)

    def decode(self, x: Tensor, level: float = 0.0) -> Tensor:
        """Pictures (B, C, H, W) from a sampler's result at noise level ``level``; not clamped."""
        scale = end_scale(self.denoiser, level)
        x = x if scale == 1 else x * scale
        return x if self.codec is None else self.codec.decode(x)

    def start_std(self, sampler: Sampler | None = None) -> float:
        """The standard deviation of the noise that ``sampler`` starts from: its own, or the denoiser's at its start."""
        use = self.sampler if sampler is None else sampler
        own = getattr(use, "start_std", None)
        return start_std(self.denoiser, use.start) if own is None else float(own)

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
            InputError: a network, codec or sampler without a description, a folder with a diffusers pipeline in it, or
                a place that cannot be written.
        """
        folder = local(folder)
        module = module_of(self.denoiser)
        if not isinstance(module, Precond) or not isinstance(self.denoiser, Precond | Wrapper):
            raise InputError(f"a {type(self.denoiser).__name__} cannot be saved as a folder: only a Precond can")
        around = unsaved(self.denoiser)
        if around is not None:
            raise InputError(f"a {around} cannot be saved: only {', '.join(WRAPPERS)} around a Precond can")
        own = None if self.pipeline is not None else stored_conditions(self.conds)
        known = own is not None or isinstance(self.conds, Classes | None)
        if self.pipeline is None and not (self.codec is None and known):
            raise InputError(
                "only classes, or the codec and conditions of a pipeline, or image conditions can be saved in a folder"
            )
        if (folder / PIPELINE_INDEX).is_file():
            raise InputError(
                f"{folder} holds a diffusers pipeline ({PIPELINE_INDEX}), which would be opened in place of the "
                "generator: save it in a folder of its own"
            )
        body = {
            "format": FORMAT,
            "denoiser": self.denoiser.describe(),
            "classes": asdict(self.conds) if isinstance(self.conds, Classes) else None,
            "card": self.card,
        }
        if own is not None:
            body["conditions"] = own
        if self.pipeline is not None:
            body["pipeline"] = {"kind": self.pipeline.kind, **self.pipeline.describe()}
        # The sampler first, because it may be of a kind that cannot be stored.
        if isinstance(self.sampler, Tableau):
            save_sampler(self.sampler, folder / SAMPLER)
        else:
            save_sampler(self.sampler, folder / SAMPLER_FOLDER)
            (folder / SAMPLER).unlink(missing_ok=True)
        save_tensors(folder / WEIGHTS, module.state_dict())
        # Last, because a folder counts as a generator once this file is there.
        write_text(folder / CONFIG, json.dumps(body, indent=2) + "\n")
        return folder

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", base: str | Path | None = None
    ) -> Generator:
        """Opens what :meth:`save` wrote. Nothing in the folder is executed.

        ``base`` is where the pipeline around the network is now, if not where it was when the folder was written.

        Raises:
            InputError: not such a folder, damaged weights, weights of another architecture, or no such device.
        """
        folder = local(folder)
        if not (folder / CONFIG).is_file():
            raise InputError(f"{folder} is not a fewstep generator: it has no {CONFIG}")
        body = read_json(folder / CONFIG)
        if body.get("format") != FORMAT:
            raise InputError(f"{folder / CONFIG} has format {body.get('format')!r}, expected {FORMAT!r}")
        here = check_device(device)
        try:
            classes, parts = body.get("classes"), body.get("pipeline")
            if base is not None and parts is None:
                raise InputError(f"{folder} needs nothing around its network: it cannot take base={str(base)!r}")
            moved = {} if base is None else {"source": str(base)}
            around = None if parts is None else open_pipeline({**parts, **moved}, here)
            conds: Conditions | None = None if around is None else around.conds
            if classes is not None:
                conds = Classes(tuple(classes["frequencies"]), tuple(classes["names"]))
            if body.get("conditions") is not None:
                conds = open_conditions(body["conditions"])
            denoiser = build_denoiser(body["denoiser"], conds)
            module = module_of(denoiser)
            assert module is not None
            place = folder / SAMPLER if (folder / SAMPLER).is_file() else folder / SAMPLER_FOLDER
            if not place.exists():
                raise InputError(f"{folder} is incomplete: it has no {SAMPLER}")
            sampler = load_sampler(place)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder} is damaged: {CONFIG} or {SAMPLER} lacks or garbles {error}") from None
        load_weights(module, load_tensors(folder / WEIGHTS), folder / WEIGHTS)
        module.to(here).eval().requires_grad_(False)
        return cls(denoiser, sampler, None if around is None else around.codec, conds, body.get("card", {}), around)

    def to_diffusers(self, folder: str | Path, **options: Any) -> Path:
        """Writes a folder that ``diffusers.DiffusionPipeline.from_pretrained`` opens where fewstep is not installed.

        See :func:`fewstep.export.pipeline.to_diffusers` for the options and what is checked.
        """
        return Path(EXPORTERS["diffusers"](self, folder, **options))

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Uploads it with a model card; returns its address. See :func:`fewstep.export.hub.push_to_hub`."""
        return str(EXPORTERS["hub"](self, repo, **options))


def local(place: Any) -> Path:
    """A path of this machine, with ``~`` for the home folder.

    Raises:
        InputError: it is neither text nor a path, it is empty, or it begins with the name of nobody here.
    """
    if not isinstance(place, str | os.PathLike) or not str(place):
        raise InputError(f"expected the path of a file or folder, got {place!r}")
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise InputError(f"{place}: {str(error).lower().rstrip('.')}: write the whole path") from None


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        InputError: it does not, or the name means nothing.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"unknown device {device!r}: use cpu, cuda, cuda:1 or mps") from None
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(wanted.type, True):
        raise InputError(f"device {device!r} was asked for and there is none here: use --device cpu")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} does not exist: there are {torch.cuda.device_count()}")
    return wanted


def _given(cond: Any) -> dict[str, Tensor] | list[str] | None:
    """A condition of any form as tensors, or as prompts."""
    if isinstance(cond, Mapping):
        return tensors(cond)
    if cond is None or isinstance(cond, list | tuple):
        return None if cond is None else list(cond)
    if isinstance(cond, str):
        return [cond]
    raise InputError(
        f"cond must be a mapping such as {{'label': labels}}, a prompt or a list of them, got {shown(cond)}"
    )


def _count(n: int | None, cond: Cond | Prompts | None, seed: Seed) -> int:
    said = {"n": whole("n", n)} if n is not None else {}
    given, seeds = _given(cond), seeds_of(seed)
    if isinstance(given, dict):
        said |= {f"cond[{k!r}]": len(v) for k, v in given.items()}
    elif given is not None and not isinstance(cond, str):
        said |= {"prompts": len(given)}
    said |= {} if isinstance(seeds, int) else {"seed": len(seeds)}
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
