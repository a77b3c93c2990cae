"""Diffusers folders as files: what is refused and how, saving and loading, dtypes, features and conditions."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import Generator, InputError, guided
from fewstep.core.network import build_network, describe_network
from fewstep.core.noise import Noise
from fewstep.core.pipeline import TextConditions
from fewstep.models.conditions import check_conditions
from fewstep.models.diffusers import FAMILIES, DiffusersNet
from fewstep.sources.diffusers import load_diffusers, native
from fewstep.sources.diffusers_files import _wanted
from tiny_models import ddpm, dit, flux, sd3, sdxl, stable_diffusion

MAKERS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "flux": flux,
    "ddpm": ddpm,
    "dit": dit,
    "sd3": sd3,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved pipeline; not to be changed."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "pipe"
            MAKERS[name]().save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture
def changed(folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of it, to be spoilt."""
    return lambda name: Path(shutil.copytree(folder(name), tmp_path / name))


def edit(file: Path, **values: Any) -> None:
    body = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({k: v for k, v in body.items() if v is not ...}))


def spoil_weights(place: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(place)
    change(tensors)
    save_file(tensors, place, {"format": "pt"})


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_other.weight"] = tensors.pop("conv_in.weight")


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.bias"] = torch.zeros(3)


SPOILS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no index": (
        lambda f: (f / "model_index.json").unlink(),
        {},
        "it has no model_index.json",
    ),
    "no component": (lambda f: shutil.rmtree(f / "vae"), {}, r"lacks the component 'vae' \(AutoencoderKL\)"),
    "own code": (
        lambda f: edit(f / "model_index.json", unet=["my_unet", "Net"]),
        {},
        "my_unet.Net, which is not",
    ),
    "network": (
        lambda f: edit(f / "model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
        {},
        "unknown network class of diffusers 'UNet3DConditionModel'.*SanaTransformer2DModel",
    ),
    "scheduler": (
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "ScoreSdeVeScheduler"]),
        {},
        "unknown scheduler class 'ScoreSdeVeScheduler'.*DDIMScheduler",
    ),
    "no path": (
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "IPNDMScheduler"]),
        {},
        "IPNDMScheduler does not say how its network is trained",
    ),
    "prediction": (
        lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="guess"),
        {},
        "unknown prediction_type of DDIMScheduler 'guess'",
    ),
    "no flow": (
        lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="flow_prediction"),
        {},
        "without flow levels: set use_flow_sigmas=True",
    ),
    "a key missing and one too many": (
        lambda f: spoil_weights(f / "unet" / WEIGHTS, rename),
        {},
        "missing conv_in.weight; unknown conv_other.weight",
    ),
    "a shape": (
        lambda f: spoil_weights(f / "unet" / WEIGHTS, reshape),
        {},
        r"shapes differ: conv_in.bias is \(3,\), expected \(8,\)",
    ),
    "cut short": (
        lambda f: (f / "unet" / WEIGHTS).write_bytes((f / "unet" / WEIGHTS).read_bytes()[:1000]),
        {},
        "is not a whole safetensors file",
    ),
    "pickles only": (
        lambda f: (f / "unet" / WEIGHTS).rename(f / "unet" / "diffusion_pytorch_model.bin"),
        {},
        "no weights as safetensors.*pickles are not opened",
    ),
    "inpainting": (lambda f: edit(f / "unet/config.json", in_channels=9), {}, "reads 9 channels and predicts 4"),
    "variant": (lambda f: None, {"variant": "fp16"}, "has no variant 'fp16': its variants are none"),
    "dtype": (lambda f: None, {"dtype": "float8"}, "unknown dtype 'float8'"),
    "steps": (lambda f: None, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    "size": (lambda f: None, {"size": 13}, "size 13 does not suit this pipeline: sides must be divisible by 2"),
    "prompts": (lambda f: None, {"prompts": "nowhere.txt"}, "nowhere.txt' is no text file"),
    "no prompts": (lambda f: None, {"prompts": []}, "prompts must be at least one text"),
}


@pytest.mark.parametrize("what", list(SPOILS))
def test_what_is_refused(changed: Callable[[str], Path], what: str) -> None:
    spoil, options, message = SPOILS[what]
    place = changed("sd")
    spoil(place)
    with pytest.raises(InputError, match=message) as error:
        load_diffusers(place, **{"steps": 2, **options})
    assert "\n" not in str(error.value)


def test_a_flow_that_says_epsilon(changed: Callable[[str], Path]) -> None:
    place = changed("sd3")
    edit(place / "scheduler/scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler is a flow with prediction_type='epsilon'"):
        load_diffusers(place)
    with pytest.raises(InputError, match="is a flow with prediction_type='epsilon'"):
        native({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "epsilon"})


def test_hub_ids_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"'someone/tiny'.*{tmp_path}.*HF_HUB_OFFLINE") as error:
        load_diffusers("someone/tiny", local_files_only=True)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="does not exist: pass the folder"):
        load_diffusers(tmp_path / "nothing" / "here")


def test_a_hub_id_asks_for_what_is_used() -> None:
    names = ["model_index.json", "README.md", "v1-5.safetensors", "unet/config.json", "scheduler/scheduler_config.json"]
    names += ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/x.bin"]
    names += ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors"]
    names += ["text_encoder/model.fp16-00001-of-00002.safetensors", "tokenizer/vocab.json"]
    rest = {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "vae/config.json"}
    rest |= {"tokenizer/vocab.json", "vae/diffusion_pytorch_model.safetensors"}
    rest |= {"text_encoder/model.fp16-00001-of-00002.safetensors"}
    assert set(_wanted(names, None)) == rest | {"unet/diffusion_pytorch_model.safetensors"}
    assert set(_wanted(names, "fp16")) == rest | {"unet/diffusion_pytorch_model.fp16.safetensors"}


def test_shards_and_variants(changed: Callable[[str], Path], folder: Callable[[str], Path]) -> None:
    place, reference = changed("sd"), load_diffusers(folder("sd"), steps=1)
    model: Any = reference.denoiser.net.model  # type: ignore[union-attr]
    (place / "unet" / WEIGHTS).unlink()
    model.save_pretrained(place / "unet", variant="fp16", max_shard_size="20KB")
    assert len(list((place / "unet").glob("*.safetensors"))) > 1
    for options in ({}, {"variant": "fp16"}):
        g = load_diffusers(place, steps=1, **options)  # type: ignore[arg-type]
        assert bool(g.card["notes"]) == (not options)
        assert all(
            torch.equal(a, b) for a, b in zip(g.network.parameters(), reference.network.parameters(), strict=True)
        )
        # The other components have no such variant: their plain files are read.
        assert g.encode("a cat")["prompt_embeds"].shape == (1, 16, 8)
    next((place / "unet").glob("*-00001-of-*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"lacks 1 of .* shards"):
        load_diffusers(place, steps=1)


def test_a_network_alone_on_a_base(changed: Callable[[str], Path], folder: Callable[[str], Path]) -> None:
    place = changed("sd")
    spoil_weights(place / "unet" / WEIGHTS, lambda t: t["conv_in.bias"].add_(1.0))
    for source in (place, place / "unet"):
        g, plain = load_diffusers(source, base=folder("sd"), steps=1), load_diffusers(folder("sd"), steps=1)
        own, other = (h.network.state_dict()["net.model.conv_in.bias"] for h in (g, plain))
        assert torch.equal(own, other + 1)
    with pytest.raises(InputError, match="holds no network for"):
        load_diffusers(place / "vae" / "..", base=folder("dit"))
    with pytest.raises(InputError, match="it is a AutoencoderKL"):
        load_diffusers(place / "vae", base=folder("sd"))


def test_a_fewstep_folder_finds_its_pipeline_again(changed: Callable[[str], Path], tmp_path: Path) -> None:
    place = changed("sdxl")
    g = guided(load_diffusers(place, steps=2, prompts=["a red cat", "blue dog"]), 2.0)
    pictures = g.sample(2, seed=3)
    saved = g.save(tmp_path / "saved")
    assert not list(saved.rglob("*.bin")) and (saved / "student.safetensors").is_file()
    again = Generator.load(saved)
    assert isinstance(again.conds, TextConditions)
    assert torch.equal(again.sample(2, seed=3), pictures)
    assert again.fingerprint() == g.fingerprint()
    place.rename(place.with_name("moved"))
    with pytest.raises(InputError, match=r"is gone.*base="):
        Generator.load(saved)


def test_a_class_conditional_one_too(folder: Callable[[str], Path], tmp_path: Path) -> None:
    g = load_diffusers(folder("dit"), steps=2)
    again = Generator.load(g.save(tmp_path / "saved"))
    assert again.conds == g.conds
    assert torch.equal(again.sample(2, seed=1), g.sample(2, seed=1))
    with pytest.raises(InputError, match="label 1000 is out of range"):
        g.sample(cond={"label": torch.tensor([1000])})
    with pytest.raises(InputError, match="takes labels: it cannot read the prompt"):
        g.sample(cond="a cat")


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (lambda c: {**c, "prompt_embeds": c["prompt_embeds"][..., :5]}, r"must be \(B, any, 8\), got \(1, 512, 5\)"),
        (lambda c: {k: v for k, v in c.items() if k != "guidance"}, "'guidance' is missing"),
        (lambda c: {**c, "label": torch.zeros(1)}, "unknown condition 'label'"),
    ],
)
def test_conditions_are_checked_before_a_run(folder: Callable[[str], Path], cond: Any, message: str) -> None:
    g = load_diffusers(folder("flux"), size=16, steps=1)
    with pytest.raises(InputError, match=message):
        g.sample(cond=cond(g.encode("a cat")))


def test_prompts_are_drawn_by_each_samples_own_seed(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a text pipeline needs prompts: pass cond=\.\.\. or prompts=\.\.\."):
        load_diffusers(folder("sd"), steps=1).sample(1)
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat\n\nblue dog\nsmall tree\n")
    g = load_diffusers(folder("sd"), steps=1, prompts=file)
    conds: Any = g.conds
    assert conds.prompts == ["a red cat", "blue dog", "small tree"]
    all_rows = conds.draw(Noise.of(0, 12))["prompt_embeds"]
    assert torch.equal(conds.draw(Noise.of(0, 12)[5:7])["prompt_embeds"], all_rows[5:7])
    assert len({tuple(row.flatten().tolist()) for row in all_rows}) == 3
    for wrong in ([], "a cat", [3]):
        with pytest.raises(InputError, match="prompts are a list of at least one text"):
            conds.encode(wrong)


def test_repeated_prompts_are_encoded_once(folder: Callable[[str], Path]) -> None:
    g = load_diffusers(folder("sd"), steps=1)
    first = g.encode(["a cat", "a dog", "a cat"])
    assert torch.equal(first["prompt_embeds"][0], first["prompt_embeds"][2])
    pipe: Any = g.pipeline
    pipe.release()
    pipe.text = lambda: pytest.fail("the text encoder was asked again")
    assert torch.equal(g.encode(["a dog"])["prompt_embeds"][0], first["prompt_embeds"][1])


def test_features_at_declared_taps(folder: Callable[[str], Path]) -> None:
    taps = {"sd": ("bottleneck", (2, 16, 4, 4)), "sd3": ("block1", (2, 16, 16)), "flux": ("block2", (2, 16, 16))}
    for name, (tap, shape) in taps.items():
        g = load_diffusers(folder(name), size=16, steps=1)
        D: Any = g.denoiser
        x, cond = torch.randn(2, *D.shape), g.encode(["a cat", "blue dog"])
        out, found = D.features(x, 1.0, cond, [tap])
        assert found[tap].shape == shape
        assert torch.equal(out, D(x, 1.0, cond))
        # A copy shows its own features, not those of what it was copied from.
        student = copy.deepcopy(D)
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(0.5)
        _, other = student.features(x, 1.0, cond, [tap])
        assert not torch.allclose(other[tap], found[tap])
        with pytest.raises(InputError, match="unknown feature tap"):
            D.features(x, 1.0, cond, ["nothing"])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_half_precision_with_conditions_in_float32(folder: Callable[[str], Path], name: str) -> None:
    g, half = (load_diffusers(folder(name), size=16, steps=1, dtype=t) for t in (None, torch.bfloat16))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    x, cond = torch.randn(2, *g.denoiser.shape), g.encode(["a cat", "blue dog"])
    assert cond["prompt_embeds"].dtype == torch.float32
    # 1000 times the scale enters sinusoids in half precision: 500 is a number there, 3500 is not.
    cond |= {"guidance": torch.full((2,), 0.5)} if "guidance" in cond else {}
    half.network.to(memory_format=torch.channels_last)
    a, b = g.denoiser(x, 1.0, cond), half.denoiser(x, 1.0, cond)
    assert b.dtype == torch.float32
    assert float((a - b).abs().mean()) < 0.05 * float(a.abs().mean())
    rebuilt: Any = build_network(json.loads(json.dumps(describe_network(half.denoiser.net))))  # type: ignore[union-attr]
    assert next(rebuilt.parameters()).dtype == torch.bfloat16


def test_it_compiles_whole(folder: Callable[[str], Path]) -> None:
    g = load_diffusers(folder("flux"), size=16, steps=1)
    net: Any = g.denoiser.net  # type: ignore[union-attr]
    x, time, cond = torch.randn(2, *g.denoiser.shape), torch.full((2,), 0.5), g.encode(["a cat", "blue dog"])
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert float((compiled(x, time, cond) - net(x, time, cond)).abs().max()) < 1e-5


def test_labels_are_never_dropped_by_the_network_itself(folder: Callable[[str], Path]) -> None:
    D: Any = load_diffusers(folder("dit"), steps=1).denoiser
    x, label = torch.randn(64, *D.shape), {"label": torch.full((64,), 3)}
    assert torch.allclose(D.train()(x, 1.0, label), D.eval()(x, 1.0, label))
    assert torch.allclose(D(x, 1.0), D(x, 1.0, {"label": torch.full((64,), -1)}))


def test_what_cannot_be_in_a_table_is_switched_off_and_said(changed: Callable[[str], Path]) -> None:
    place = changed("ddpm")
    edit(place / "scheduler/scheduler_config.json", clip_sample=True, variance_type="learned_range")
    g = load_diffusers(place, steps=2)
    assert [n.split(": ")[1].split("=")[0] for n in g.card["notes"]] == ["clip_sample", "variance_type"]
    edit(place / "scheduler/scheduler_config.json", steps_offset=0)
    edit(place / "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    edit(place / "scheduler/scheduler_config.json", solver_type="bh1", variance_type=..., clip_sample=...)
    g = load_diffusers(place, steps=2)
    assert "cannot be traced" in g.card["notes"][0] and g.sampler.name == "DDIMScheduler-2"  # type: ignore[attr-defined]


def test_edm_preconditioning_of_a_scheduler(changed: Callable[[str], Path]) -> None:
    from diffusers import EDMEulerScheduler

    place = changed("ddpm")
    for kind in ("epsilon", "v_prediction"):
        EDMEulerScheduler(prediction_type=kind).save_pretrained(place / "scheduler")
        edit(place / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
        g = load_diffusers(place, steps=3)
        scheduler = EDMEulerScheduler(prediction_type=kind)
        scheduler.set_timesteps(3)
        net: Any = g.denoiser.net  # type: ignore[union-attr]
        noise = torch.randn(2, 3, 8, 8)
        state = noise * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps:
                out = net.model(scheduler.scale_model_input(state, t), t).sample
                state = scheduler.step(out, t, state).prev_sample
            own = g.sampler(g.denoiser, g.start_std() * noise)
        assert float((own - state).abs().max()) < 1e-4 * max(1.0, float(state.abs().max()))


def test_families_name_layers_that_exist(folder: Callable[[str], Path]) -> None:
    for name in ("sd", "sdxl", "flux", "sd3", "dit", "ddpm"):
        net: Any = load_diffusers(folder(name), size=16 if name != "ddpm" else None, steps=1).denoiser.net  # type: ignore[union-attr]
        assert isinstance(net, DiffusersNet)
        names = [n for n, _ in net.model.named_modules()]
        for target in FAMILIES[net.config.class_name].lora_targets:
            assert any(n == target or n.endswith(f".{target}") for n in names), f"{name} has no {target}"
    label = FAMILIES["DiTTransformer2DModel"].needs({})
    with pytest.raises(InputError, match="'label' must be"):
        check_conditions(label, {"label": torch.zeros(2, 1)})
