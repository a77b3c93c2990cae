"""Pipelines of diffusers as generators: our tables on our adapters give what the stock pipelines give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import Generator, InputError, guided
from fewstep.core.noise import Noise
from fewstep.solve import build
from fewstep.sources.diffusers import load_diffusers
from tiny_models import ddpm, dit, flux, pixart, randomised, sana, sd3, sdxl, stable_diffusion

# Divides 1000: otherwise DDIM's trailing steps leave for other levels than they arrive at.
STEPS = 4
PROMPTS = ["a red cat", "small house on a tree"]
TEXT: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion("v_prediction"),
    "sd-zero-snr": lambda: stable_diffusion("v_prediction", zero_snr=True),
    "sd-sample": lambda: stable_diffusion("sample"),
    "sdxl": sdxl,
    "pixart": pixart,
    "pixart-sigma": lambda: pixart(sigma=True),
    "sd3": sd3,
    "flux": flux,
    "flux-schnell": lambda: flux(guidance=False),
    "sana": sana,
}


@dataclass
class Case:
    pipe: Any
    generator: Generator
    folder: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A pipeline and the generator opened from its folder, each made once."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            pipe = {**TEXT, "dit": dit, "ddpm": ddpm}[name]()
            pipe.set_progress_bar_config(disable=True)
            folder = tmp_path_factory.mktemp(name)
            pipe.save_pretrained(folder)
            if name == "sana":
                pipe.scheduler = exact_times(pipe.scheduler)
            made[name] = Case(pipe, load_diffusers(folder, steps=STEPS, size=16 if "flux" in name else None), folder)
        return made[name]

    return get


def exact_times(scheduler: Any) -> Any:
    """The same scheduler, without the rounding of the time that it tells the network: a table has the exact one."""

    class Exact(type(scheduler)):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **options: Any) -> None:
            super().set_timesteps(*args, **options)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    return Exact.from_config(scheduler.config)


def start(g: Generator, n: int = 2) -> Tensor:
    return torch.randn(n, *g.denoiser.shape, generator=torch.Generator().manual_seed(3))


def ours(g: Generator, x: Tensor, cond: Mapping[str, Tensor], sampler: Any = None) -> Tensor:
    """Latents as a pipeline has them: its last state is ``a x``, also where its last level is not quite 0."""
    use = sampler or g.sampler
    with torch.no_grad():
        return use(g.denoiser, g.start_std() * x, cond) / (1 + use.end**2) ** 0.5


def stock(c: Case, x: Tensor, scale: float, output: str = "latent", **given: Any) -> Tensor:
    """What the pipeline makes of the same latents, at the same size."""
    name, (_, channels, h, w) = type(c.pipe).__name__, x.shape
    options: dict[str, Any] = {"height": h * 2, "width": w * 2, "num_inference_steps": STEPS, "output_type": output}
    options |= {"guidance_scale": scale, "latents": x.clone()}
    if name == "FluxPipeline":
        packed = c.pipe._pack_latents(x, len(x), channels, h, w)
        options |= {"latents": packed, "guidance_scale": 3.5, "true_cfg_scale": scale}
    if name.startswith(("PixArt", "Sana")):
        options["use_resolution_binning"] = False
    made = c.pipe(**given, **options).images
    return c.pipe._unpack_latents(made, h * 2, w * 2, 2) if name == "FluxPipeline" and output == "latent" else made


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert float(b.std()) > 0.05, "a constant picture would prove nothing"
    assert float((a - b).abs().max()) < tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("name", list(TEXT))
def test_text_pipelines_through_prompts(case: Callable[[str], Case], name: str, scale: float) -> None:
    c = case(name)
    x = start(c.generator)
    negative = {"negative_prompt": ["", ""]} if "flux" in name else {}
    g = guided(c.generator, scale)
    cond = g.encode(PROMPTS)
    assert not torch.equal(cond["prompt_embeds"][0], cond["prompt_embeds"][1])
    reference = stock(c, x, scale, prompt=PROMPTS, **negative)
    close(ours(g, x, cond), reference)
    # The guidance and the prompts do something: otherwise all of this could be equal by accident.
    if scale != 1:
        assert float((ours(c.generator, x, cond) - reference).abs().max()) > 1e-3
        assert float((ours(g, x, g.encode(PROMPTS[::-1])) - reference).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux", "sana"])
def test_a_negative_prompt(case: Callable[[str], Case], name: str) -> None:
    c = case(name)
    x, away = start(c.generator), "blue dog"
    # Most stock pipelines want it as they want the prompts, in a list.
    negative = away if name in ("pixart", "sana") else [away] * 2
    close(
        ours(guided(c.generator, 3.0, away), x, c.generator.encode(PROMPTS)),
        stock(c, x, 3.0, prompt=PROMPTS, negative_prompt=negative),
    )


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd-zero-snr", "sdxl", "sd3", "flux"])
def test_our_own_euler_on_the_same_levels(case: Callable[[str], Case], name: str) -> None:
    c = case(name)
    x = start(c.generator)
    own = build("euler", c.generator.sampler.levels)
    close(ours(c.generator, x, c.generator.encode(PROMPTS), own), stock(c, x, 1.0, prompt=PROMPTS))


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux", "sana"])
def test_given_embeddings(case: Callable[[str], Case], name: str) -> None:
    c = case(name)
    x, cond = start(c.generator), c.generator.encode(PROMPTS)
    torch.manual_seed(0)
    changed = {k: v + 0.5 * torch.randn_like(v) if "embeds" in k else v for k, v in cond.items()}
    given = {k: v for k, v in changed.items() if k not in ("time_ids", "guidance")}
    if name in ("pixart", "sana"):
        # Otherwise the stock pipeline adds its own default, which is a prompt.
        given["negative_prompt"] = None
    c.generator.conds.check(changed)  # type: ignore[union-attr]
    close(ours(c.generator, x, changed), stock(c, x, 1.0, **given))


def test_a_scheduler_that_rounds_times_is_remarked_on(case: Callable[[str], Case]) -> None:
    (note,) = case("sana").generator.card["notes"]
    assert "DPMSolverMultistepScheduler tells its network times" in note
    assert case("sd3").generator.card["notes"] == case("sdxl").generator.card["notes"] == []


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit(case: Callable[[str], Case], scale: float) -> None:
    c = case("dit")
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = [0, 2, 999]
    reference = c.pipe(
        labels, scale, torch.Generator().manual_seed(5), num_inference_steps=STEPS, output_type="pt"
    ).images
    g = guided(c.generator, scale)
    for sampler in (g.sampler, build("euler", g.sampler.levels), build("ddim", g.sampler.levels)):
        latents = ours(g, x, {"label": torch.tensor(labels)}, sampler)
        close((c.generator.codec.decode(latents) / 2 + 0.5).clamp(0, 1), reference)  # type: ignore[union-attr]
    assert c.generator.conds.names[1] == "goldfish, Carassius auratus"  # type: ignore[union-attr]
    assert c.generator.conds.names[7] == "7"  # type: ignore[union-attr]


@dataclass(frozen=True)
class Replayed(Noise):
    """The draws of a torch generator, as a traced table's rows ask for them."""

    rows: Mapping[int, Tensor] = field(default_factory=dict)

    def normal(self, shape: Sequence[int], *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows[int(key[-1])]


def test_ddpm_with_the_pipelines_own_noises(case: Callable[[str], Case]) -> None:
    c, draw = case("ddpm"), torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 8, 8, generator=draw)
    reference = c.pipe(2, torch.Generator().manual_seed(5), STEPS, output_type="pt").images
    reference = reference if isinstance(reference, Tensor) else torch.from_numpy(reference).permute(0, 3, 1, 2)
    table = c.generator.sampler
    drawn = [torch.randn(2, 3, 8, 8, generator=draw) for _ in range(STEPS)]
    mixes = table.meta["traced"]["draws"]  # type: ignore[union-attr]
    rows = {int(k): sum(w * drawn[int(m)] for m, w in mix.items()) for k, mix in mixes.items()}
    noise = Replayed(torch.zeros(2, dtype=torch.int64), rows)  # type: ignore[arg-type]
    made = table(c.generator.denoiser, c.generator.start_std() * x, noise=noise)
    assert c.generator.codec is None and c.generator.conds is None
    close((made / 2 + 0.5).clamp(0, 1), reference)


@pytest.mark.parametrize("name", ["sdxl", "flux", "sana"])
def test_from_prompts_to_pictures(case: Callable[[str], Case], name: str) -> None:
    c = case(name)
    noise = Noise.of(7, 2)
    pictures = c.generator.sample(cond=PROMPTS, seed=7, batch=1)
    reference = stock(c, noise.normal(c.generator.denoiser.shape, "start"), 1.0, output="pt", prompt=PROMPTS)
    close((pictures / 2 + 0.5), reference)


def test_embedded_guidance_of_a_latent_consistency_model(tmp_path: Path) -> None:
    pipe = stable_diffusion(time_cond_proj_dim=8)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    g = load_diffusers(tmp_path, steps=STEPS, embedded_guidance=6.0)
    x = start(g)
    cond = g.encode(PROMPTS)
    assert cond["guidance"].tolist() == [6.0, 6.0]
    reference = stock(Case(pipe, g, tmp_path), x, 6.0, prompt=PROMPTS)
    close(ours(g, x, cond), reference)
    assert float((ours(g, x, {**cond, "guidance": torch.full((2,), 2.0)}) - reference).abs().max()) > 1e-3


def test_embedded_guidance_reaches_flux(case: Callable[[str], Case]) -> None:
    g = case("flux").generator
    x, cond = start(g), g.encode(PROMPTS)
    assert float((ours(g, x, {**cond, "guidance": torch.full((2,), 1.0)}) - ours(g, x, cond)).abs().max()) > 1e-3


def test_labels_of_a_pixel_unet(tmp_path: Path) -> None:
    pipe = ddpm(classes=True)
    pipe.save_pretrained(tmp_path)
    g = load_diffusers(tmp_path, steps=2)
    assert len(g.conds.frequencies) == 3  # type: ignore[union-attr]
    x, labels, sigma = start(g, 3), torch.tensor([0, 1, 2]), g.denoiser.path.levels[400]  # type: ignore[union-attr]
    with torch.no_grad():
        own = g.denoiser(x * sigma, sigma, {"label": labels})
        scale = (1 + sigma**2).rsqrt()
        noise = pipe.unet((x * sigma * scale).float(), 400, class_labels=labels).sample
    close(own, (x * sigma - sigma * noise).float())
    with pytest.raises(InputError, match="no embedding for 'no class'"):
        g.denoiser(x, sigma, {"label": torch.tensor([0, -1, 2])})


def test_pixart_is_told_the_size_it_was_trained_to_hear(tmp_path: Path) -> None:
    pipe = pixart()
    config = dict(pipe.transformer.config) | {"use_additional_conditions": True, "num_attention_heads": 3}
    config |= {"attention_head_dim": 8, "cross_attention_dim": 24}
    pipe.register_modules(transformer=randomised(type(pipe.transformer).from_config(config)))
    pipe.save_pretrained(tmp_path)
    g = load_diffusers(tmp_path, steps=1, size=(32, 16))
    cond = g.encode(["a red cat"])
    assert cond["resolution"].tolist() == [[32.0, 16.0]] and cond["aspect_ratio"].tolist() == [[2.0]]
    g.conds.check(cond)  # type: ignore[union-attr]
    x, rest = torch.randn(1, 4, 16, 8), {k: cond[k] for k in ("resolution", "aspect_ratio")}
    mask, net = cond["prompt_attention_mask"], g.denoiser.net  # type: ignore[union-attr]
    with torch.no_grad():
        told = pipe.transformer(x, cond["prompt_embeds"], torch.tensor([7]), rest, encoder_attention_mask=mask)
        own = net(x, torch.tensor([7.0]), cond)
        other = net(x, torch.tensor([7.0]), {**cond, "resolution": 4 * cond["resolution"]})
    close(own, told.sample[:, :4])
    assert float((other - own).abs().max()) > 1e-3
    assert g.conds.nulls()["resolution"] is None  # type: ignore[union-attr]


def test_latents_and_pictures_are_each_others_inverse_in_scale(case: Callable[[str], Case]) -> None:
    for name in ("sd", "sd3", "sana"):
        c = case(name)
        codec: Any = c.generator.codec
        pictures = torch.rand(2, 3, 32, 32) * 2 - 1
        shift = getattr(c.pipe.vae.config, "shift_factor", None) or 0.0
        with torch.no_grad():
            found = c.pipe.vae.encode(pictures)
            z = found.latent if name == "sana" else found.latent_dist.mean
            latents = codec.encode(pictures)
            close(latents, (z - shift) * c.pipe.vae.config.scaling_factor)
            close(codec.decode(latents), c.pipe.vae.decode(z).sample)


def test_tiles_change_memory_and_little_else(case: Callable[[str], Case]) -> None:
    c = case("sd")
    codec: Any = load_diffusers(c.folder, steps=1, tiled=True).codec
    assert codec.vae.use_tiling and codec.vae.use_slicing
    codec.vae.tile_latent_min_size = 8
    latents = torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        tiled, whole = codec.decode(latents), c.generator.codec.decode(latents)  # type: ignore[union-attr]
    assert tiled.shape == whole.shape == (2, 3, 24, 24)
    assert 0 < float((tiled - whole).abs().max()) < 2
