"""DINOv2 and CLIP as extractors, through transformers, from a folder or a Hub id that the user named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure.features import digest
from fewstep.measure.resize import clean, levels
from fewstep.measure.weight_files import hash_of
from fewstep.models.libraries import library_class, opening

# What the networks were trained with: ImageNet's statistics, and those of CLIP's pictures.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
Scale = tuple[tuple[float, ...], tuple[float, ...]]


def _prepared(images: Tensor, side: int, scale: Scale) -> Tensor:
    mean, deviation = (torch.tensor(v, device=images.device).reshape(1, 3, 1, 1) for v in scale)
    return (clean(levels(images), side) / 255 - mean) / deviation


class DinoExtractor:
    """The class token of DINOv2 behind its last normalisation, as FD-DINOv2 takes it (arXiv 2306.04675).

    Pictures are resized to ``side`` by the clean bicubic resize and scaled by ImageNet's statistics.

    Args:
        model: transformers' ``Dinov2Model``, in evaluation mode from here on.
        side: what pictures are resized to, a multiple of the network's patch.
        device: where the network runs.

    Raises:
        InputError: a side that the patches do not divide.
    """

    resize = "clean"

    def __init__(self, model: Any, *, side: int = 224, device: torch.device | str = "cpu") -> None:
        patch = model.config.patch_size
        if side < patch or side % patch:
            raise InputError(f"side {side} for patches of {patch} pixels: give a multiple of {patch}")
        self.name, self.dim, self.side = "dinov2", model.config.hidden_size, side
        self.weights = hash_of(model)
        self.device = torch.device(device)
        self.fingerprint = digest(f"dinov2 {side} {self.weights}".encode())
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, dim), float32, of pictures (B, 3 or 1, H, W) in [-1, 1] of any size.

        Raises:
            InputError: another number of channels.
        """
        found = self.model(pixel_values=_prepared(images.to(self.device), self.side, IMAGENET))
        return found.last_hidden_state[:, 0].float()


class ClipExtractor:
    """CLIP's embeddings of pictures and prompts, of length 1: for CMMD, CLIP scores and Frechet distances.

    Args:
        model: transformers' ``CLIPModel``, in evaluation mode from here on.
        tokenizer: of the prompts; None where only pictures are embedded.
        device: where the network runs.
    """

    resize = "clean"

    def __init__(self, model: Any, tokenizer: Any = None, *, device: torch.device | str = "cpu") -> None:
        self.name, self.dim = "clip", model.config.projection_dim
        self.side, self.tokenizer = model.config.vision_config.image_size, tokenizer
        self.weights = hash_of(model)
        self.device = torch.device(device)
        self.fingerprint = digest(f"clip {self.side} {self.weights}".encode())
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings (B, dim), float32, of pictures (B, 3 or 1, H, W) in [-1, 1] of any size.

        Raises:
            InputError: another number of channels.
        """
        return _length_one(self.model.get_image_features(_prepared(images.to(self.device), self.side, CLIP)))

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, dim), float32, of prompts; those too long for the network are cut.

        Raises:
            InputError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("this CLIP has no tokenizer, so it cannot read prompts: open the whole folder or Hub id")
        words = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _length_one(
            self.model.get_text_features(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        )


def _length_one(found: Any) -> Tensor:
    # transformers 5 returns a record where 4 returned the tensor.
    embedding: Tensor = getattr(found, "pooler_output", found)
    return torch.nn.functional.normalize(embedding.float(), dim=-1)


def dino_extractor(place: str | Path, *, side: int = 224, device: torch.device | str = "cpu") -> DinoExtractor:
    """DINOv2 from a folder of transformers or a Hub id, such as ``facebook/dinov2-large``, the usual one.

    Raises:
        InputError: transformers is missing, nothing can be opened there, or see :class:`DinoExtractor`.
    """
    kind = library_class("transformers", "Dinov2Model")
    with opening(place, "Dinov2Model"):
        model = kind.from_pretrained(str(place), use_safetensors=True)
    return DinoExtractor(model, side=side, device=device)


def clip_extractor(place: str | Path, *, device: torch.device | str = "cpu") -> ClipExtractor:
    """CLIP from a folder of transformers or a Hub id; CMMD is published with ``openai/clip-vit-large-patch14-336``.

    Raises:
        InputError: transformers is missing, or nothing can be opened there.
    """
    kind, words = library_class("transformers", "CLIPModel"), library_class("transformers", "CLIPTokenizer")
    with opening(place, "CLIPModel"):
        model = kind.from_pretrained(str(place), use_safetensors=True)
    with opening(place, "CLIPTokenizer"):
        tokenizer = words.from_pretrained(str(place))
    return ClipExtractor(model, tokenizer, device=device)
