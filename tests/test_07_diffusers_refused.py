"""Diffusers folders that are not whole or contradict themselves: refused when opened, with the file and the value."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from fewstep import Generator, InputError
from fewstep.models.conditions import Need, check_conditions
from fewstep.sources.diffusers import load_diffusers, native
from tiny_models import dit, flux, pixart, sana, sd3, sdxl, stable_diffusion

MAKERS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": sdxl,
    "flux": flux,
    "dit": dit,
    "sd3": sd3,
    "sana": sana,
    "pixart": pixart,
}
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
SCHEDULER = "scheduler/scheduler_config.json"
Spoil = Callable[[Path], Any]


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


def entries(name: str, **values: Any) -> Spoil:
    """Replaces entries of a JSON file; ``...`` takes one out."""

    def spoil(root: Path) -> None:
        body = {**json.loads((root / name).read_text()), **values}
        (root / name).write_text(json.dumps({k: v for k, v in body.items() if v is not ...}))

    return spoil


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(root: Path) -> None:
        found = load_file(root / name)
        change(found)
        save_file(found, root / name, {"format": "pt"})

    return spoil


def without(name: str) -> Spoil:
    return lambda root: (root / name).unlink()


def cut(name: str) -> Spoil:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:1500])


def index(**values: Any) -> Spoil:
    return entries("model_index.json", **values)


def schedule(**values: Any) -> Spoil:
    return entries(SCHEDULER, **values)


def shards(body: Any) -> Spoil:
    def spoil(root: Path) -> None:
        (root / UNET).unlink()
        (root / f"{UNET}.index.json").write_text(json.dumps(body))

    return spoil


def ddim(root: Path) -> None:
    (root / SCHEDULER).write_text(json.dumps({"prediction_type": "epsilon"}))
    index(scheduler=["diffusers", "DDIMScheduler"])(root)


def first(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda found: change(found, min(found))


def unet(**values: Any) -> Spoil:
    return entries("unet/config.json", **values)


def vae(**values: Any) -> Spoil:
    return entries("vae/config.json", **values)


def same(root: Path) -> None:
    """Only the options are wrong."""


SPOILS: list[tuple[str, Spoil, dict[str, Any], str]] = [
    ("sd", without(VAE), {}, "vae has no weights as safetensors"),
    ("sd", without("vae/config.json"), {}, "vae/config.json does not exist, which describes the AutoencoderKL"),
    ("sd", cut(VAE), {}, "vae/diffusion_pytorch_model.safetensors is not a whole safetensors file"),
    ("sd", tensors(VAE, first(lambda t, k: t.pop(k))), {}, "vae holds another .*: missing decoder.conv_in.bias"),
    ("sd", tensors(VAE, lambda t: t.update(extra=torch.zeros(2))), {}, "vae holds another .*: unknown extra"),
    ("sd", vae(scaling_factor="x"), {}, "vae/config.json has scaling_factor='x', expected a number above 0"),
    ("sd", vae(shift_factor="x"), {}, "has shift_factor='x', expected a number, or null"),
    ("sd", vae(block_out_channels=None), {}, "has block_out_channels=None, expected a list of whole numbers"),
    ("sd", vae(latent_channels=16), {}, "does not fit together: its network takes 4 channels, its vae makes 16"),
    ("sd", index(vae=[None, None]), {}, "StableDiffusionPipeline works on latents and .* names no vae"),
    ("dit", index(vae=...), {}, "DiTPipeline works on latents and .* names no vae"),
    ("sd", without(TEXT), {}, "text_encoder has no weights as safetensors"),
    ("sd", cut(TEXT), {}, "text_encoder/model.safetensors is not a whole safetensors file"),
    ("sd", without("text_encoder/config.json"), {}, "text_encoder/config.json does not exist"),
    ("sd", without("tokenizer/tokenizer_config.json"), {}, "tokenizer_config.json does not exist"),
    ("sd", without("tokenizer/tokenizer.json"), {}, "tokenizer has no vocabulary"),
    ("sd", entries("tokenizer/tokenizer_config.json", model_max_length=...), {}, "has model_max_length=None"),
    ("sd", without(SCHEDULER), {}, "scheduler_config.json does not exist, .*: copy or download it again, or save"),
    ("sd", index(_class_name="NoPipeline"), {}, "unknown pipeline class with prompts 'NoPipeline'"),
    ("sd", index(_class_name="FluxPipeline"), {}, "contradicts itself: a FluxPipeline has no unet"),
    ("dit", index(_class_name="NoPipeline"), {}, "has no NoPipeline: install a version that does"),
    ("flux", ddim, {}, "FluxTransformer2DModel is a flow model, its scheduler DDIMScheduler is not: put a"),
    ("sd3", ddim, {}, "SD3Transformer2DModel is a flow model, its scheduler DDIMScheduler is not"),
    ("sana", ddim, {}, "SanaTransformer2DModel is a flow model, its scheduler DDIMScheduler is not"),
    ("sd", schedule(beta_start="x"), {}, "scheduler_config.json has beta_start='x', expected a number between"),
    ("sd", schedule(beta_start=-1), {}, "has beta_start=-1"),
    ("sd", schedule(beta_end=None), {}, "has beta_end=None"),
    ("sd", schedule(num_train_timesteps="1000"), {}, "has num_train_timesteps='1000', expected a whole number"),
    ("sd3", schedule(num_train_timesteps=0), {}, "has num_train_timesteps=0"),
    ("sd", schedule(beta_schedule="q"), {}, "scheduler_config.json cannot be opened as a DDIMScheduler.* q is not"),
    ("sd", schedule(trained_betas="abc"), {}, "has trained_betas='abc', expected 1000 numbers"),
    ("sd", schedule(timestep_spacing="x"), {}, "scheduler_config.json gives no sampler of 1 steps.* x is not"),
    ("sd3", schedule(shift="x"), {}, "scheduler_config.json cannot be opened as a FlowMatchEuler"),
    ("flux", schedule(max_image_seq_len=256), {}, "base_image_seq_len=256, max_image_seq_len=256"),
    ("sd", unet(in_channels="4"), {}, "unet/config.json has in_channels='4', expected a whole number"),
    ("sd", unet(in_channels=None), {}, "has in_channels=None"),
    ("sd", unet(out_channels=None), {}, "has out_channels=None"),
    ("sd", unet(sample_size=8.5), {}, "has sample_size=8.5"),
    ("sd", unet(block_out_channels=[8]), {}, "unet/config.json cannot be opened as a UNet2DCond.* same number"),
    ("sd", unet(down_block_types=["A", "B"]), {}, "cannot be opened as a UNet2DConditionModel: ValueError: A does"),
    ("sd", unet(norm_num_groups=3), {}, r"must be divisible by num_groups \(3\)"),
    ("sd", unet(addition_embed_type="text_time"), {}, "unet is not supported: .*projection_class_embeddings_input_dim"),
    ("dit", entries("transformer/config.json", num_embeds_ada_norm=None), {}, "has num_embeds_ada_norm=None"),
    ("sd", shards({"weight_map": 3}), {}, "index.json is no index of shards"),
    ("sd", shards({"weight_map": {"a": 3}}), {}, "index.json is no index of shards"),
    ("sd3", same, {"size": 64}, "positions for 8 patches along a side, and this size needs 16"),
    ("sd", same, {"embedded_guidance": "x"}, "embedded_guidance must be a number, got 'x'"),
    ("sd", same, {"embedded_guidance": None}, "embedded_guidance must be a number, got None"),
    ("sd", same, {"size": 16.0}, "size must be the side of a picture in pixels, or .* got 16.0"),
    ("sd", same, {"size": True}, "size must be the side of a picture .* got True"),
    ("sd", same, {"prompts": 3}, "prompts must be a list of texts or a text file with one per line, got 3"),
]


@pytest.mark.parametrize(("name", "spoil", "options", "message"), SPOILS)
def test_refused_when_opened(
    changed: Callable[[str], Path], name: str, spoil: Spoil, options: dict[str, Any], message: str
) -> None:
    place = changed(name)
    spoil(place)
    with pytest.raises(InputError, match=message) as error:
        load_diffusers(place, **{"steps": 1, "size": 16, **options})
    assert "\n" not in str(error.value)


def resized(found: dict[str, torch.Tensor], key: str) -> None:
    found[key] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(lambda t, k: t.pop(k)), "missing embeddings.position_embedding.weight"),
        (first(resized), r"shapes differ: embeddings.position_embedding.weight is \(3,\), expected \(16, 8\)"),
        (lambda t: t.update(extra=torch.zeros(2)), "unknown extra"),
    ],
)
def test_text_encoders_are_read_strictly(changed: Callable[[str], Path], change: Any, message: str) -> None:
    place = changed("sd")
    tensors(TEXT, change)(place)
    with pytest.raises(InputError, match=f"text_encoder holds another architecture.*{message}"):
        load_diffusers(place, steps=1).encode("a cat")


HARMLESS: list[tuple[str, str, Callable[[dict[str, torch.Tensor]], Any]]] = [
    ("sd", TEXT, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(16)[None]})),
    ("pixart", TEXT, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()})),
    ("pixart", TEXT, lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")})),
    ("pixart", TEXT, lambda t: t.update({"lm_head.weight": t["shared.weight"].clone()})),
]


@pytest.mark.parametrize(("name", "file", "change"), HARMLESS)
def test_what_older_files_hold_is_read(
    changed: Callable[[str], Path], folder: Callable[[str], Path], name: str, file: str, change: Any
) -> None:
    place = changed(name)
    tensors(file, change)(place)
    own, other = (load_diffusers(p, steps=1).encode("a cat")["prompt_embeds"] for p in (place, folder(name)))
    assert torch.equal(own, other) and float(own.std()) > 0


def test_attention_by_its_older_names(changed: Callable[[str], Path], folder: Callable[[str], Path]) -> None:
    place = changed("sd")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(found: dict[str, torch.Tensor]) -> None:
        for key in [k for k in found if "attentions" in k]:
            other = key
            for new, old in names.items():
                other = other.replace(new, old)
            found[other] = found.pop(key)

    tensors(VAE, rename)(place)
    latents = torch.randn(1, 4, 4, 4)
    own, other = (load_diffusers(p, steps=1).codec.decode(latents) for p in (place, folder("sd")))  # type: ignore[union-attr]
    assert torch.equal(own, other)


def test_a_folder_of_one_variant_is_read_whole(changed: Callable[[str], Path], folder: Callable[[str], Path]) -> None:
    place = changed("sdxl")
    for file in list(place.glob("*/*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    g, plain = load_diffusers(place, steps=1), load_diffusers(folder("sdxl"), steps=1)
    assert g.card["notes"] == ["unet has no plain weights: its variant 'fp16' was read"]
    assert torch.equal(g.sample(cond="a cat"), plain.sample(cond="a cat"))


def test_text_encoders_that_a_pipeline_does_without(changed: Callable[[str], Path]) -> None:
    place = changed("sd3")
    index(text_encoder_3=[None, None], tokenizer_3=[None, None])(place)
    assert load_diffusers(place, steps=1).encode("a cat")["prompt_embeds"].isfinite().all()
    index(text_encoder=[None, None])(place)
    with pytest.raises(InputError, match="names no text_encoder: it cannot read prompts, pass their embeddings"):
        load_diffusers(place, steps=1).encode("a cat")


def test_a_moved_source_is_of_the_same_family(folder: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat\nblue dog\n")
    g = load_diffusers(folder("sd"), steps=1, prompts=file)
    pictures, saved = g.sample(2, seed=1), g.save(tmp_path / "saved")
    file.unlink()
    assert torch.equal(Generator.load(saved, base=folder("sd")).sample(2, seed=1), pictures)
    with pytest.raises(InputError, match=r"was made with a StableDiffusionPipeline, .* is a FluxPipeline"):
        Generator.load(saved, base=folder("flux"))
    other = tmp_path / "other"
    shutil.copytree(folder("sd"), other)
    vae(scaling_factor=0.25)(other)
    with pytest.raises(InputError, match=r"was made with the vae .*0\.5.*has .*0\.25"):
        Generator.load(saved, base=other)


def test_a_tilde_is_the_home(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(folder("dit"), tmp_path / "pipe")
    g = load_diffusers("~/pipe", base="~/pipe", steps=1, dtype="bf16")
    assert {p.dtype for p in g.network.parameters()} == {torch.bfloat16}
    assert Generator.load(g.save(tmp_path / "saved"), base="~/pipe").conds == g.conds


def test_the_cache_is_used_when_the_hub_cannot_be_reached(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        # What its HTTP library raises for want of a connection, which is no error of the Hub itself.
        raise HfHubHTTPError.__bases__[0]("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    with pytest.raises(InputError, match="'someone/tiny' is neither a folder here nor a Hub id") as error:
        load_diffusers("someone/tiny", steps=1)
    assert "\n" not in str(error.value)
    place, commit = tmp_path / "models--someone--tiny", "0" * 40
    shutil.copytree(folder("dit"), place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    assert load_diffusers("someone/tiny", steps=1).card["source"] == "someone/tiny"


def test_nothing_of_the_libraries_is_logged(folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        native({"_class_name": "DDIMScheduler", "something": 3, "prediction_type": "epsilon"})
        load_diffusers(folder("sd"), steps=1, dtype="fp16").encode("a cat")
    finally:
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert caplog.messages == []


NEEDS = {
    "prompt_embeds": Need((None, 8)),
    "prompt_attention_mask": Need((None,), kind="any"),
    "label": Need((), optional=True, kind="integer"),
}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"prompt_embeds": [1.0]}, "'prompt_embeds' must be a tensor, got a list"),
        ({"prompt_embeds": torch.zeros(2, 5, 8, dtype=torch.int64)}, "must be of floating dtype, got torch.int64"),
        ({"label": torch.zeros(2)}, "'label' must be of integer dtype, got torch.float32"),
        ({"label": torch.zeros(2, dtype=torch.bool)}, "'label' must be of integer dtype, got torch.bool"),
        ({"prompt_embeds": torch.zeros(5, 8)}, r"must be \(B, any, 8\), got \(5, 8\)"),
        ({"prompt_attention_mask": torch.ones(3, 5)}, "number of examples: 'prompt_embeds' has 2, .* has 3"),
        ({"prompt_attention_mask": torch.ones(2, 4)}, "number of tokens: 'prompt_embeds' has 5, .* has 4"),
    ],
)
def test_conditions_that_a_network_cannot_read(own: Any, message: str) -> None:
    good: Any = {"prompt_embeds": torch.zeros(2, 5, 8), "prompt_attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    check_conditions(NEEDS, good)
    with pytest.raises(InputError, match=message):
        check_conditions(NEEDS, {**good, **own})
