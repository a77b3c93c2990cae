"""What surrounds the network of a diffusers pipeline, loaded when it is first used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.core.cond import Classes
from fewstep.core.pipeline import Codec, Conditions, pipeline
from fewstep.core.state import read_json
from fewstep.errors import InputError, unknown
from fewstep.models.codec import FACTORS, Autoencoder, factor_of
from fewstep.models.diffusers import DTYPES, FAMILIES, Family, Need, diffusers_class, family_of, latent_channels
from fewstep.sources.diffusers_files import UNUSED, is_hub_id, quiet, read_index, resolve
from fewstep.sources.text import Prompts, Text

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
        self.root = resolve(source, revision=revision, variant=variant, token=token, local_files_only=local_files_only)
        self.source = str(self.root.resolve()) if Path(source).expanduser().is_dir() else str(source)
        self.revision, self.variant, self.dtype, self.size = revision, variant, dtype, size
        self.embedded_guidance, self.tiled, self.device = float(embedded_guidance), tiled, torch.device(device)
        self.class_name, self.parts, self.extra = read_index(self.root)
        self.part = next((p for p in ("unet", "transformer", "prior") if p in self.parts), "")
        if self.part not in ("unet", "transformer"):
            raise InputError(f"{self.root} has no unet and no transformer: a {self.class_name} is not supported")
        self.network_class = self.parts[self.part].class_name
        self.family: Family = family_of(self.network_class)
        self.network_config = self.config_of(self.part)
        self.needs: dict[str, Need] = self.family.needs(self.network_config)
        self.shape = self._shape()
        self.prompts = str(Path(prompts).expanduser().resolve()) if isinstance(prompts, str | Path) else prompts
        self._loaded: dict[str, Any] = {}
        self._conds = self._make_conds()

    def config_of(self, name: str) -> dict[str, Any]:
        """The configuration of a component, as its file has it, filled up with its class's defaults.

        Raises:
            InputError: the file is missing or no JSON object.
        """
        config = read_json(self.root / name / "config.json")
        kind = diffusers_class(self.parts[name].class_name)
        takes = inspect.signature(kind.__init__).parameters
        defaults = {k: p.default for k, p in takes.items() if p.default is not inspect.Parameter.empty}
        return {**defaults, **{k: v for k, v in config.items() if not k.startswith("_")}}

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration, with its class.

        Raises:
            InputError: the pipeline has none.
        """
        if "scheduler" not in self.parts:
            raise InputError(f"{self.root} names no scheduler in its model_index.json")
        name = self.parts["scheduler"].class_name
        return {**read_json(self.root / "scheduler" / "scheduler_config.json"), "_class_name": name}

    @property
    def factor(self) -> int:
        """Pixels per latent along one side; 1 for pixel models."""
        if "vae" not in self.parts:
            return 1
        return factor_of(self.parts["vae"].class_name, self.config_of("vae"))

    def _shape(self) -> tuple[int, int, int]:
        channels, factor = latent_channels(self.network_class, self.network_config), self.factor
        own = self.network_config.get("sample_size") or (128 if self.family.passes_sigmas else None)
        if self.size is None and own is None:
            raise InputError(f"{self.root} does not say how large its pictures are: pass size= in pixels")
        sides: Any = own if self.size is None else self.size
        pair = (sides, sides) if isinstance(sides, int) else tuple(sides)
        if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
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
            name = self.parts["vae"].class_name
            if name not in FACTORS:
                raise unknown("autoencoder class of diffusers", name, FACTORS)
            dtype = DTYPES[self.dtype]
            if dtype == torch.float16 and self.config_of("vae").get("force_upcast"):
                dtype = torch.float32
            self._loaded["vae"] = self._open(diffusers_class(name), self.root / "vae", dtype)
        vae: nn.Module = self._loaded["vae"]
        return vae

    def text(self) -> Any:
        """The stock pipeline with its text parts alone, loaded on first use.

        Raises:
            InputError: a part is missing, damaged or a pickle, or transformers is not installed.
        """
        if "text" not in self._loaded:
            try:
                import_module("transformers")
            except ModuleNotFoundError:
                raise InputError(
                    "transformers is not installed, which reads prompts: pip install 'fewstep[hf]'"
                ) from None
            kind = diffusers_class(self.class_name)
            left_out = {"vae", "scheduler", "unet", "transformer", *UNUSED} & set(
                inspect.signature(kind.__init__).parameters
            )
            self._loaded["text"] = self._open(kind, self.root, DTYPES[self.dtype], **dict.fromkeys(left_out))
        return self._loaded["text"]

    def _open(self, kind: Any, folder: Path, dtype: torch.dtype, **parts: Any) -> Any:
        # A component without the variant has its plain weights read; a pipeline sees to that by itself.
        has = any(f".{self.variant}." in p.name or f".{self.variant}-" in p.name for p in folder.iterdir())
        variant = self.variant if self.variant and (parts or has) else None
        try:
            with quiet():
                found = kind.from_pretrained(
                    folder, torch_dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True, **parts
                )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{folder} cannot be opened as a {kind.__name__}: {reason}") from None
        if isinstance(found, nn.Module):
            found.eval().requires_grad_(False)
        else:
            for part in found.components.values():
                if isinstance(part, nn.Module):
                    part.eval().requires_grad_(False)
        return found.to(self.device)

    def components(self) -> dict[str, Path]:
        """The folders of all components that are there, by the names of model_index.json: for exporters."""
        return {name: self.root / name for name in self.parts if (self.root / name).is_dir()}

    def release(self) -> None:
        """Frees the text encoders; what was encoded is kept, and they are loaded again when another prompt comes."""
        self._loaded.pop("text", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        fields: dict[str, Any] = {"source": self.source, "dtype": self.dtype, "size": self.size}
        fields |= {"revision": self.revision, "variant": self.variant, "tiled": self.tiled}
        prompts = self.prompts if self.prompts is None or isinstance(self.prompts, str) else list(self.prompts)
        return {**fields, "prompts": prompts, "embedded_guidance": self.embedded_guidance}

    def to(self, device: torch.device) -> DiffusersPipeline:
        """See :class:`fewstep.core.pipeline.Pipeline`."""
        self.device = torch.device(device)
        for part in self._loaded.values():
            part.to(self.device)
        return self


@pipeline("diffusers")
def open_diffusers(description: Mapping[str, Any], device: torch.device) -> DiffusersPipeline:
    """The pipeline that :meth:`DiffusersPipeline.describe` described.

    Raises:
        InputError: its source is gone or has changed, or the description has other fields.
    """
    fields = dict(description)
    source = str(fields.pop("source"))
    if not Path(source).is_dir() and not is_hub_id(source):
        raise InputError(f"the diffusers pipeline at {source} is gone, which decodes and reads prompts here: {GONE}")
    size = fields.pop("size", None)
    return DiffusersPipeline(source, size=tuple(size) if isinstance(size, list) else size, device=device, **fields)


__all__ = ["FAMILIES", "DiffusersPipeline", "open_diffusers"]
