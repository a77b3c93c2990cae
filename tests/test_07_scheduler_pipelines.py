"""TableauScheduler inside the pipelines of diffusers, on tiny random networks: the stock scheduler's picture."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.solve import build

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from fewstep.export.scheduler import TableauScheduler  # noqa: E402

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = {**BETAS, "timestep_spacing": "trailing"}
STEPS = 4


def vae(channels: int = 4, **more: Any) -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **more,
    ).eval()


def unet(**more: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    ).eval()


def text_config(**more: Any) -> Any:
    size = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return transformers.CLIPTextConfig(**size, vocab_size=100, projection_dim=8, **more)


@cache
def stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(text_config()).eval(),
        tokenizer=None,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(**VP, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def prompt(seed: int = 5, width: int = 8) -> Tensor:
    return torch.randn(1, 7, width, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, scheduler: Any, **call: Any) -> Tensor:
    """The picture, or the latents, of a pipeline with a scheduler."""
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    found = pipe(generator=torch.Generator().manual_seed(0), **options).images
    assert bool(torch.as_tensor(found).isfinite().all())
    return torch.as_tensor(found)


def same(pipe: Any, config: dict[str, Any], tolerance: float = 1e-4, **call: Any) -> None:
    """The stock scheduler's picture and that of its table."""
    stock = getattr(diffusers, config["_class_name"]).from_config(config)
    table = fewstep.trace(config, steps=STEPS, **call.pop("trace", {}))
    wanted = run(pipe, stock, **call)
    got = run(pipe, TableauScheduler.from_tableau(table, like=stock), **call)
    assert float((got - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))
    assert float(wanted.std()) > 0.05


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_stable_diffusion(name: str, kind: str) -> None:
    config = {"_class_name": name, **VP, "prediction_type": kind}
    config |= {"clip_sample": False} if name.startswith("DDIM") else {}
    same(stable_diffusion(), config, prompt_embeds=prompt(), negative_prompt_embeds=prompt(6), guidance_scale=2.0)


def test_stable_diffusion_with_a_noisy_sampler() -> None:
    config = {"_class_name": "LCMScheduler", **BETAS, "original_inference_steps": 4}
    same(stable_diffusion(), config, prompt_embeds=prompt(), guidance_scale=1.0)


@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
def test_image_to_image(strength: float) -> None:
    base = stable_diffusion()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    config = {"_class_name": "DDIMScheduler", **VP, "clip_sample": False}
    given = {"image": image, "prompt_embeds": prompt(), "guidance_scale": 1.0, "strength": strength}
    same(pipe, config, **given)
    # A multistep table also starts in the middle, as its stock scheduler does.
    same(pipe, {"_class_name": "DPMSolverMultistepScheduler", **VP}, **given)


def test_inpainting() -> None:
    base = stable_diffusion()
    pipe = diffusers.StableDiffusionInpaintPipeline(**base.components, requires_safety_checker=False)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    given = {"image": torch.rand(1, 3, 16, 16), "mask_image": mask, "prompt_embeds": prompt(), "guidance_scale": 1.0}
    config = {"_class_name": "DDIMScheduler", **VP, "clip_sample": False}
    same(pipe, config, height=16, width=16, strength=0.75, **given)


def test_stable_diffusion_xl() -> None:
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(text_config()).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text_config()).eval(),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**VP),
        add_watermarker=False,
    )
    pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    given = {"prompt_embeds": prompt(), "pooled_prompt_embeds": pooled, "guidance_scale": 1.0}
    same(pipe, {"_class_name": "EulerDiscreteScheduler", **VP}, **given, height=16, width=16)


def test_flux() -> None:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    # A latent space of 4 channels, packed two by two.
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, shift_factor=0.0, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    given = {"prompt_embeds": prompt(), "pooled_prompt_embeds": pooled, "height": 16, "width": 16}
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    wanted = run(pipe, stock, **given)
    # The pipeline gives a stock scheduler its own sigmas, so that the table is traced on those.
    table = fewstep.trace(config, sigmas=[1 - k / STEPS for k in range(STEPS)])
    got = run(pipe, TableauScheduler.from_tableau(table, like=stock), **given)
    assert float((got - wanted).abs().max()) <= 1e-4


def test_stable_diffusion_3() -> None:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()
    none: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(), **none
    )
    pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    given = {
        "prompt_embeds": prompt(),
        "pooled_prompt_embeds": pooled,
        "height": 16,
        "width": 16,
        "guidance_scale": 1.0,
    }
    same(pipe, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, **given)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dit(scale: float) -> None:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=4,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    ).eval()
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=diffusers.DDIMScheduler())
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "trailing"}
    same(pipe, config, class_labels=[3], guidance_scale=scale, output_type="np")


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_ddpm(name: str) -> None:
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    pipe = diffusers.DDPMPipeline(unet=net, scheduler=diffusers.DDPMScheduler())
    same(pipe, {"_class_name": name, "clip_sample": False, "timestep_spacing": "trailing"}, output_type="np")


def test_a_pipeline_is_told_its_number_of_steps() -> None:
    pipe = stable_diffusion()
    stock = diffusers.DDIMScheduler(**VP, clip_sample=False)
    made = TableauScheduler.from_tableau(fewstep.trace(stock, steps=STEPS), like=stock)
    with pytest.raises(ValueError, match="num_inference_steps=50, but this scheduler runs"):
        run(pipe, made, prompt_embeds=prompt(), guidance_scale=1.0, num_inference_steps=50)


def test_a_solver_of_this_library_in_a_pipeline_starts_at_its_own_level() -> None:
    pipe, stock = stable_diffusion(), diffusers.DDIMScheduler(**VP, clip_sample=False)
    levels = fewstep.trace(stock, steps=STEPS).levels
    made = TableauScheduler.from_tableau(build("dpmpp2m", levels), like=stock)
    assert made.init_noise_sigma == pytest.approx(float(levels[0]) / math.hypot(1.0, float(levels[0])))
    ours = run(pipe, made, prompt_embeds=prompt(), guidance_scale=1.0)
    unit = TableauScheduler.from_tableau(
        build("dpmpp2m", levels), like=stock, start_std=math.hypot(1.0, float(levels[0]))
    )
    wanted = run(pipe, diffusers.DPMSolverMultistepScheduler(**VP), prompt_embeds=prompt(), guidance_scale=1.0)
    assert float((run(pipe, unit, prompt_embeds=prompt(), guidance_scale=1.0) - wanted).abs().max()) <= 1e-4
    assert 1e-4 < float((ours - wanted).abs().max()) < 0.2
