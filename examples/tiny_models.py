"""Tiny random pipelines of diffusers, made offline from the real classes: each call gives the same weights.

What diffusers initialises with zeros is made random too, because a network that prints zeros tests nothing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "house",
    "on",
    "in",
    "of",
    "painting",
    "photo",
    "tree",
    "small",
    "big",
]


def randomised(module: nn.Module, seed: int = 0, scale: float = 0.1) -> Any:
    """All parameters drawn anew: matrices of a size that keeps activations near 1, biases and norms not constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(drawn / max(1, p[0].numel()) ** 0.5)
            else:
                p.copy_(drawn * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


def clip_tokenizer(length: int = 16) -> Any:
    from transformers import CLIPTokenizer

    vocab: dict[str, int] = {}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab[letter] = len(vocab)
        vocab[letter + "</w>"] = len(vocab)
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=length)


def clip_encoder(seed: int, *, project: bool = False, width: int = 8) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    kind = CLIPTextModelWithProjection if project else CLIPTextModel
    return randomised(kind(config), seed)


def word_tokenizer(kind: str = "PreTrainedTokenizerFast") -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    if kind == "T5TokenizerFast":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -5.0)]
        pieces += [("▁" + word, -2.0) for word in WORDS] + [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyz"]
        return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=16)
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<bos>", *WORDS])}
    body = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    body.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "bos_token": "<bos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=body, model_max_length=512, **marks)


def t5_encoder(seed: int, width: int = 8) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, is_gated_act=True, dropout_rate=0.0
    )
    return randomised(T5EncoderModel(config), seed)


def kl(channels: int = 4, seed: int = 7, **config: Any) -> Any:
    """An autoencoder that halves the sides once."""
    from diffusers import AutoencoderKL

    fields: dict[str, Any] = {
        "latent_channels": channels,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "scaling_factor": 0.5,
        "sample_size": 16,
    }
    return randomised(AutoencoderKL(**{**fields, **config}), seed)


def _unet(seed: int = 1, **config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    fields: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    return randomised(UNet2DConditionModel(**{**fields, **config}), seed)


_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(prediction_type: str = "epsilon", zero_snr: bool = False, **unet: Any) -> Any:
    """A StableDiffusionPipeline with DDIM; ``zero_snr`` has the last level at pure noise and trailing steps."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    extra: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    extra = extra or {"steps_offset": 1, "set_alpha_to_one": False}
    scheduler = DDIMScheduler(**_SD_BETAS, clip_sample=False, prediction_type=prediction_type, **extra)
    return StableDiffusionPipeline(
        vae=kl(),
        text_encoder=clip_encoder(2),
        tokenizer=clip_tokenizer(),
        unet=_unet(**unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """A StableDiffusionXLPipeline with EulerDiscreteScheduler."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=kl(),
        text_encoder=clip_encoder(2),
        text_encoder_2=clip_encoder(3, project=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_SD_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def dit() -> Any:
    """A DiTPipeline of 1000 classes with DDIM and a learned variance that nothing uses."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    # The stock pipeline's null class is number 1000, whatever the network has.
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    names = {0: "tench", 1: "goldfish, Carassius auratus", 2: "shark"}
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = DiTPipeline(transformer=randomised(transformer, 4), vae=kl(), scheduler=scheduler, id2label=names)
    pipe.register_to_config(id2label=names)
    return pipe


def pixart(sigma: bool = False) -> Any:
    """A PixArtAlphaPipeline that is told the size of the picture, or a PixArtSigmaPipeline, which is not."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        caption_channels=8,
        cross_attention_dim=12,
        use_additional_conditions=False,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=word_tokenizer("T5TokenizerFast"),
        text_encoder=t5_encoder(5),
        vae=kl(),
        transformer=randomised(transformer, 6),
        scheduler=scheduler,
    )


def sd3(shift: float = 3.0) -> Any:
    """A StableDiffusion3Pipeline with all three text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=randomised(transformer, 8),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=kl(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_encoder(2, project=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(3, project=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(5, 16),
        tokenizer_3=word_tokenizer("T5TokenizerFast"),
    )


def flux(guidance: bool = True) -> Any:
    """A FluxPipeline whose scheduler shifts with the size of the picture."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        transformer=randomised(transformer, 9),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_encoder(2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(5),
        tokenizer_2=word_tokenizer("T5TokenizerFast"),
    )


def sana() -> Any:
    """A SanaPipeline with a Gemma 2 text encoder, an AutoencoderDC and DPM-Solver++ on a flow."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    gemma = Gemma2Config(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=16,
        patch_size=1,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    return SanaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=randomised(Gemma2Model(gemma), 10),
        vae=randomised(vae, 11),
        transformer=randomised(transformer, 12),
        scheduler=scheduler,
    )


def ddpm(classes: bool = False) -> Any:
    """A DDPMPipeline of 8x8 pictures; with ``classes`` its network knows 3 classes, which the pipeline does not."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=3 if classes else None,
    )
    return DDPMPipeline(unet=randomised(unet, 13), scheduler=DDPMScheduler(clip_sample=False))


MAKERS = {
    "stable_diffusion": stable_diffusion,
    "sdxl": sdxl,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "ddpm": ddpm,
}


def folder_of(pipe: Any, place: str | Path | None = None) -> str:
    """The folder of a pipeline that is written now, for those who open one by its place; a temporary one by default."""
    folder = str(place or tempfile.mkdtemp(prefix="tiny-"))
    pipe.save_pretrained(folder)
    return folder
