"""k-diffusion's checkpoints: the reference code's numbers, configurations, and files that are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep import Generator, InputError
from fewstep.models.k_unet import KUNet, KUNetConfig
from fewstep.sources.kdiffusion import load_kdiffusion


def config(patch: int = 1, variance: bool = False, augment: bool = True, **changes: Any) -> dict[str, Any]:
    model = {
        "type": "image_v1",
        "input_channels": 3,
        "input_size": [16, 16],
        "patch_size": patch,
        "mapping_out": 32,
        "depths": [1, 2],
        "channels": [32, 64],
        "self_attn_depths": [False, True],
        "has_variance": variance,
        "dropout_rate": 0.05,
        "augment_wrapper": augment,
        "sigma_data": 0.6,
        "sigma_min": 0.01,
        "sigma_max": 80,
    }
    return {"model": {k: v for k, v in {**model, **changes}.items() if v is not None}}


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights from a formula, with the names of a checkpoint."""
    model = config["model"]
    augment = model["augment_wrapper"]
    size = KUNetConfig(
        (3, 16, 16),
        32,
        model["depths"],
        model["channels"],
        model["self_attn_depths"],
        model["patch_size"],
        9 if augment else 0,
        model["has_variance"],
    )
    out = {}
    for k, (name, value) in enumerate(sorted(KUNet(size).state_dict().items())):
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * (1 + 0.1 * math.sqrt(2 + k)) + k)
        scale = 0.2 if value.ndim == 1 else 1.2 / math.sqrt(math.prod(value.shape[1:]))
        scale *= 6 if name.endswith("qkv_proj.weight") else 1
        made = value if name.endswith("kernel") else (wave * scale).float().reshape(value.shape)
        out["inner_model." * augment + name] = made
    return out


def picture() -> torch.Tensor:
    return torch.sin(torch.arange(2 * 3 * 256, dtype=torch.float64) * 0.37).float().reshape(2, 3, 16, 16)


def far(a: torch.Tensor, b: torch.Tensor | list[float]) -> float:
    return float((a - torch.as_tensor(b, dtype=a.dtype)).abs().max())


def write(root: Path, body: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> Path:
    path = root / "model.safetensors"
    save_file(tensors, path, None if body is None else {"config": json.dumps(body)})
    return path


GOLDEN = [
    ((1, False, True), [0.042181, 0.951739, 0.633967, -0.454642, 0.261366, -0.245714, -0.063132]),
    ((2, True, False), [0.007237, 0.91833, 0.651403, -0.460933, -0.089528, 0.135393, 0.150811]),
]
SIGMA = torch.tensor([0.05, 2.5])


@pytest.mark.parametrize(("which", "expected"), GOLDEN)
@pytest.mark.parametrize("place", ["metadata", "file", "mapping"])
def test_numbers_of_the_reference_code(
    tmp_path: Path, which: tuple[int, bool, bool], expected: list[float], place: str
) -> None:
    body = config(*which)
    path = write(tmp_path, body if place == "metadata" else None, weights(body))
    (tmp_path / "config.json").write_text(json.dumps(body))
    given = {"metadata": None, "file": tmp_path / "config.json", "mapping": body}[place]
    made = load_kdiffusion(path, given)
    assert far(made.denoiser(picture(), SIGMA).flatten()[::241], expected) < 2e-6
    assert made.card["source"]["model"]["channels"] == [32, 64]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    body = config()
    return load_kdiffusion(write(tmp_path_factory.mktemp("k"), body, weights(body)))


def test_the_levels_and_the_sampler(made: Generator) -> None:
    assert (made.denoiser.sigma_min, made.denoiser.sigma_max, made.denoiser.sigma_data) == (0.01, 80.0, 0.6)
    assert (made.sampler.start, made.sampler.end, made.sampler.nfe) == (80.0, 0.0, 50)
    assert made.sample(1, seed=1).shape == (1, 3, 16, 16)


def test_a_saved_folder_gives_the_same(made: Generator, tmp_path: Path) -> None:
    back = Generator.load(made.save(tmp_path / "saved"))
    assert far(back.denoiser(picture(), SIGMA), made.denoiser(picture(), SIGMA)) == 0
    assert back.fingerprint() == made.fingerprint()


def test_half_precision_keeps_the_rates_of_the_time(made: Generator, tmp_path: Path) -> None:
    body = config()
    path = write(tmp_path, body, weights(body))
    half = load_kdiffusion(path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    assert torch.equal(half.denoiser.net.timestep_embed.weight, made.denoiser.net.timestep_embed.weight)
    assert far(half.denoiser(picture(), SIGMA), made.denoiser(picture(), SIGMA)) < 0.1


def test_taps_have_their_heights(made: Generator) -> None:
    _, found = made.denoiser.features(picture(), 1.0, None, ("encoder16", "encoder8", "bottleneck"))
    assert {k: v.shape[1:] for k, v in found.items()} == {
        "encoder16": (32, 16, 16),
        "encoder8": (64, 8, 8),
        "bottleneck": (64, 8, 8),
    }


def test_dropout_only_when_training(made: Generator, tmp_path: Path) -> None:
    assert far(made.denoiser(picture(), SIGMA), made.denoiser(picture(), SIGMA)) == 0
    body = config(dropout_rate=0.5)
    other = load_kdiffusion(write(tmp_path, body, weights(body)))
    assert far(other.denoiser(picture(), SIGMA), made.denoiser(picture(), SIGMA)) == 0
    other.denoiser.train()
    assert far(other.denoiser(picture(), SIGMA), made.denoiser(picture(), SIGMA)) > 1e-3


BAD: list[tuple[dict[str, Any] | None, str]] = [
    (None, "has no configuration in its metadata: pass config="),
    ({"dataset": {}}, "has no 'model'"),
    (
        config(type="image_transformer_v2"),
        "model type 'image_transformer_v2', which is not supported: expected image_v1",
    ),
    (config(channels=None), "incomplete or garbled at 'model': 'channels'"),
    (config(input_size=16), "incomplete or garbled"),
    (config(input_size=[15, 15]), "cannot be divided by 2"),
    (config(depths=[1, 2, 3]), "as many depths, channels and self-attention flags"),
    (config(channels=[32, 100]), "100 channels cannot be split"),
    (config(depths=[1, 1]), "holds another architecture: missing .*; unknown u_net.d_blocks.1.3"),
    (config(augment_wrapper=False), "holds another architecture: missing"),
    (config(mapping_cond_dim=4), "mapping_cond_dim=4 is not supported"),
    (config(skip_stages=1), "skip_stages=1 is not supported"),
    (config(sigma_data=0), "sigma_data=0.0: expected"),
    (config(sigma_min=90), "0 < sigma_min < sigma_max"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_bad_configurations(tmp_path: Path, body: dict[str, Any] | None, message: str) -> None:
    path = write(tmp_path, body, weights(config()))
    with pytest.raises(InputError, match=message):
        load_kdiffusion(path)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_kdiffusion(tmp_path / "none.safetensors")
    path = write(tmp_path, config(), weights(config()))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_kdiffusion(path)
    torch.save({"config": config(), "model_ema": weights(config())}, tmp_path / "training.pt")
    with pytest.raises(InputError, match="named tensors alone, but 'config' is a dict"):
        load_kdiffusion(tmp_path / "training.pt")


def test_a_label_is_refused(made: Generator) -> None:
    with pytest.raises(InputError, match="no classes"):
        made.denoiser(picture(), 1.0, {"label": torch.tensor([0, 1])})
