"""OpenAI's checkpoints: the reference code's numbers, what is recognised, and files that are none."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep import Generator, InputError, Noise
from fewstep.models.guided import GuidedUNet, GuidedUNetConfig
from fewstep.solve.consistency import consistency
from fewstep.solve.iddpm import LearnedVariance
from fewstep.sources import kind_of, load
from fewstep.sources.openai import (
    is_consistency,
    load_consistency,
    load_guided,
    multistep_levels,
    read_checkpoint,
    recognise,
)
from fewstep.sources.openai_presets import PRESETS

TINY: dict[str, Any] = {"shape": (3, 8, 8), "channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}
PLAIN = GuidedUNetConfig(
    **TINY, classes=5, heads=2, head_channels=0, scale_shift=False, updown=False, learn_variance=True
)
UPDOWN = GuidedUNetConfig(**TINY, head_channels=16, new_order=True)
STUDENT = GuidedUNetConfig(**TINY, classes=5, head_channels=16, new_order=True)
SAID_PLAIN: dict[str, Any] = {"image_size": 8, "num_heads": 2, "noise_schedule": "linear"}
SAID_UPDOWN: dict[str, Any] = {
    "image_size": 8,
    "num_head_channels": 16,
    "noise_schedule": "cosine",
    "use_new_attention_order": True,
}
SAID_STUDENT: dict[str, Any] = {"image_size": 8, "num_head_channels": 16, "distillation": True}


def weights(config: GuidedUNetConfig) -> dict[str, torch.Tensor]:
    """Weights from a formula, all of them large enough to matter."""
    out = {}
    for k, (name, value) in enumerate(sorted(GuidedUNet(config).state_dict().items())):
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * (1 + 0.1 * math.sqrt(2 + k)) + k)
        size = 0.2 if value.ndim == 1 else 1.2 / math.sqrt(math.prod(value.shape[1:]))
        size *= 6 if name.endswith("qkv.weight") else 1
        out[name] = (wave * size).float().reshape(value.shape)
    return out


def flat_attention(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the consistency-models repository writes them: its attention projects by two-dimensional convolutions."""
    ends = (".qkv.weight", ".proj_out.weight")
    return {k: v[..., None] if k.endswith(ends) else v for k, v in tensors.items()}


def picture() -> torch.Tensor:
    return torch.sin(torch.arange(2 * 3 * 64, dtype=torch.float64) * 0.37).float().reshape(2, 3, 8, 8)


def picked(x: torch.Tensor) -> torch.Tensor:
    return x.flatten()[::61].double()


def far(a: torch.Tensor, b: torch.Tensor | list[float]) -> float:
    return float((a - torch.as_tensor(b, dtype=a.dtype)).abs().max())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("openai")
    torch.save(weights(PLAIN), root / "plain.pt")
    torch.save(weights(UPDOWN), root / "updown.pt")
    save_file(weights(UPDOWN), root / "updown.safetensors")
    torch.save(flat_attention(weights(STUDENT)), root / "student.pt")
    return root


@pytest.fixture(scope="module")
def plain(files: Path) -> Generator:
    return load_guided(files / "plain.pt", **SAID_PLAIN)


LABEL = {"label": torch.tensor([1, 4])}
STEPS = torch.tensor([20, 700])

# ---- numbers of the reference code, on the weights above


def test_plain_blocks_with_classes_and_learned_variance(plain: Generator) -> None:
    D = plain.denoiser
    with torch.no_grad():
        out = D.net(picture(), STEPS.float(), LABEL)
    assert far(picked(out), [-0.189601, -0.167821, -0.005504, 0.144894, -0.18188, 0.02389, 0.221977]) < 2e-6
    sigma = D.path.levels[STEPS]
    x = picture() * (1 + sigma**2).sqrt().float().reshape(2, 1, 1, 1)
    x0, found = D.features(x, sigma, LABEL, ("logvar_frac",))
    expected = [0.015054, -0.53546, 0.919203, -1.000902, 11.060102, -3.241381, -6.596551]
    assert far(picked(x0), expected) < 1e-5
    betas = torch.tensor(D.path.betas, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    large = betas[STEPS].log()
    small = (betas[STEPS] * (1 - kept[STEPS - 1]) / (1 - kept[STEPS])).log()
    logvar = small.reshape(2, 1, 1, 1) + found["logvar_frac"] * (large - small).reshape(2, 1, 1, 1)
    expected = [-7.648761, -7.649772, -7.652069, -7.63683, -4.265618, -4.265623, -4.265607]
    assert far(picked(logvar), expected) < 1e-5


@pytest.mark.parametrize("file", ["updown.pt", "updown.safetensors"])
def test_residual_resampling_with_scale_and_shift(files: Path, file: str) -> None:
    D = load_guided(files / file, **SAID_UPDOWN).denoiser
    with torch.no_grad():
        out = D.net(picture(), STEPS.float(), {})
    assert far(picked(out), [-0.177954, -0.170355, 0.125854, 0.127082, -0.172074, 0.107296, 0.110794]) < 2e-6
    sigma = D.path.levels[STEPS]
    x0 = D(picture() * (1 + sigma**2).sqrt().float().reshape(2, 1, 1, 1), sigma)
    assert far(picked(x0), [0.007735, -0.540175, 0.911278, -0.992749, 1.978821, -0.758244, -0.944714]) < 1e-5


@pytest.mark.parametrize(
    ("distilled", "expected"),
    [
        (False, [6.4e-05, -0.54641, 0.917315, -0.986686, 0.061157, -0.090354, 0.09372]),
        (True, [5.1e-05, -0.546576, 0.917087, -0.98667, 0.061174, -0.090304, 0.093616]),
    ],
)
def test_karras_models_and_their_students(files: Path, distilled: bool, expected: list[float]) -> None:
    made = load_consistency(files / "student.pt", **{**SAID_STUDENT, "distillation": distilled})
    assert far(picked(made.denoiser(picture(), torch.tensor([0.01, 2.5]), LABEL)), expected) < 2e-6


# ---- what must hold


def test_a_consistency_model_is_the_identity_at_its_lowest_level(files: Path) -> None:
    x = picture()
    student = load_consistency(files / "student.pt", **SAID_STUDENT)
    teacher = load_consistency(files / "student.pt", **{**SAID_STUDENT, "distillation": False})
    assert far(student.denoiser(x, 0.002, LABEL), x) < 1e-8
    assert far(teacher.denoiser(x, 0.002, LABEL), x) > 1e-4
    other = load_consistency(files / "student.pt", **SAID_STUDENT, sigma_min=0.1)
    assert far(other.denoiser(x, 0.1, LABEL), x) < 1e-7
    assert far(other.denoiser(x, 0.1, LABEL), student.denoiser(x, 0.1, LABEL)) > 1e-3


@pytest.mark.parametrize("changes", [{"use_new_attention_order": False}, {"num_head_channels": 32}])
def test_the_order_and_the_number_of_heads_matter(files: Path, changes: dict[str, Any]) -> None:
    right = load_guided(files / "updown.pt", **SAID_UPDOWN).denoiser
    wrong = load_guided(files / "updown.pt", **{**SAID_UPDOWN, **changes}).denoiser
    assert far(right(picture(), 1.0), wrong(picture(), 1.0)) > 1e-4


def test_no_label_adds_no_class_embedding(plain: Generator) -> None:
    net = plain.denoiser.net
    x, time = picture(), torch.tensor([20.0, 700.0])
    bare = net(x, time, {})
    assert far(net(x, time, {"label": torch.tensor([-1, -1])}), bare) == 0
    mixed = net(x, time, {"label": torch.tensor([-1, 4])})
    assert far(mixed[0], bare[0]) < 1e-6
    assert far(mixed[1], bare[1]) > 1e-4


def test_rescaled_time_steps(files: Path) -> None:
    said = {**SAID_UPDOWN, "diffusion_steps": 4000}
    raw, scaled = (load_guided(files / "updown.pt", **said, rescale_timesteps=r).denoiser.net for r in (False, True))
    x = picture()
    assert far(scaled(x, torch.tensor([80.0, 2000.0]), {}), raw(x, torch.tensor([20.0, 500.0]), {})) < 1e-6
    assert far(scaled(x, torch.tensor([80.0, 2000.0]), {}), raw(x, torch.tensor([80.0, 2000.0]), {})) > 1e-4


def test_default_samplers(files: Path, plain: Generator) -> None:
    levels = plain.denoiser.path.levels
    assert plain.sampler.nfe == 25
    assert far(plain.sampler.levels[:-1], levels[torch.arange(960, -1, -40)]) == 0
    student = load_consistency(files / "student.pt", **SAID_STUDENT)
    assert student.sampler.levels.tolist() == [80.0, 0.0]
    assert student.sampler.nfe == 1
    out = student.sample(2, LABEL, seed=3)
    x = 80 * Noise.of(3, 2).normal((3, 8, 8), "start")
    assert far(out, student.denoiser(x, 80.0, LABEL).clamp(-1, 1)) < 1e-6
    teacher = load_consistency(files / "student.pt", **{**SAID_STUDENT, "distillation": False})
    assert teacher.sampler.nfe == 79
    assert teacher.sampler.end == 0


def test_learned_variance_can_be_sampled_with(plain: Generator) -> None:
    levels = plain.denoiser.path.levels[[999, 600, 200]].tolist()
    sampler = LearnedVariance([*levels, 0.0], clip=True)
    out = plain.sample(2, LABEL, sampler=sampler)
    assert out.shape == (2, 3, 8, 8)
    assert far(out, plain.sample(2, LABEL, sampler=sampler)) == 0
    assert "logvar_frac" in plain.denoiser.taps


def test_taps_have_their_heights(plain: Generator) -> None:
    names = ("encoder8", "encoder4", "bottleneck", "decoder4", "decoder8")
    _, found = plain.denoiser.features(picture(), 1.0, LABEL, names)
    heights = {name: found[name].shape[1:] for name in names}
    assert heights == {
        "encoder8": (32, 8, 8),
        "encoder4": (64, 4, 4),
        "bottleneck": (64, 4, 4),
        "decoder4": (64, 4, 4),
        "decoder8": (32, 8, 8),
    }


@pytest.mark.parametrize("loader", ["guided", "consistency"])
def test_a_saved_folder_gives_the_same(files: Path, plain: Generator, tmp_path: Path, loader: str) -> None:
    made = plain if loader == "guided" else load_consistency(files / "student.pt", **SAID_STUDENT)
    back = Generator.load(made.save(tmp_path / "saved"))
    for sigma in (0.01, 3.0):
        assert far(back.denoiser(picture(), sigma, LABEL), made.denoiser(picture(), sigma, LABEL)) == 0
    assert back.fingerprint() == made.fingerprint()
    assert back.card == made.card
    assert back.conds == made.conds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_close(files: Path, plain: Generator, dtype: torch.dtype) -> None:
    other = load_guided(files / "plain.pt", **SAID_PLAIN, dtype=dtype)
    assert {p.dtype for p in other.denoiser.parameters()} == {dtype}
    off = far(other.denoiser(picture(), 0.5, LABEL), plain.denoiser(picture(), 0.5, LABEL))
    assert off < (1e-5 if dtype is torch.float64 else 3e-2)


def test_loading_draws_nothing_and_keeps_the_file(files: Path) -> None:
    before = (files / "plain.pt").read_bytes()
    state = torch.get_rng_state()
    made = load_guided(files / "plain.pt", **SAID_PLAIN)
    assert torch.equal(torch.get_rng_state(), state)
    made.denoiser.requires_grad_(True)
    with torch.no_grad():
        for p in made.denoiser.parameters():
            p.add_(1)
    assert (files / "plain.pt").read_bytes() == before


# ---- recognition


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": 3, "learn_variance": True},
        {"multipliers": (0.5, 1, 2), "channels": 64, "attention": (8, 2)},
        {"multipliers": (1, 1, 3), "blocks": 2, "attention": (), "updown": False},
        {"multipliers": (2,), "attention": (8,), "scale_shift": False},
        {"shape": (4, 8, 8), "updown": False, "scale_shift": False, "blocks": 3},
    ],
)
def test_the_recognised_architecture_is_the_one_made(changes: dict[str, Any]) -> None:
    config = GuidedUNetConfig(**{**TINY, "head_channels": 32, **changes})
    found = recognise(GuidedUNet(config).state_dict(), "memory")
    assert found.against(config) == []
    assert (found.channels, found.multipliers, found.blocks) == (config.channels, config.multipliers, config.blocks)
    assert (found.image_channels, found.classes) == (config.shape[0], config.classes)
    assert (found.updown, found.scale_shift) == (config.updown, config.scale_shift)
    assert found.learn_variance == config.learn_variance
    assert tuple(config.shape[1] // f for f in found.attention) == config.attention


@pytest.mark.parametrize("name", {preset.net: name for name, preset in sorted(PRESETS.items(), reverse=True)}.values())
def test_released_files_would_be_recognised_by_their_shapes(name: str) -> None:
    with torch.device("meta"):
        net = GuidedUNet(PRESETS[name].net)
    assert recognise(net.state_dict(), name).against(PRESETS[name].net) == []
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    # The sizes that the paper states (arXiv 2105.05233, appendix).
    stated = {"64x64_diffusion": 296, "256x256_diffusion": 554, "512x512_diffusion": 559, "128x128_diffusion": 422}
    assert name not in stated or abs(millions - stated[name]) < 1


def test_a_file_name_stands_for_its_settings_where_shapes_agree(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = PRESETS["cd_imagenet64_l2"]
    monkeypatch.setitem(PRESETS, "cd_imagenet64_l2", type(small)(small.repository, STUDENT, small.run, small.multistep))
    path = tmp_path / "cd_imagenet64_l2.pt"
    path.write_bytes((files / "student.pt").read_bytes())
    made = load_consistency(path)
    source = made.card["source"]
    assert (source["preset"], source["seen"]["blocks"], source["options"]["distillation"]) == (path.stem, 1, True)
    assert source["multistep"]["ts"] == [0, 22, 39]
    grid = torch.tensor(source["multistep"]["levels"], dtype=torch.float64)
    assert (grid[0], grid[2]) == (80.0, 0.002)
    assert made.sample(2, LABEL, sampler=consistency(grid, sigma_min=0.002)).shape == (2, 3, 8, 8)
    assert load_consistency(path, sigma_max=40.0).sampler.start == 40
    assert load_consistency(files / "student.pt", preset="cd_imagenet64_l2").card["source"]["preset"] == path.stem
    with pytest.raises(InputError, match=r"pass them as options; or preset=\.\.\., if it is one of cd_imagenet64_l2"):
        load_consistency(files / "student.pt")


def test_which_repository_a_file_is_of(files: Path) -> None:
    assert is_consistency(files / "student.pt")
    assert not is_consistency(files / "plain.pt")
    assert kind_of(files / "student.pt") == "consistency"
    assert kind_of(files / "plain.pt") == "guided"
    assert is_consistency("nowhere/ct_cat256.pt")


def test_the_front_door_opens_them(files: Path, plain: Generator) -> None:
    made = load(files / "plain.pt", **SAID_PLAIN)
    assert far(made.denoiser(picture(), 1.0, LABEL), plain.denoiser(picture(), 1.0, LABEL)) == 0
    assert load(files / "student.pt", **SAID_STUDENT).sampler.nfe == 1
    with pytest.raises(InputError, match="cannot take"):
        load(files / "student.pt", **SAID_STUDENT, noise_schedule="linear")


def test_multistep_levels_are_karras_points() -> None:
    ends = [80 ** (1 / 7), 0.002 ** (1 / 7)]
    expected = [(ends[0] + t / 39 * (ends[1] - ends[0])) ** 7 for t in (0, 22, 39)]
    assert far(multistep_levels((0, 22, 39), 40), expected) < 1e-12


# ---- bad input


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def saved(body: Any) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        torch.save(body, root / "bad.pt")
        return root / "bad.pt"

    return write


def cut(root: Path) -> Path:
    path = saved(weights(PLAIN))(root)
    path.write_bytes(path.read_bytes()[:20000])
    return path


def text(root: Path) -> Path:
    (root / "bad.pt").write_text("not a checkpoint")
    return root / "bad.pt"


def without(name: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in weights(PLAIN).items() if k != name}


def edited(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return weights(PLAIN) | {k.replace("__", "."): v for k, v in changes.items()}


BAD_FILES: list[tuple[Callable[[Path], Path], str]] = [
    (lambda root: root / "none.pt", "does not exist"),
    (saved({"a": torch.zeros(1), "b": Harmful()}), r"more than tensors: it asks for [a-z]+\.system"),
    (saved({"step": 3, **weights(PLAIN)}), "named tensors alone, but 'step' is a int"),
    (saved([1, 2]), "state dict of named tensors, got list"),
    (cut, "copy it again or use another"),
    (text, "copy it again or use another"),
    (saved({"fc.weight": torch.zeros(2)}), "no U-Net of OpenAI's diffusion repositories.*fc.weight"),
    (saved(without("middle_block.1.norm.weight")), "another architecture: missing middle_block.1.norm.weight"),
    (saved(edited(more=torch.zeros(1), most=torch.zeros(1))), "unknown more, most"),
    (saved(edited(input_blocks__0__0__weight=torch.zeros(32, 6, 3, 3))), "super-resolution"),
    (saved(edited(out__2__weight=torch.zeros(5, 32, 3, 3))), "maps 3 channels to 5"),
    (saved({"input_blocks.0.0.weight": torch.zeros(1)}), "is a classifier"),
]


@pytest.mark.parametrize(("write", "message"), BAD_FILES)
def test_bad_files(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_guided(write(tmp_path), **SAID_PLAIN)


def test_an_object_in_a_file_is_not_executed(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"a": Touch()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="not executed"):
        read_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "cannot tell image_size, noise_schedule, num_heads or num_head_channels: pass them"),
        ({**SAID_PLAIN, "image_size": None}, "cannot tell image_size: pass"),
        ({**SAID_PLAIN, "image_size": 9}, "cannot be halved 1 times"),
        ({**SAID_PLAIN, "image_size": 0}, "image_size must be a whole number"),
        ({**SAID_PLAIN, "num_heads": "4"}, "num_heads must be a whole number"),
        ({**SAID_PLAIN, "dtype": torch.int8}, "floating type such as torch.float16, got torch.int8"),
        ({**SAID_PLAIN, "num_heads": 5}, "64 channels cannot be split by heads=5"),
        ({**SAID_PLAIN, "num_head_channels": 16}, "one of them above 0"),
        ({**SAID_PLAIN, "noise_schedule": "cosin"}, "unknown noise_schedule 'cosin': did you mean 'cosine'"),
        ({**SAID_PLAIN, "diffusion_steps": 1}, "diffusion_steps must be a whole number of at least 2"),
        ({**SAID_PLAIN, "diffusion_steps": 10}, "betas must be"),
        ({**SAID_PLAIN, "preset": "lsun_cats"}, "unknown preset 'lsun_cats': did you mean 'lsun_cat'"),
        ({**SAID_PLAIN, "preset": "lsun_cat"}, "is not 'lsun_cat': classes is 5, expected 0"),
        ({**SAID_PLAIN, "preset": "ct_cat256"}, "a checkpoint of consistency-models: use the other loader"),
        ({**SAID_PLAIN, "device": "cuda:9"}, "cuda:9"),
    ],
)
def test_bad_options(files: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_guided(files / "plain.pt", **said)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("student.pt", {"distillation": None}, "cannot tell distillation: pass"),
        ("student.pt", {"sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ("student.pt", {"sigma_data": 0.0}, "sigma_data must be a finite number > 0"),
        ("student.pt", {"preset": "lsun_cat"}, "use the other loader"),
        ("plain.pt", {}, "predicts a variance"),
    ],
)
def test_bad_consistency_options(files: Path, file: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_consistency(files / file, **{**SAID_STUDENT, **changes})


@pytest.mark.parametrize("points", [((0, 22, 40), 40), ((5, 3), 40), ((), 40), ((0,), 1)])
def test_bad_points(points: tuple[tuple[int, ...], int]) -> None:
    with pytest.raises(InputError, match="ts must rise"):
        multistep_levels(*points)


def test_a_label_where_there_are_no_classes(files: Path) -> None:
    D = load_guided(files / "updown.pt", **SAID_UPDOWN).denoiser
    with pytest.raises(InputError, match="no classes"):
        D(picture(), 1.0, LABEL)
