"""SDXS: pruning keeps the teacher's weights, the threshold decides between matching and scores, decoders shrink."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Batch
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions
from fewstep.core.role import Models
from fewstep.data import OnlinePairs
from fewstep.data.conditions import ImageConditions
from fewstep.data.sr import SuperResolution
from fewstep.distill import VSD
from fewstep.distill.front import distill
from fewstep.distill.sdxs import SDXS, distill_decoder, feature_maps, ssim
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.models.image_conditioned import image_conditioned
from fewstep.models.lora import LoRA
from fewstep.models.prune import Pruning, TinyDecoderConfig, pruned
from fewstep.solve.euler import euler
from fewstep.train.memory import estimate_memory
from fewstep.train.run import train
from tiny_runs import STEADY, StopsAfter, bits, check_restart, tiny, tiny_data

OPTIONS: dict[str, Any] = {"batch": 8, "micro": 2, "log_every": 2, "save_every": 3, "progress": False}
METHOD = SDXS(imitate=0.4, student=STEADY, fake=STEADY)


def teacher() -> Generator:
    made = tiny("unet", channels=8, multipliers=(1, 1), blocks=2, attention=(4, 2))
    return made.with_sampler(euler(torch.tensor([80.0, 2.0, 0.0], dtype=torch.float64)))


def pairs(of: Generator) -> OnlinePairs:
    return OnlinePairs(of, size=64)


def models(method: SDXS, of: Generator) -> Models:
    """The fake score is moved away from the teacher, which it starts as."""
    m = build_models(method.roles(of), "cpu")
    g = torch.Generator().manual_seed(3)
    for p in m.fake.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    return m


def gradients(method: Any, m: Models, batch: Batch, i: int = 0) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Of the student in its first update, and what the loss tells."""
    update = next(method.step(m, batch, i, Noise.of(1, 6)))
    assert update.roles == ("student",)
    m.student.requires_grad_(True).zero_grad()
    losses = update.loss()
    losses["loss"].backward()
    m.student.requires_grad_(False)
    return [None if p.grad is None else p.grad.clone() for p in m.student.parameters()], losses


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("smaller", [True, False])
def test_no_threshold_is_vsd_in_every_bit(smaller: bool) -> None:
    of = teacher()
    batch = pairs(of).take(torch.arange(6))
    method = SDXS(tau=(0.0, 0.0), imitate=0.0, smaller=smaller)
    m = models(method, of)
    own, _ = gradients(method, m, batch)
    vsd, _ = gradients(VSD(student=method.student, fake=method.fake), m, batch)
    assert same(own, vsd) and any(g is not None and float(g.abs().max()) > 0 for g in own)


def test_a_full_threshold_is_matching_alone() -> None:
    of = teacher()
    batch = pairs(of).take(torch.arange(6))
    method = SDXS(tau=(1.0, 1.0), imitate=0.0, match=2.0)
    m = models(method, of)
    own, told = gradients(method, m, batch)
    # No score is asked: other ones make no difference.
    m.networks["fake"] = m.networks["teacher"]
    assert same(own, gradients(method, m, batch)[0]) and set(told) == {"loss", "matching"}
    m.student.requires_grad_(True).zero_grad()
    assert batch.x is not None and batch.noise is not None
    x = m.student(80.0 * batch.noise, 80.0, batch.cond)
    (2.0 * m.maps(x, batch.x, batch.cond).mean()).backward()
    assert same(own, [p.grad for p in m.student.parameters()])


def test_between_each_sample_learns_from_one_of_both() -> None:
    of = teacher()
    batch = pairs(of).take(torch.arange(6))
    method = SDXS(tau=(0.5, 0.5), imitate=0.0, normaliser="none")
    m = models(method, of)
    noise = Noise.of(1, 6)
    sigma, _ = method.draw(noise.fold("student"), 0.5)
    low = method.below(0.5, sigma)
    assert 0 < int(low.sum()) < 6
    seen: list[Tensor] = []
    hook = m.student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _, told = gradients(method, m, batch)
    hook.remove()
    assert batch.noise is not None
    fresh = noise.normal(of.denoiser.shape, "start")
    wanted = 80.0 * torch.where(low.reshape(-1, 1, 1, 1), batch.noise, fresh)
    assert torch.equal(seen[0], wanted) and set(told) == {"loss", "matching", "fisher"}


def test_the_threshold_falls_from_all_levels_to_none() -> None:
    method = SDXS(imitate=0.2, anneal=0.5)
    assert [method.threshold(p) for p in (0.2, 0.4, 0.6, 1.0)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert method.threshold(0.6) == 0.0
    sigma, _ = method.draw(Noise.of(0, 4000), 0.5)
    counts = [float(method.below(share, sigma).float().mean()) for share in (0, 0.25, 0.5, 1)]
    assert counts == pytest.approx([0, 0.25, 0.5, 1], abs=0.03) and counts[0] == 0 and counts[-1] == 1


def test_imitation_of_itself_is_free_and_reaches_every_block() -> None:
    of = teacher()
    batch = pairs(of).take(torch.arange(6))
    method = SDXS(imitate=0.5, smaller=False)
    _, told = gradients(method, build_models(method.roles(of), "cpu"), batch)
    assert float(told["loss"].detach()) == 0
    small = replace(method, smaller=True)
    own, told = gradients(small, models(small, of), batch)
    assert float(told["output"]) > 0 and float(told["features"]) > 0
    without, told = gradients(replace(small, feature_weight=0.0), models(small, of), batch)
    assert set(told) == {"loss", "output"} and not same(own, without)


def test_structural_similarity() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 2, 9, 8, generator=g), torch.randn(3, 2, 9, 8, generator=g)
    assert float((ssim(x, x) - 1).abs().max()) < 1e-6
    assert ssim(-y, y).max() < 0 and ssim(-y, y).min() >= -1
    assert float((ssim(7 * x, 7 * y) - ssim(x, y)).abs().max()) < 1e-5
    assert torch.allclose(ssim(x[1:2], y[1:2]), ssim(x, y)[1:2], atol=1e-6)
    flat = torch.full((2, 1, 4, 4), 0.3)
    assert (
        ssim(flat, flat).tolist() == pytest.approx([1, 1], abs=1e-4)
        and ssim(x[..., :1, :1], y[..., :1, :1]).isfinite().all()
    )
    metrics = pytest.importorskip("torchmetrics.functional.image")
    least, most = float(y[:1].min()), float(y[:1].max())
    other = metrics.structural_similarity_index_measure(
        x[:1] - least, y[:1] - least, gaussian_kernel=False, kernel_size=7, data_range=most - least
    )
    assert float(ssim(x[:1], y[:1])) == pytest.approx(float(other), abs=1e-5)


@pytest.mark.parametrize("features", ["teacher", "pixels"])
def test_feature_matching_is_0_for_equal_samples(features: str) -> None:
    of = teacher()
    batch = pairs(of).take(torch.arange(5))
    maps = feature_maps(of, features)
    assert batch.x is not None
    with torch.no_grad():
        found = maps(batch.x, batch.x, batch.cond)
    assert found.shape == (5,) and float(found.abs().max()) < 1e-5
    leaf = batch.x.flip(-1).requires_grad_()
    maps(leaf, batch.x, batch.cond).sum().backward()
    assert leaf.grad is not None and float(leaf.grad.abs().max()) > 0
    with torch.no_grad():
        other = maps(batch.x.flip(-1), batch.x, batch.cond)
        alone = maps(batch.x.flip(-1)[2:3], batch.x[2:3], {"label": batch.cond["label"][2:3]})
    assert float(other.min()) > 1e-3 and float(other.max()) <= 2
    assert float((alone - other[2:3]).abs().max()) < 1e-5


def test_packaged_features_of_digits() -> None:
    of = replace(teacher())
    of.denoiser.shape = (3, 8, 8)  # type: ignore[misc]
    maps, x = feature_maps(of, "own"), torch.rand(4, 3, 8, 8) * 2 - 1
    assert maps(x, x, {}).shape == (4,) and float(maps(x.flip(-1), x, {}).min()) > 1e-3


HOW = {
    "fewer blocks": Pruning(),
    "no attention": Pruning(blocks=2, bare=(0,)),
    "a resolution less": Pruning(levels=1),
}


@pytest.mark.parametrize("name", HOW)
def test_our_own_unet_keeps_what_it_can(name: str) -> None:
    D: Any = teacher().denoiser
    small: Any = pruned(D, HOW[name])
    count = [sum(p.numel() for p in net.parameters()) for net in (D, small)]
    assert count[1] < count[0]
    own, kept = small.net, D.net
    assert torch.equal(own.encoder[0].conv1.weight, kept.encoder[0].conv1.weight)
    assert torch.equal(own.enter.weight, kept.enter.weight) and torch.equal(own.leave.weight, kept.leave.weight)
    last = [net.decoder[-1] for net in (own, kept)]
    assert torch.equal(last[0].conv1.weight, last[1].conv1.weight)
    if name == "fewer blocks":
        # The first and the last of three, and the block that doubles.
        assert torch.equal(own.decoder[0].conv1.weight, kept.decoder[0].conv1.weight)
        assert torch.equal(own.decoder[1].conv1.weight, kept.decoder[2].conv1.weight)
        assert torch.equal(own.decoder[2].conv1.weight, kept.decoder[3].conv1.weight)
        assert torch.equal(own.encoder[1].conv1.weight, kept.encoder[2].conv1.weight)
    if name == "no attention":
        assert isinstance(own.encoder[0].attention, torch.nn.Identity)
    # Nothing is shared, and it runs.
    assert {p.data_ptr() for p in small.parameters()}.isdisjoint(p.data_ptr() for p in D.parameters())
    x = torch.randn(2, *D.shape)
    assert small(x, 1.0, {"label": torch.tensor([0, 2])}).shape == x.shape
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), pruned(D, HOW[name]).parameters(), strict=True))


def test_pruning_nothing_is_the_same_network() -> None:
    D: Any = teacher().denoiser
    same_again = pruned(D, Pruning(blocks=2)).state_dict()
    assert all(torch.equal(v, same_again[k]) for k, v in D.state_dict().items()) and len(same_again) == len(
        D.state_dict()
    )


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    pytest.importorskip("diffusers")
    from fewstep.sources.diffusers import load_diffusers
    from tiny_models import stable_diffusion

    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion(layers_per_block=2).save_pretrained(folder)
    return load_diffusers(folder, steps=1, prompts=["a red cat", "small house"])


def test_a_unet_of_diffusers(latent: Generator) -> None:
    D: Any = latent.denoiser
    small: Any = pruned(D, Pruning(middle=False, bare=(0,)))
    own, kept = small.net.model, D.net.model
    assert own.mid_block is None and len(own.up_blocks[0].resnets) == 2 and len(kept.up_blocks[0].resnets) == 3
    for block in (0, 1):
        for j, k in ((0, 0), (1, 2)):
            mine, its = own.up_blocks[block].resnets[j], kept.up_blocks[block].resnets[k]
            assert torch.equal(mine.conv1.weight, its.conv1.weight)
        assert torch.equal(
            own.down_blocks[block].resnets[0].conv1.weight, kept.down_blocks[block].resnets[0].conv1.weight
        )
    assert type(own.down_blocks[0]).__name__ == "DownBlock2D" and type(own.up_blocks[1]).__name__ == "UpBlock2D"
    x, cond = torch.randn(2, *D.shape), latent.encode(["a red cat", "small house"])
    with torch.no_grad():
        assert small(x, 3.0, cond).isfinite().all()
        full = pruned(D, Pruning(blocks=2))
        assert torch.equal(full(x, 3.0, cond), D(x, 3.0, cond))
    method = SDXS(imitate=0.5, prune=Pruning(middle=False))
    batch = Batch(torch.randn(6, *D.shape), latent.encode(["a red cat"] * 6), torch.randn(6, *D.shape))
    own_gradients, told = gradients(method, models(method, latent), batch)
    assert told["loss"].isfinite() and any(g is not None for g in own_gradients)


def test_a_small_decoder_learns_the_codecs(latent: Generator) -> None:
    codec: Any = latent.codec

    class Latents:
        shape = tuple(latent.denoiser.shape)

        def __len__(self) -> int:
            return 16

        def take(self, ids: Tensor) -> Batch:
            return Batch(Noise.of(0, ids).normal(self.shape, "x"), {})

    test = Noise.of(1, 8).normal(latent.denoiser.shape, "x")
    errors = []
    with torch.no_grad():
        aim = codec.decode(test)
    for budget in (1, 50):
        small = distill_decoder(latent, Latents(), budget=budget, width=8, blocks=1, batch=8)
        with torch.no_grad():
            errors.append(float((small.decode(test) - aim).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(small.encode(pictures), codec.encode(pictures))
    assert replace(latent, codec=small).sample(1, progress=False).shape[1] == 3


def go(out: Path, *, stop: int | None = None, **options: Any) -> Generator:
    of = teacher()
    data = pairs(of)
    settings = OPTIONS | options
    source: Any = data if stop is None else StopsAfter(data, stop * settings["micro"])
    return train(of, METHOD, source, out=out, budget=6, **settings)


def test_a_resumed_run_and_micro_batches(tmp_path: Path) -> None:
    made = check_restart(tmp_path, lambda out, **more: go(out, **more), far=2e-3)
    opened = Generator.load(tmp_path / "whole")
    assert opened.fingerprint() == made.fingerprint() and opened.sampler.nfe == 1
    assert opened.denoiser.net.config.blocks == 1 and opened.sample(2, progress=False).isfinite().all()  # type: ignore[attr-defined]


def test_the_fake_score_as_lora_and_a_guided_teacher(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    of = guided(teacher(), 2.0)
    data = pairs(of)
    options: dict[str, Any] = OPTIONS | {"lora": LoRA(2), "lora_roles": ("fake",)}
    made = distill(of, METHOD, data, out=tmp_path, budget=4, **options)
    tensors = bits(tmp_path)
    assert any("roles/fake" in k and "lora_B" in k and float(v.abs().max()) > 0 for k, v in tensors.items())
    assert made.denoiser.net.config.blocks == 1 and not any("lora_" in k for k in tensors if "roles/student" in k)  # type: ignore[attr-defined]


def test_a_teacher_that_reads_a_picture(tmp_path: Path) -> None:
    data = SuperResolution(tiny_data())
    start = teacher()
    D = image_conditioned(start.denoiser, data.image_shape)  # type: ignore[arg-type]
    of = replace(start, denoiser=D, conds=ImageConditions(data))
    made = distill(of, replace(METHOD, smaller=False), pairs(of), out=tmp_path, budget=4, **OPTIONS)
    image = data.take(torch.arange(2)).cond["image"]
    x = 80.0 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = [made.denoiser(x, 80.0, {"image": picture}) for picture in (image, image.flip(0))]
    assert all(t.isfinite().all() for t in told)


def test_memory_is_told() -> None:
    of = teacher()
    found = estimate_memory(METHOD, of, pairs(of), FitOptions(batch=8)).roles
    assert 0 < found["student"].weights < found["fake"].weights


BAD: list[tuple[Any, str]] = [
    (lambda p: SDXS(steps=2), "student of one step, got steps=2"),
    (lambda p: SDXS(tau=(1.5, 0.0)), "tau as two shares"),
    (lambda p: SDXS(imitate=1.0), "0 <= imitate < 1"),
    (lambda p: SDXS(anneal=0.0), "0 < anneal <= 1"),
    (lambda p: SDXS(match=-1.0), "match > 0"),
    (lambda p: Pruning(blocks=0), "blocks >= 1"),
    (lambda p: Pruning(bare=(-1,)), "resolutions >= 0"),
    (lambda p: pruned(teacher().denoiser, Pruning(middle=False)), "always has a middle"),  # type: ignore[arg-type]
    (lambda p: pruned(teacher().denoiser, Pruning(levels=2)), "more resolutions than the network's 2"),  # type: ignore[arg-type]
    (lambda p: pruned(teacher().denoiser, Pruning(bare=(5,))), "more resolutions than the network's 2"),  # type: ignore[arg-type]
    (lambda p: SDXS().roles(tiny()), "a resmlp network cannot be pruned"),
    (lambda p: SDXS(smaller=False).roles(tiny()), "no features .* to match"),
    (lambda p: SDXS(features="own").roles(teacher()), "no packaged features"),
    (lambda p: distill(teacher(), SDXS(), tiny_data(), out=p / "x", budget=1), "learns from pairs"),
    (lambda p: distill(teacher(), SDXS(), pairs(tiny()), out=p / "x", budget=1), "made by another teacher"),
    (lambda p: distill_decoder(teacher(), tiny_data(), budget=1), "without a codec"),
    (lambda p: TinyDecoderConfig(factor=6), "power of 2"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path)
    assert not (tmp_path / "x").exists()
