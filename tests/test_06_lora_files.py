"""LoRA files: what stock diffusers and peft make of them, and back into a generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Precond
from fewstep.core.generator import Generator
from fewstep.core.path import DDPM
from fewstep.core.state import load_tensors, save_tensors
from fewstep.errors import InputError
from fewstep.export.lora import apply_lora, save_lora, strip_lora, to_kohya
from fewstep.models.checkpointing import checkpointed
from fewstep.models.diffusers import FAMILIES
from fewstep.models.lora import Adapted, LoRA, adapter, share
from test_06_lora import LABELS, SMALL, X, far, moved, unet
from tiny_runs import furthest, tiny

pytest.importorskip("peft")


@pytest.fixture
def view() -> Adapted:
    return moved(adapter(unet().denoiser, SMALL))


def files_fit(view: Adapted, folder: Path, model: nn.Module, call: Callable[[Any], Tensor], expected: Tensor) -> None:
    """peft opens the folder on the plain network and gives the view's output."""
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    with torch.no_grad():
        assert far(call(loaded.base_model.model), expected) < 1e-5


def test_own_networks_write_what_peft_reads(view: Adapted, tmp_path: Path) -> None:
    save_lora(view, tmp_path)
    time = torch.zeros(3)
    expected = view.net(X, time, LABELS)
    assert far(expected, view.plain.net(X, time, LABELS)) > 1e-3
    files_fit(view, tmp_path, view.plain.net, lambda net: net(X, time, LABELS), expected)


def test_apply_scales_and_strip_gives_back(view: Adapted, tmp_path: Path) -> None:
    save_lora(view, tmp_path)
    start = unet()
    plain = start.denoiser(X, 1.0, LABELS)
    whole = apply_lora(start, tmp_path)
    assert far(whole.denoiser(X, 1.0, LABELS), view(X, 1.0, LABELS)) < 1e-5
    assert far(start.denoiser(X, 1.0, LABELS), plain) == 0
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    by_peft = apply_lora(start, tmp_path, scale=0.5)
    half = unet()
    for name, p in half.denoiser.named_parameters():
        p.data = (p.data + whole.denoiser.get_parameter(name).data) / 2
    assert far(by_peft.denoiser(X, 1.0, LABELS), half.denoiser(X, 1.0, LABELS)) < 1e-5
    stripped = strip_lora(by_peft, tmp_path, scale=0.5)
    assert far(stripped.denoiser(X, 1.0, LABELS), plain) < 1e-6 and stripped.card == start.card
    assert all(p.requires_grad for p in start.denoiser.parameters()), "flags are the caller's"


def test_a_lora_of_another_network_is_refused(view: Adapted, tmp_path: Path) -> None:
    save_lora(view, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(InputError, match=r"is for another network: this one lacks decoder"):
        apply_lora(tiny(), file)
    with pytest.raises(InputError, match=r"leave.lora_A.weight is \(2, 16, 1, 1\), expected \(2, 32, 1, 1\)"):
        apply_lora(tiny("unet", channels=16, multipliers=(1, 2), blocks=1, attention=(2,)), file)
    tensors = load_tensors(file)
    name = next(iter(tensors))
    save_tensors(tmp_path / "short.safetensors", {k: t for k, t in tensors.items() if k != name})
    with pytest.raises(InputError, match=r"another network: .*lora_"):
        apply_lora(unet(), tmp_path / "short.safetensors")
    save_tensors(tmp_path / "dora.safetensors", tensors | {"denoiser.enter.lora_magnitude_vector": torch.ones(1)})
    with pytest.raises(InputError, match="lora_magnitude_vector"):
        apply_lora(unet(), tmp_path / "dora.safetensors")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match="not a whole safetensors"):
        apply_lora(unet(), file)


class Outer(nn.Module):
    """A network of diffusers behind the library's signature."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.call(self.model, x, time)


def condition_unet(seed: int = 0) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip


def call_unet(model: Any, x: Tensor, time: Tensor) -> Tensor:
    return model(x, time, encoder_hidden_states=torch.linspace(-1, 1, 24).reshape(1, 3, 8).expand(len(x), 3, 8)).sample


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def call_sd3(model: Any, x: Tensor, time: Tensor) -> Tensor:
    text = torch.linspace(-1, 1, 24).reshape(1, 3, 8).expand(len(x), 3, 8)
    return model(x, encoder_hidden_states=text, pooled_projections=text[:, 0], timestep=time).sample


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    )  # fmt: skip


def call_flux(model: Any, x: Tensor, time: Tensor) -> Tensor:
    text = torch.linspace(-1, 1, 24).reshape(1, 3, 8).expand(len(x), 3, 8)
    tokens = x.flatten(2).transpose(1, 2)
    ids = torch.stack([torch.zeros(64), torch.arange(64) // 8, torch.arange(64) % 8], 1)
    out = model(
        tokens,
        encoder_hidden_states=text,
        pooled_projections=text[:, 0],
        timestep=time,
        img_ids=ids,
        txt_ids=torch.zeros(3, 3),
    ).sample
    return out.transpose(1, 2).reshape(x.shape)


def sana() -> Any:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=2, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        patch_size=1,
    )  # fmt: skip


def call_sana(model: Any, x: Tensor, time: Tensor) -> Tensor:
    text = torch.linspace(-1, 1, 24).reshape(1, 3, 8).expand(len(x), 3, 8)
    return model(x, encoder_hidden_states=text, timestep=time).sample


STOCK = {
    "StableDiffusionLoraLoaderMixin": (condition_unet, call_unet, "unet"),
    "SD3LoraLoaderMixin": (sd3, call_sd3, "transformer"),
    "FluxLoraLoaderMixin": (flux, call_flux, "transformer"),
    "SanaLoraLoaderMixin": (sana, call_sana, "transformer"),
}


def wrapped(make: Callable[[], nn.Module], call: Callable[..., Tensor]) -> Precond:
    model = make()
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return Precond(Outer(model.eval(), call), (4, 8, 8), path=DDPM, predicts="noise")


@pytest.mark.parametrize("mixin", STOCK)
def test_stock_pipelines_read_the_file(mixin: str, tmp_path: Path) -> None:
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    make, call, part = STOCK[mixin]
    denoiser = wrapped(make, call)
    view = moved(adapter(denoiser, LoRA(rank=3, alpha=5)))
    usual = FAMILIES[type(denoiser.net.model).__name__].lora_targets
    assert {n for n in view.targets if n.endswith("to_q")} and all(n.startswith("model.") for n in view.targets)
    assert all(n.endswith(usual) for n in view.targets)
    save_lora(view, tmp_path)
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    with torch.no_grad():
        expected, plain = view.net(x, time, {}), denoiser.net(x, time, {})
    assert far(expected, plain) > 1e-4
    found = getattr(loaders, mixin).lora_state_dict(tmp_path, return_lora_metadata=True)
    state, metadata = found[0], found[-1]
    assert metadata[f"{part}.r"] == 3 and metadata[f"{part}.lora_alpha"] == 5
    stock = make()
    stock.load_state_dict(denoiser.net.model.state_dict())
    stock.eval().load_lora_adapter(state, prefix=part, metadata=metadata)
    with torch.no_grad():
        assert far(call(stock, x, time), expected) < 1e-5
        stock.fuse_lora()
        assert far(call(stock, x, time), expected) < 1e-5
        stock.unfuse_lora()
        stock.unload_lora()
        assert far(call(stock, x, time), plain) < 1e-5
    again = apply_lora(Generator(denoiser, unet().sampler), tmp_path)
    with torch.no_grad():
        assert far(again.denoiser.net(x, time, {}), expected) < 1e-5


def test_a_pipeline_loads_fuses_and_unfuses_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    denoiser = wrapped(condition_unet, call_unet)
    view = moved(adapter(denoiser, LoRA(rank=3, alpha=5)))
    save_lora(view, tmp_path, kohya=True)
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=copy.deepcopy(denoiser.net.model), scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    with torch.no_grad():
        expected, plain = view.net(x, time, {}), denoiser.net(x, time, {})
        for weight in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):
            pipe.load_lora_weights(tmp_path, weight_name=weight)
            assert far(call_unet(pipe.unet, x, time), expected) < 1e-5, weight
            pipe.fuse_lora()
            assert far(call_unet(pipe.unet, x, time), expected) < 1e-5
            pipe.unfuse_lora()
            pipe.unload_lora_weights()
            assert far(call_unet(pipe.unet, x, time), plain) < 1e-5


def test_networks_that_diffusers_loads_no_lora_into_get_a_peft_folder(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    def make() -> Any:
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
            attention_head_dim=4,
        )  # fmt: skip

    denoiser = wrapped(make, lambda model, x, time: model(x, time).sample)
    view = moved(adapter(denoiser, LoRA(rank=3, alpha=5)))
    save_lora(view, tmp_path)
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    with torch.no_grad():
        files_fit(view, tmp_path, denoiser.net.model, lambda m: m(x, time).sample, view.net(x, time, {}))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 5
    with pytest.raises(InputError, match="not for a UNet2DModel"):
        save_lora(view, tmp_path, kohya=True)


def test_kohya_names() -> None:
    made = to_kohya({"down.0.to_q.lora_A.weight": torch.ones(2, 4), "down.0.to_q.lora_B.weight": torch.ones(4, 2)}, 6)
    start = "lora_unet_down_0_to_q"
    assert set(made) == {f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha"}
    assert float(made[f"{start}.alpha"]) == 6 and made[f"{start}.lora_down.weight"].shape == (2, 4)


@pytest.mark.parametrize("mixin", STOCK)
def test_stock_networks_checkpoint_to_the_same_gradients(mixin: str) -> None:
    make, call, _ = STOCK[mixin]
    shared = share(wrapped(make, call), LoRA(rank=2))
    a, b = moved(copy.deepcopy(shared), 1).requires_grad_(True), moved(copy.deepcopy(shared), 2)
    x, time, grads = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0]), []
    for on in (False, True):
        with checkpointed([shared, a, b] if on else []):
            y = a.net(x, time, {})
            (shared.net(y, time, {}) - b.net(y, time, {})).square().mean().backward()
        grads.append({n: p.grad for n, p in a.named_parameters()})
        a.zero_grad(set_to_none=True)
    assert furthest(*grads)[0] <= 1e-6 and not a.net.model.is_gradient_checkpointing
