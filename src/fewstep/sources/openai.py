"""Checkpoints of OpenAI's improved-diffusion, guided-diffusion and consistency-models repositories.

A file holds names and tensors only; the architecture is read from those, and what they cannot tell from options or,
for the released files, from :data:`fewstep.sources.openai_presets.PRESETS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.cond import Classes
from fewstep.core.denoiser import Precond
from fewstep.core.generator import Generator, check_device
from fewstep.core.path import DDPMPath, Predicts
from fewstep.core.state import load_weights
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid.discrete import discrete, iddpm_levels
from fewstep.grid.karras import karras as karras_grid
from fewstep.models.guided import GuidedUNet, GuidedUNetConfig, karras
from fewstep.solve.consistency import consistency
from fewstep.solve.euler import euler
from fewstep.solve.heun import heun
from fewstep.sources.checkpoint import check_dtype, read_checkpoint
from fewstep.sources.openai_presets import PRESETS, Preset, Repository

STEPS = 25
HEUN_STEPS = 40
# Weights that are one-dimensional convolutions in one repository and two-dimensional ones in another.
FLAT = (".qkv.weight", ".proj_out.weight")
# The defaults of the repositories' own flags; what has none must be said.
GUIDED = {
    "use_new_attention_order": False,
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
    "predict_xstart": False,
}
# The consistency repository's attention always holds q, k and v one after the other, whatever its flag says.
CONSISTENCY = {"use_new_attention_order": True, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}


@dataclass(frozen=True)
class Recognised:
    """What names and shapes tell of an ADM U-Net; ``attention`` are downsampling factors, 1 for full resolution."""

    image_channels: int
    classes: int
    channels: int
    multipliers: tuple[float, ...]
    blocks: int
    attention: tuple[int, ...]
    scale_shift: bool
    updown: bool
    learn_variance: bool

    def against(self, config: GuidedUNetConfig) -> list[str]:
        """Where a network differs from it, in words; empty where all agrees."""
        size = config.shape[1]
        own = asdict(self) | {"attention": tuple(size // factor for factor in self.attention)}
        other = asdict(config) | {"image_channels": config.shape[0], "attention": self._reached(config)}
        return [f"{name} is {own[name]}, expected {other[name]}" for name in own if own[name] != other[name]]

    @staticmethod
    def _reached(config: GuidedUNetConfig) -> tuple[int, ...]:
        heights = [config.shape[1] >> level for level in range(len(config.multipliers))]
        return tuple(h for h in heights if h in config.attention)


def recognise(tensors: Mapping[str, Tensor], source: str | Path) -> Recognised:
    """The architecture that names and shapes show.

    Raises:
        InputError: a classifier, a super-resolution model, or no network of these repositories at all.
    """
    if "input_blocks.0.0.weight" in tensors and not any(name.startswith("output_blocks.") for name in tensors):
        raise InputError(f"{source} is a classifier (it has no output_blocks), not a generator")
    try:
        last = max(int(name.split(".")[1]) for name in tensors if name.startswith("output_blocks."))
        channels = tensors["time_embed.0.weight"].shape[1]
        ups, widths, attending = [], [], []
        for k in range(last + 1):
            widths.append(tensors[f"output_blocks.{k}.0.out_layers.3.weight"].shape[0])
            attending.append(f"output_blocks.{k}.1.qkv.weight" in tensors)
            place = f"output_blocks.{k}.{1 + attending[-1]}"
            if f"{place}.conv.weight" in tensors or f"{place}.in_layers.0.weight" in tensors:
                ups.append(k)
        levels = len(ups) + 1
        blocks = (last + 1) // levels - 1
        firsts = [k * (blocks + 1) for k in range(levels)][::-1]
        enter, leave = tensors["input_blocks.0.0.weight"].shape[1], tensors["out.2.weight"].shape[0]
        told = tensors["output_blocks.0.0.emb_layers.1.weight"].shape[0]
        label = tensors.get("label_emb.weight")
        found = Recognised(
            image_channels=enter,
            classes=0 if label is None else len(label),
            channels=channels,
            multipliers=tuple(_plain(widths[k] / channels) for k in firsts),
            blocks=blocks,
            attention=tuple(2**level for level, k in enumerate(firsts) if attending[k]),
            scale_shift=told == 2 * widths[0],
            updown=not any(name.startswith("input_blocks.") and name.endswith(".op.weight") for name in tensors),
            learn_variance=leave == 2 * enter,
        )
    except (ValueError, KeyError, IndexError) as error:
        first = ", ".join(sorted(tensors)[:3])
        raise InputError(
            f"{source} is no U-Net of OpenAI's diffusion repositories: it lacks {error}; its names begin with {first}"
        ) from None
    if enter == 6:
        raise InputError(f"{source} is a super-resolution model (6 input channels), which is not a generator by itself")
    if leave not in (enter, 2 * enter):
        raise InputError(f"{source} maps {enter} channels to {leave}: expected {enter}, or {2 * enter} with a variance")
    return found


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def is_consistency(path: str | Path) -> bool:
    """Whether a checkpoint is of consistency-models: by the name of a release, else by its two-dimensional attention.

    Raises:
        InputError: see :func:`read_checkpoint`.
    """
    known = PRESETS.get(Path(path).stem)
    if known is not None:
        return known.repository == "consistency-models"
    return any(name.endswith(".qkv.weight") and value.ndim == 4 for name, value in read_checkpoint(path).items())


def _preset(path: Path, wanted: str | None, found: Recognised, repository: Repository) -> tuple[str | None, list[str]]:
    """The preset asked for or named by the file, where shapes agree; else presets with these shapes."""
    own = {name: preset for name, preset in PRESETS.items() if preset.repository == repository}
    if wanted is not None:
        if wanted not in PRESETS:
            raise unknown("preset", wanted, own)
        if wanted not in own:
            raise InputError(f"preset {wanted!r} is a checkpoint of {PRESETS[wanted].repository}: use the other loader")
        wrong = found.against(own[wanted].net)
        if wrong:
            raise InputError(f"{path} is not {wanted!r}: {'; '.join(wrong)}")
        return wanted, []
    alike = [name for name, preset in own.items() if not found.against(preset.net)]
    return (path.stem, []) if path.stem in alike else (None, alike)


def _settings(
    path: Path,
    preset: Preset | None,
    alike: Sequence[str],
    said: Mapping[str, Any],
    defaults: Mapping[str, Any],
    needed: Sequence[str],
) -> dict[str, Any]:
    """What shapes cannot tell: what was said, else what is published, else the repository's defaults."""
    given = {name: value for name, value in said.items() if value is not None}
    known: dict[str, Any] = dict(defaults)
    if preset is not None:
        known |= {**preset.run, "image_size": preset.net.shape[1], "use_new_attention_order": preset.net.new_order}
        # One of the two decides how many heads there are, so what is said replaces both.
        if not given.keys() & {"num_heads", "num_head_channels"}:
            known |= {"num_heads": preset.net.heads, "num_head_channels": preset.net.head_channels}
    known |= given
    missing = [name for name in needed if name not in known]
    missing += [] if known.keys() & {"num_heads", "num_head_channels"} else ["num_heads or num_head_channels"]
    if missing:
        hint = f"; or preset=..., if it is one of {', '.join(alike)}, whose shapes it has" if alike else ""
        raise InputError(f"the weights in {path} cannot tell {', '.join(missing)}: pass them as options{hint}")
    return known


def _network(found: Recognised, known: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> GuidedUNet:
    """The network with the file's weights in float32."""
    for name in ("image_size", "num_heads", "num_head_channels"):
        value = known.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < (name == "image_size"):
            raise InputError(f"{name} must be a whole number, for a picture's side at least 1, got {value!r}")
    size = known["image_size"]
    config = GuidedUNetConfig(
        shape=(found.image_channels, size, size),
        classes=found.classes,
        channels=found.channels,
        multipliers=found.multipliers,
        blocks=found.blocks,
        attention=tuple(size // factor for factor in found.attention),
        heads=known.get("num_heads", 0),
        head_channels=known.get("num_head_channels", 0),
        new_order=known["use_new_attention_order"],
        scale_shift=found.scale_shift,
        updown=found.updown,
        learn_variance=found.learn_variance,
        time_scale=1000 / known["diffusion_steps"] if known.get("rescale_timesteps") else 1.0,
    )
    # Without memory at first, so that nothing is drawn for weights that come from the file.
    with torch.device("meta"):
        net = GuidedUNet(config)
    flat = {k: v[..., 0] if k.endswith(FLAT) and v.ndim == 4 else v for k, v in tensors.items()}
    load_weights(net.to_empty(device="cpu"), flat, path)
    return net


def _betas(schedule: str, steps: int) -> DDPMPath:
    """The path of a named schedule with any number of steps (arXiv 2006.11239, 2102.09672)."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InputError(f"diffusion_steps must be a whole number of at least 2, got {steps!r}")
    if schedule == "linear":
        ends = torch.tensor([1e-4, 0.02], dtype=torch.float64) * (1000 / steps)
        return DDPMPath(tuple(torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64).tolist()))
    if schedule == "cosine":
        kept = 1 / (1 + iddpm_levels(steps) ** 2)
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        return DDPMPath(tuple((1 - kept / before).tolist()))
    raise unknown("noise_schedule", str(schedule), ("linear", "cosine"))


def _generator(
    denoiser: Precond, sampler: Tableau, classes: int, device: str | torch.device, dtype: torch.dtype | None, card: Any
) -> Generator:
    denoiser.to(check_device(device), check_dtype(dtype)).eval().requires_grad_(False)
    conds = Classes((1.0,) * classes) if classes else None
    return Generator(denoiser, sampler, None, conds, card)


def _card(path: Path, repository: str, name: str | None, found: Recognised, known: Mapping[str, Any]) -> dict[str, Any]:
    seen = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(found).items()}
    return {
        "source": {"repository": repository, "file": path.name, "preset": name, "seen": seen, "options": dict(known)}
    }


def load_guided(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    preset: str | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    use_new_attention_order: bool | None = None,
    diffusion_steps: int | None = None,
    noise_schedule: str | None = None,
    rescale_timesteps: bool | None = None,
    predict_xstart: bool | None = None,
) -> Generator:
    """A teacher from a checkpoint of guided-diffusion or improved-diffusion (arXiv 2105.05233, 2102.09672).

    The weights are float32 unless ``dtype`` says otherwise. The options have the names of the repositories' flags and
    override what is published of a ``preset``, which a released file's name implies. Without one, ``image_size``,
    ``noise_schedule`` ("linear" or "cosine") and one of ``num_heads`` and ``num_head_channels`` must be given; the
    others are guided-diffusion's defaults (improved-diffusion rescales its time: pass ``rescale_timesteps=True``).
    The sampler is DDIM on 25 of the model's levels, counted up from the lowest in equal strides. A learned variance is
    not used by it, but by :class:`fewstep.solve.iddpm.LearnedVariance`. ``card["source"]`` says what was recognised.

    Raises:
        InputError: a bad file, another architecture, an option that is missing or does not fit, or no such device.
    """
    path, said = Path(path), {k: v for k, v in locals().items() if k not in ("path", "device", "dtype", "preset")}
    tensors = read_checkpoint(path)
    found = recognise(tensors, path)
    name, alike = _preset(path, preset, found, "guided-diffusion")
    known = _settings(path, PRESETS.get(name or ""), alike, said, GUIDED, ("image_size", "noise_schedule"))
    line = _betas(known["noise_schedule"], known["diffusion_steps"])
    net = _network(found, known, tensors, path)
    low, high = float(line.levels[0]), float(line.levels[-1])
    predicts: Predicts = "x0" if known["predict_xstart"] else "noise"
    denoiser = Precond(
        net, net.config.shape, path=line, predicts=predicts, sigma_min=low, sigma_max=high, unit_start=True
    )
    grid = discrete(min(STEPS, len(line.levels)), low, high, table=line.levels, spacing="leading")
    card = _card(path, "guided-diffusion", name, found, known)
    return _generator(denoiser, euler(grid), found.classes, device, dtype, card)


def load_consistency(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    preset: str | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    use_new_attention_order: bool | None = None,
    distillation: bool | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigma_data: float | None = None,
) -> Generator:
    """A teacher or student from a checkpoint of consistency-models (arXiv 2303.01469).

    With ``distillation=False`` it is a model trained as EDM (``edm_*``), sampled by Heun on 40 steps as published; with
    True a consistency model (``cd_*``, ``ct_*``), the identity at ``sigma_min``, sampled in one step at ``sigma_max``.
    Where points of multistep sampling are published, ``card["source"]["multistep"]`` has them: ``levels`` is a grid for
    :func:`fewstep.solve.consistency.consistency` with the model's ``sigma_min``. The other options are those of
    :func:`load_guided`; without a preset ``image_size``, ``distillation`` and one of the two head counts must be given.

    Raises:
        InputError: a bad file, another architecture, an option that is missing or does not fit, or no such device.
    """
    path, said = Path(path), {k: v for k, v in locals().items() if k not in ("path", "device", "dtype", "preset")}
    tensors = read_checkpoint(path)
    found = recognise(tensors, path)
    if found.learn_variance:
        raise InputError(f"{path} predicts a variance, as no consistency model does: open it with kind='guided'")
    name, alike = _preset(path, preset, found, "consistency-models")
    known = _settings(path, PRESETS.get(name or ""), alike, said, CONSISTENCY, ("image_size", "distillation"))
    net = _network(found, known, tensors, path)
    low, high = known["sigma_min"], known["sigma_max"]
    numbers = {"sigma_data": known["sigma_data"], "sigma_min": low, "sigma_max": high}
    denoiser = karras(net, net.config.shape, distilled=known["distillation"], **numbers)
    card = _card(path, "consistency-models", name, found, known)
    points = PRESETS[name].multistep if name else None
    if points is not None:
        levels = multistep_levels(*points, sigma_min=low, sigma_max=high).tolist()
        card["source"]["multistep"] = {"ts": list(points[0]), "steps": points[1], "levels": levels}
    one_step = torch.tensor([high, 0.0], dtype=torch.float64)
    sampler = consistency(one_step) if known["distillation"] else heun(karras_grid(HEUN_STEPS, low, high))
    return _generator(denoiser, sampler, found.classes, device, dtype, card)


def multistep_levels(
    ts: Sequence[int], steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """(len(ts),) float64 levels of published time points: ``ts`` of ``steps`` on Karras' grid, 0 the highest.

    Raises:
        InputError: points outside 0 .. steps - 1 or that do not rise, or bad levels.
    """
    if steps < 2 or list(ts) != sorted(set(ts)) or not ts or ts[0] < 0 or ts[-1] >= steps:
        raise InputError(f"ts must rise from 0 or above to at most steps - 1 = {steps - 1}, got {list(ts)}")
    if not 0 < sigma_min < sigma_max < math.inf or not rho > 0:
        raise InputError(
            f"levels need 0 < sigma_min < sigma_max < inf and rho > 0, got {sigma_min}, {sigma_max}, {rho}"
        )
    return karras_grid(steps - 1, sigma_min, sigma_max, rho=rho, to_zero=False)[list(ts)]
