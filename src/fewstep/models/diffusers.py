"""The networks of diffusers as ``net(x, time, cond)``: one adapter around the stock class, one entry per family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.denoiser import TimeMap
from fewstep.core.network import network
from fewstep.errors import InputError, unknown
from fewstep.models.conditions import Need
from fewstep.models.libraries import diffusers_class as diffusers_class
from fewstep.models.libraries import opening, quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What is known of one network class of diffusers.

    Attributes:
        part: its name in model_index.json, "unet" or "transformer".
        call: ``(model, x, time, cond)`` -> output (B, C, H, W), all of the model's dtype.
        needs: from the class's configuration to the conditions that it reads.
        taps: from the model to the names of features and of the sub-modules that make them.
        lora_targets: the layers that LoRA training of this family usually adapts.
        passes_sigmas: whether its pipeline hands the scheduler levels of its own instead of a number of steps.
        flow_time: how it is told the time of a flow model.
        patch: latents must be divisible by this.
        flow: whether networks of this class are trained on a flow alone.
    """

    part: str
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor]
    needs: Callable[[Config], dict[str, Need]]
    taps: Callable[[Any], dict[str, str]]
    lora_targets: tuple[str, ...]
    passes_sigmas: bool = False
    flow_time: TimeMap = "native*1000"
    patch: Callable[[Config], int] = field(default=lambda config: int(config.get("patch_size", 1)))
    flow: bool = False


@dataclass(frozen=True)
class DiffusersConfig:
    """A network of diffusers: the name of its class, the class's own JSON configuration, and the weights' dtype."""

    class_name: str
    config: dict[str, Any]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        family_of(self.class_name)
        if self.dtype not in DTYPES:
            raise unknown("dtype", str(self.dtype), DTYPES)
        # What diffusers notes about itself is not needed to build the network again.
        object.__setattr__(self, "config", {k: v for k, v in dict(self.config).items() if not k.startswith("_")})


@network("diffusers", DiffusersConfig)
class DiffusersNet(nn.Module):
    """A stock network of diffusers, in ``model``, told time and conditions as its own pipeline does.

    Conditions may be of any floating dtype: they are cast to the network's. A learned variance is cut off. Labels are
    dropped by whoever trains, so that a network's own label dropout is off.

    Raises:
        InputError: diffusers is missing, an unknown class, or a configuration whose conditions are not supported.
    """

    def __init__(self, config: DiffusersConfig, model: nn.Module | None = None) -> None:
        """``model`` is the network, if it is there already; otherwise it is made with fresh weights."""
        super().__init__()
        self.family = family_of(config.class_name)
        self.needs = self.family.needs(config.config)
        if model is None:
            kind = diffusers_class(config.class_name)
            with quiet(), opening("this configuration", config.class_name):
                model = kind.from_config(dict(config.config)).to(DTYPES[config.dtype])
        assert model is not None
        self.config, self.model = config, model
        for module in model.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0
        self.taps = {name: f"model.{place}" for name, place in self.family.taps(model).items()}
        self.embeds = {f"model.{place}": width for place, width in _embeds(model).items()}
        self.streams = nn.ModuleDict()
        if _is_joint(config.class_name):
            self._add_streams()

    def _add_streams(self) -> None:
        """Blocks that return text and picture together get a place where the picture's part alone passes by."""
        for name, place in self.taps.items():
            self.streams[name] = nn.Identity()
            self.get_submodule(place).register_forward_hook(_Stream(self.streams[name]))
        self.taps = {name: f"streams.{name}" for name in self.taps}

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, C, H, W), ``time`` (B,) -> (B, C, H, W).

        Raises:
            InputError: a condition that the network needs is not there, or a label that it has no embedding for.
        """
        for name, need in self.needs.items():
            if name not in cond and not need.optional:
                raise InputError(f"{self.config.class_name} needs the condition {name!r}, got {sorted(cond)}")
        dtype = next(self.model.parameters()).dtype
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        return self.family.call(self.model, x.to(dtype), time, given)[:, : x.shape[1]]


class _Stream:
    """A hook that shows the second of a block's results to a module: an object, so that a copy hooks its own."""

    def __init__(self, seen: nn.Module) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        self.seen(out[1])


def family_of(class_name: str) -> Family:
    """The entry of :data:`FAMILIES`.

    Raises:
        InputError: a class that is not supported.
    """
    if class_name not in FAMILIES:
        raise unknown("network class of diffusers", class_name, FAMILIES)
    return FAMILIES[class_name]


def latent_channels(class_name: str, config: Config) -> int:
    """The channels of a picture or latent that the network maps to itself.

    Raises:
        InputError: it reads more than it predicts, as networks that inpaint or edit do.
    """
    enter = _whole(config, "in_channels")
    leave = enter if config.get("out_channels") is None else _whole(config, "out_channels")
    if class_name == "FluxTransformer2DModel":
        leave, enter = leave // 4, enter // 4
    if leave not in (enter, 2 * enter):
        raise InputError(
            f"{class_name} reads {enter} channels and predicts {leave}: networks that inpaint or edit a given picture "
            "are not supported"
        )
    return enter


def _whole(config: Config, name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"the network's config.json has {name}={value!r}, expected a whole number of at least 1")
    return value


def _class_needs(config: Config) -> dict[str, Need]:
    if config.get("class_embed_type") is not None:
        raise InputError(
            f"UNet2DModel with class_embed_type={config['class_embed_type']!r} is not supported: only None"
        )
    return {"label": Need((), kind="integer")} if config.get("num_class_embeds") else {}


def _dit_needs(config: Config) -> dict[str, Need]:
    if "num_embeds_ada_norm" in config:
        _whole(config, "num_embeds_ada_norm")
    return {"label": Need((), optional=True, kind="integer")}


def _unet_needs(config: Config) -> dict[str, Need]:
    known = {"class_embed_type": (None,), "encoder_hid_dim_type": (None,), "addition_embed_type": (None, "text_time")}
    for name, values in known.items():
        if config.get(name) not in values:
            raise InputError(f"UNet2DConditionModel with {name}={config[name]!r} is not supported: only {values}")
    if config.get("num_class_embeds"):
        raise InputError("UNet2DConditionModel with num_class_embeds is not supported: only prompts")
    width = config.get("cross_attention_dim", 1280)
    if isinstance(width, list | tuple) and len(set(width)) > 1:
        raise InputError(f"UNet2DConditionModel with cross_attention_dim={width!r} is not supported: only one number")
    width = width[0] if isinstance(width, list | tuple) and width else width
    needs = {"prompt_embeds": Need((None, _whole({"cross_attention_dim": width}, "cross_attention_dim")))}
    if config.get("addition_embed_type") == "text_time":
        pooled = _whole(config, "projection_class_embeddings_input_dim") - 6 * _whole(config, "addition_time_embed_dim")
        needs |= {"pooled_prompt_embeds": Need((pooled,)), "time_ids": Need((6,))}
    if config.get("time_cond_proj_dim"):
        needs["guidance"] = Need((), optional=True)
    return needs


def _masked_needs(config: Config) -> dict[str, Need]:
    width, mask = _whole(config, "caption_channels"), Need((None,), kind="any")
    needs = {"prompt_embeds": Need((None, width)), "prompt_attention_mask": mask}
    if _told_the_size(config):
        needs |= {"resolution": Need((2,)), "aspect_ratio": Need((1,))}
    return needs | ({"guidance": Need(())} if config.get("guidance_embeds") else {})


def _told_the_size(config: Config) -> bool:
    own = config.get("use_additional_conditions")
    is_pixart = "num_embeds_ada_norm" in config
    return is_pixart and bool(config.get("sample_size") == 128 if own is None else own)


def _joint_needs(config: Config) -> dict[str, Need]:
    needs = {
        "prompt_embeds": Need((None, _whole(config, "joint_attention_dim"))),
        "pooled_prompt_embeds": Need((_whole(config, "pooled_projection_dim"),)),
    }
    return needs | ({"guidance": Need(())} if config.get("guidance_embeds") else {})


def _call_unet2d(model: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    if model.class_embedding is None:
        return model(x, time, return_dict=False)[0]
    labels = cond["label"]
    if not torch.compiler.is_compiling() and bool((labels < 0).any()):
        raise InputError("this UNet2DModel has no embedding for 'no class' (label -1): it cannot be guided by classes")
    return model(x, time, class_labels=labels, return_dict=False)[0]


def _call_unet(model: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    added = None
    if model.config.addition_embed_type == "text_time":
        added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": cond["time_ids"]}
    width, scale = model.config.time_cond_proj_dim, cond.get("guidance")
    told = None if width is None or scale is None else _embed_guidance(scale.float() - 1, width).to(x.dtype)
    return model(x, time, cond["prompt_embeds"], timestep_cond=told, added_cond_kwargs=added, return_dict=False)[0]


def _embed_guidance(w: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): the sinusoids of ``1000 w`` that latent consistency models are told (arXiv 2310.04378)."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=w.device, dtype=w.dtype) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w[:, None] * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def _call_dit(model: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    none = model.config.num_embeds_ada_norm
    label = cond.get("label")
    label = torch.full((len(x),), -1, device=x.device) if label is None else label
    return model(x, timestep=time, class_labels=torch.where(label < 0, none, label), return_dict=False)[0]


def _call_pixart(model: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return model(
        x,
        encoder_hidden_states=cond["prompt_embeds"],
        encoder_attention_mask=cond["prompt_attention_mask"],
        timestep=time,
        added_cond_kwargs={"resolution": cond.get("resolution"), "aspect_ratio": cond.get("aspect_ratio")},
        return_dict=False,
    )[0]


def _call_sd3(model: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return model(
        hidden_states=x,
        timestep=time,
        encoder_hidden_states=cond["prompt_embeds"],
        pooled_projections=cond["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


def _call_flux(model: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    b, c, h, w = x.shape
    rows, columns = torch.arange(h // 2, device=x.device), torch.arange(w // 2, device=x.device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2).float()
    tokens = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)
    out = model(
        hidden_states=tokens,
        timestep=time,
        guidance=cond["guidance"] if model.config.guidance_embeds else None,
        pooled_projections=cond["pooled_prompt_embeds"],
        encoder_hidden_states=cond["prompt_embeds"],
        txt_ids=torch.zeros(cond["prompt_embeds"].shape[1], 3, device=x.device),
        img_ids=nn.functional.pad(grid, (1, 0)),
        return_dict=False,
    )[0]
    return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def _call_sana(model: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    guidance = cond["guidance"] * model.config.guidance_embeds_scale if model.config.guidance_embeds else None
    return model(
        x,
        encoder_hidden_states=cond["prompt_embeds"],
        encoder_attention_mask=cond["prompt_attention_mask"],
        timestep=time * model.config.timestep_scale,
        guidance=guidance,
        return_dict=False,
    )[0]


def _unet_taps(model: Any) -> dict[str, str]:
    """The last residual block at each height, counted at the network's own sample size."""
    size = model.config.sample_size
    height = int(size[0] if isinstance(size, list | tuple) else size or 2 ** len(model.down_blocks))
    taps = {} if model.mid_block is None else {"bottleneck": "mid_block"}
    count = len(model.down_blocks)
    for i in range(count):
        encoder, decoder = model.down_blocks[i], model.up_blocks[count - 1 - i]
        taps[f"encoder{height >> i}"] = f"down_blocks.{i}.resnets.{len(encoder.resnets) - 1}"
        taps[f"decoder{height >> i}"] = f"up_blocks.{count - 1 - i}.resnets.{len(decoder.resnets) - 1}"
    return taps


def _block_taps(model: Any) -> dict[str, str]:
    return {f"block{k}": f"transformer_blocks.{k}" for k in range(len(model.transformer_blocks))}


def _flux_taps(model: Any) -> dict[str, str]:
    double, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
    return _block_taps(model) | {f"block{double + k}": f"single_transformer_blocks.{k}" for k in range(single)}


def _is_joint(class_name: str) -> bool:
    return class_name in ("SD3Transformer2DModel", "FluxTransformer2DModel")


def _embeds(model: Any) -> dict[str, int]:
    """Where the time's embedding is made, and its width; a DiT makes one in every block."""
    for place in ("time_embedding", "time_text_embed", "adaln_single.emb", "time_embed.emb"):
        module = model
        for part in place.split("."):
            module = getattr(module, part, None)
        if module is not None:
            return {place: _width(module)}
    blocks = getattr(model, "transformer_blocks", ())
    places = {f"transformer_blocks.{k}.norm1.emb": getattr(block.norm1, "emb", None) for k, block in enumerate(blocks)}
    return {place: _width(module) for place, module in places.items() if module is not None}


def _width(embedding: nn.Module) -> int:
    """What the embedder of the time alone returns: others beside it are added to that, or make up parts of it."""
    embedder = getattr(embedding, "timestep_embedder", embedding)
    last: Any = getattr(embedder, "linear_2", None)
    if last is None:
        raise InputError(f"{type(embedding).__name__} is an unknown embedding of the time")
    return int(last.out_features)


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Few-step adapters of U-Nets also change the convolutions (arXiv 2311.05556).
_UNET: tuple[str, ...] = (
    *_ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
)
_UNET += ("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
_JOINT: tuple[str, ...] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_JOINT += ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_FLUX = (*_JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family("unet", _call_unet2d, _class_needs, _unet_taps, (*_ATTENTION, "conv1", "conv2")),
    "UNet2DConditionModel": Family("unet", _call_unet, _unet_needs, _unet_taps, _UNET),
    "DiTTransformer2DModel": Family("transformer", _call_dit, _dit_needs, _block_taps, _ATTENTION),
    "PixArtTransformer2DModel": Family("transformer", _call_pixart, _masked_needs, _block_taps, _ATTENTION),
    "SD3Transformer2DModel": Family("transformer", _call_sd3, _joint_needs, _block_taps, _JOINT, flow=True),
    "FluxTransformer2DModel": Family(
        "transformer", _call_flux, _joint_needs, _flux_taps, _FLUX, True, "native", lambda config: 2, flow=True
    ),
    "SanaTransformer2DModel": Family("transformer", _call_sana, _masked_needs, _block_taps, _ATTENTION, flow=True),
}
"""The network classes of diffusers that can be teachers and students."""
