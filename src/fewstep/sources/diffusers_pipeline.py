"""What surrounds the network of a diffusers pipeline, loaded when it is first used."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.core.cond import Classes
from fewstep.core.pipeline import Codec, Conditions, pipeline
from fewstep.errors import InputError, unknown
from fewstep.models.codec import Autoencoder, factor_of
from fewstep.models.conditions import Need
from fewstep.models.diffusers import DTYPES, FAMILIES, Family, family_of, latent_channels
from fewstep.models.libraries import diffusers_class, opening, quiet
from fewstep.sources.diffusers_files import UNUSED, component_variant, is_hub_id, load_part, read_index, resolve
from fewstep.sources.diffusers_parts import (
    check_parts,
    check_positions,
    missing_text_parts,
    part_config,
    read_scheduler,
)
from fewstep.sources.text import ENCODERS, Prompts, Text, read_prompts

OTHER = "pass a pipeline of the same model as base="
GONE = "put it back, or pass where it is now as base="


class DiffusersPipeline:
    """A diffusers folder or Hub id without its network: autoencoder, text encoders, configurations.

    Attributes:
        source: an absolute path or a Hub id.
        root: the folder that it is found in.
        class_name: of the pipeline.
        part: "unet" or "transformer".
        shape: (C, H, W) of what the network sees.
        device: where parts are loaded to.
    """

    kind: ClassVar[str] = "diffusers"

    def __init__(
        self,
        source: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        size: int | tuple[int, int] | None = None,
        prompts: Prompts | None = None,
        embedded_guidance: float = 3.5,
        tiled: bool = False,
        device: torch.device | str = "cpu",
        token: str | bool | None = None,
        local_files_only: bool | None = None,
    ) -> None:
        """The options of :func:`fewstep.sources.diffusers.load_diffusers`; nothing large is read.

        Raises:
            InputError: there is no such pipeline, it is not whole, or a class in it is not supported.
        """
        self.prompts = None if prompts is None else read_prompts(prompts)
        self.root = resolve(source, revision=revision, variant=variant, token=token, local_files_only=local_files_only)
        self.source = str(self.root.resolve()) if Path(source).expanduser().is_dir() else str(source)
        self.revision, self.variant, self.dtype, self.size = revision, variant, dtype, size
        self.embedded_guidance, self.tiled, self.device = _scale(embedded_guidance), tiled, torch.device(device)
        self.class_name, self.parts, self.extra = read_index(self.root)
        self.part = next((p for p in ("unet", "transformer", "prior") if p in self.parts), "")
        if self.part not in ("unet", "transformer"):
            raise InputError(f"{self.root} has no unet and no transformer: a {self.class_name} is not supported")
        self.network_class = self.parts[self.part].class_name
        self.family: Family = family_of(self.network_class)
        self.network_config = self.config_of(self.part)
        self.needs, self.shape = self._needs(), self._shape()
        check_positions(self.network_class, self.network_config, self.shape, self.root / self.part)
        if "prompt_embeds" in self.needs and self.class_name not in ENCODERS:
            raise unknown("pipeline class with prompts", self.class_name, ENCODERS)
        check_parts(self.root, self.class_name, self.parts, self.part, variant)
        self._loaded: dict[str, Any] = {}
        self._conds = self._make_conds()

    def config_of(self, name: str) -> dict[str, Any]:
        """The configuration of a component, as its file has it, filled up with its class's defaults.

        Raises:
            InputError: the file is missing, no JSON object, or has an entry of another type.
        """
        return part_config(self.root, name, self.parts[name])

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration, with its class.

        Raises:
            InputError: the pipeline has none, or its file is missing.
        """
        return read_scheduler(self.root, self.parts)

    @property
    def factor(self) -> int:
        """Pixels per latent along one side; 1 for pixel models."""
        if "vae" not in self.parts:
            return 1
        return factor_of(self.parts["vae"].class_name, self.config_of("vae"))

    def _needs(self) -> dict[str, Need]:
        try:
            return self.family.needs(self.network_config)
        except InputError as error:
            raise InputError(f"{self.root / self.part} is not supported: {error}") from None

    def _shape(self) -> tuple[int, int, int]:
        channels, factor = latent_channels(self.network_class, self.network_config), self.factor
        made = self.config_of("vae").get("latent_channels", channels) if "vae" in self.parts else channels
        if made != channels:
            raise InputError(
                f"{self.root} does not fit together: its network takes {channels} channels, its vae makes {made}"
            )
        own = self.network_config.get("sample_size") or (128 if self.family.passes_sigmas else None)
        if self.size is None and own is None:
            raise InputError(f"{self.root} does not say how large its pictures are: pass size= in pixels")
        sides: Any = own if self.size is None else self.size
        pair = tuple(sides) if isinstance(sides, list | tuple) else (sides, sides)
        if len(pair) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in pair):
            raise InputError(f"size must be the side of a picture in pixels, or (height, width), got {sides!r}")
        if self.size is None:
            return (channels, pair[0], pair[1])
        step = factor * self.family.patch(self.network_config)
        if any(s % step for s in pair):
            raise InputError(f"size {self.size} does not suit this pipeline: sides must be divisible by {step}")
        return (channels, pair[0] // factor, pair[1] // factor)

    def _make_conds(self) -> Conditions | None:
        if "label" in self.needs:
            classes = self.network_config.get("num_class_embeds") or self.network_config["num_embeds_ada_norm"]
            names = {int(k): str(v) for k, v in dict(self.extra.get("id2label") or {}).items()}
            said = tuple(names.get(k, str(k)) for k in range(classes)) if names else ()
            if self.prompts is not None:
                raise InputError(f"a {self.class_name} reads labels: it cannot take prompts")
            return Classes((1.0,) * classes, said)
        if "prompt_embeds" in self.needs:
            return Text(self, self.prompts)
        if self.prompts is not None:
            raise InputError(f"a {self.class_name} is unconditional: it cannot take prompts")
        return None

    @property
    def conds(self) -> Conditions | None:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        return self._conds

    @cached_property
    def codec(self) -> Codec | None:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        return Autoencoder(self.vae, tiled=self.tiled) if "vae" in self.parts else None

    def told(self) -> dict[str, Tensor]:
        """What the network is told beside the prompt, one example of each: sizes in pixels, and embedded guidance."""
        height, width = (float(self.factor * s) for s in self.shape[1:])
        known = {
            "time_ids": torch.tensor([height, width, 0.0, 0.0, height, width]),
            "resolution": torch.tensor([height, width]),
            "aspect_ratio": torch.tensor([height / width]),
            "guidance": torch.tensor(self.embedded_guidance),
        }
        return {name: value for name, value in known.items() if name in self.needs}

    def vae(self) -> nn.Module:
        """The autoencoder, loaded on first use.

        Raises:
            InputError: its files are damaged or pickles.
        """
        if "vae" not in self._loaded:
            dtype = DTYPES[self.dtype]
            if dtype == torch.float16 and self.config_of("vae").get("force_upcast"):
                dtype = torch.float32
            self._loaded["vae"] = self._part("vae", dtype)
        vae: nn.Module = self._loaded["vae"]
        return vae

    def text(self) -> Any:
        """The stock pipeline with its text parts alone, loaded on first use.

        Raises:
            InputError: a part is missing, damaged or a pickle, or transformers is not installed.
        """
        if "text" not in self._loaded:
            missing = missing_text_parts(self.class_name, self.parts)
            if missing:
                raise InputError(
                    f"{self.root} names no {', '.join(missing)}: it cannot read prompts, pass their embeddings in cond="
                )
            kind, dtype = diffusers_class(self.class_name), DTYPES[self.dtype]
            takes = inspect.signature(kind.__init__).parameters
            left_out = {"vae", "scheduler", "unet", "transformer", *UNUSED} & set(takes)
            # What is named as null counts as missing unless it is given as None.
            left_out |= {name for name in takes if name.startswith(("text_encoder", "tokenizer"))} - set(self.parts)
            given: dict[str, Any] = dict.fromkeys(left_out)
            given |= {name: self._part(name, dtype) for name in self.parts if name.startswith("text_encoder")}
            with quiet(), opening(self.root, self.class_name):
                pipe = kind.from_pretrained(self.root, local_files_only=True, **given)
            if self.class_name == "StableDiffusion3Pipeline":
                # Without its third encoder it asks the network's configuration for the width of the zeros in its place.
                object.__setattr__(pipe, self.part, SimpleNamespace(config=SimpleNamespace(**self.network_config)))
            self._loaded["text"] = pipe
        return self._loaded["text"]

    def _part(self, name: str, dtype: torch.dtype) -> nn.Module:
        # A component without the variant has its plain weights read.
        variant = component_variant(self.root / name, self.variant)
        return load_part(self.root / name, self.parts[name], dtype=dtype, variant=variant).to(self.device)

    def components(self) -> dict[str, Path]:
        """The folders of all components that are there, by the names of model_index.json: for exporters."""
        return {name: self.root / name for name in self.parts if (self.root / name).is_dir()}

    def release(self) -> None:
        """Frees the text encoders; what was encoded is kept, and they are loaded again when another prompt comes."""
        self._loaded.pop("text", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """See :class:`fewstep.core.pipeline.Pipeline`; ``made_for`` is what a source in its place must have too."""
        fields: dict[str, Any] = {"source": self.source, "dtype": self.dtype, "size": self.size}
        fields |= {"revision": self.revision, "variant": self.variant, "tiled": self.tiled}
        fields |= {"prompts": self.prompts, "embedded_guidance": self.embedded_guidance}
        return {**fields, "made_for": self.facts()}

    def facts(self) -> dict[str, Any]:
        """JSON-able: the classes, the latent space and the conditions that a network is trained with."""
        facts: dict[str, Any] = {"pipeline": self.class_name, "network": self.network_class}
        if "vae" in self.parts:
            config = self.config_of("vae")
            scales = {k: config[k] for k in ("scaling_factor", "shift_factor") if config.get(k) is not None}
            facts["vae"] = {"class": self.parts["vae"].class_name, "factor": self.factor, **scales}
        return {**facts, "shape": list(self.shape), "needs": {k: list(v.shape) for k, v in self.needs.items()}}

    def to(self, device: torch.device) -> DiffusersPipeline:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        self.device = torch.device(device)
        for part in self._loaded.values():
            part.to(self.device)
        return self


def _scale(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"embedded_guidance must be a number, got {value!r}")
    return float(value)


@pipeline("diffusers")
def open_diffusers(description: Mapping[str, Any], device: torch.device) -> DiffusersPipeline:
    """The pipeline that :meth:`DiffusersPipeline.describe` described.

    Raises:
        InputError: its source is gone, has changed or is of another family, or the description has other fields.
    """
    fields = dict(description)
    source, wanted = str(fields.pop("source")), fields.pop("made_for", {})
    if not Path(source).expanduser().is_dir() and not is_hub_id(source):
        raise InputError(f"the diffusers pipeline at {source} is gone, which decodes and reads prompts here: {GONE}")
    size = fields.pop("size", None)
    made = DiffusersPipeline(source, size=tuple(size) if isinstance(size, list) else size, device=device, **fields)
    found = made.facts()
    for name in ("pipeline", "network"):
        if wanted.get(name, found[name]) != found[name]:
            raise InputError(f"this was made with a {wanted[name]}, {source} is a {found[name]}: {OTHER}")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(f"this was made with the {name} {value}, {source} has {found.get(name)}: {OTHER}")
    return made


__all__ = ["FAMILIES", "DiffusersPipeline", "open_diffusers"]
