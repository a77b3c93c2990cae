"""SNOOPI: guidance drawn from a range for each sample; NASA: cross-attention steered away from a negative prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Batch, null
from fewstep.core.denoiser import CountingDenoiser
from fewstep.core.fit import build_models
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.distill.snoopi import SNOOPI
from fewstep.distill.swiftbrush import SwiftBrush
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.models.nasa import NASA, nasa
from tiny_runs import STEADY, bits, check_restart, differing, run, tiny

METHOD = SNOOPI(sigma_init=2.5, guidance_range=(1.5, 4.0), student=STEADY, fake=STEADY)


def test_scales_fill_the_range_and_are_the_samples_own() -> None:
    scales = METHOD.scales(Noise.of(0, 4000))
    assert scales is not None and scales.shape == (4000,)
    assert 1.5 <= float(scales.min()) < 1.51 and 3.99 < float(scales.max()) < 4.0
    assert float(scales.mean()) == pytest.approx(2.75, abs=0.04)
    alone = METHOD.scales(Noise.of(0, torch.tensor([17])))
    assert alone is not None and alone[0] == scales[17]


def test_teacher_and_fake_score_have_the_same_scale() -> None:
    m = build_models(METHOD.roles(tiny()), "cpu")
    g = torch.Generator().manual_seed(3)
    for p in m.fake.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    y, sigma, cond = torch.randn(5, 1, 4, 4, generator=g), torch.linspace(0.1, 3, 5), {"label": torch.arange(5) % 3}
    noise = Noise.of(4, 5)
    scale = METHOD.scales(noise)
    assert scale is not None and len(scale.unique()) == 5
    found = METHOD.estimates(m, y, sigma, cond, noise)
    for net, made in zip((m.fake, m.teacher.network), found, strict=True):
        free, own = net(y, sigma, null(cond)), net(y, sigma, cond)
        assert float((made - (free + scale.reshape(-1, 1, 1, 1) * (own - free))).abs().max()) < 1e-5


def test_equal_scores_move_nothing() -> None:
    m = build_models(METHOD.roles(tiny()), "cpu")
    update = next(METHOD.step(m, Batch(None, {"label": torch.arange(6) % 3}), 0, Noise.of(1, 6)))
    m.student.requires_grad_(True)
    update.loss()["loss"].backward()  # type: ignore[index]
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-9 for p in m.student.parameters())


def test_a_range_of_one_value_is_swiftbrush_in_every_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sigma_init": 2.5, "student": STEADY, "fake": STEADY}
    run("a", tmp_path / "a", method=SNOOPI(guidance_range=(3.0, 3.0), **options))
    run("b", tmp_path / "b", method=SwiftBrush(guidance=3.0, **options))
    a = bits(tmp_path / "a")
    assert differing(a, bits(tmp_path / "b")) == []
    run("c", tmp_path / "c", method=SNOOPI(guidance_range=(1.0, 5.0), **options))
    assert differing(a, bits(tmp_path / "c"))


def test_a_resumed_run_and_micro_batches(tmp_path: Path) -> None:
    check_restart(tmp_path, lambda out, **more: run("a", out, method=METHOD, **more), far=2e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    pytest.importorskip("diffusers")
    from fewstep.sources.diffusers import load_diffusers
    from tiny_models import stable_diffusion

    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(folder)
    return load_diffusers(folder, steps=1)


def asked(g: Generator, prompt: str = "a red cat") -> Tensor:
    x = 5 * torch.randn(2, *g.denoiser.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return g.denoiser(x, 5.0, g.encode([prompt, "small house"]))


def features(g: Generator, layer: Any, at: str) -> Tensor:
    """What goes into the last projection of an attention layer."""
    found: list[Tensor] = []
    hook = layer.to_out[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    asked(g, at)
    hook.remove()
    return found[0]


def attention(g: Generator) -> Any:
    net = g.denoiser.inner.net if isinstance(g.denoiser, NASA) else g.denoiser.net  # type: ignore[union-attr,attr-defined]
    return net.model.down_blocks[0].attentions[0].transformer_blocks[0].attn2


def test_no_steering_changes_no_bit(text: Generator) -> None:
    before = asked(text)
    assert torch.equal(asked(nasa(text, "blue dog", 0.0)), before)
    steered = nasa(text, "blue dog", 0.5)
    assert float((asked(steered) - before).abs().max()) > 1e-4
    assert float((asked(steered) - asked(nasa(text, "tree", 0.5))).abs().max()) > 1e-5
    # The generator that it was made of is as it was.
    assert torch.equal(asked(text), before)
    assert [p.data_ptr() for p in steered.denoiser.inner.parameters()] == [  # type: ignore[attr-defined]
        p.data_ptr()
        for p in text.denoiser.parameters()  # type: ignore[attr-defined]
    ]


def test_a_negative_prompt_without_values_changes_nothing(text: Generator) -> None:
    # The layers to keys and values have no bias: no embedding, no values.
    assert torch.equal(asked(nasa(text, torch.zeros(3, 8), 0.7)), asked(text))


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_same_prompt_scales_the_features(text: Generator, alpha: float) -> None:
    same = text.encode(["a red cat"])["prompt_embeds"]
    steered = nasa(text, same, alpha)
    plain, scaled = features(text, attention(text), "a red cat"), features(steered, attention(steered), "a red cat")
    assert float(plain[0].abs().max()) > 1e-2
    assert float((scaled[0] - (1 - alpha) * plain[0]).abs().max()) < 1e-6
    assert float((scaled[1] - (1 - alpha) * plain[1]).abs().max()) > 1e-4


def test_no_further_evaluation_and_guidance_stays_outside(text: Generator) -> None:
    steered = nasa(text, "blue dog", 0.3)
    counted = CountingDenoiser(steered.denoiser)
    pictures = replace(steered, denoiser=counted).sample(cond=["a red cat"], seed=1, progress=False)
    assert counted.nfe == 1 and pictures.shape[0] == 1
    around = nasa(guided(text, 2.0), "blue dog", 0.3)
    assert type(around.denoiser).__name__ == "CFG" and isinstance(around.denoiser.denoiser, NASA)  # type: ignore[attr-defined]
    assert asked(around).isfinite().all()


BAD: list[tuple[Any, str]] = [
    (lambda g, p: SNOOPI(guidance_range=(0.5, 4.0)), "guidance range below 1"),
    (lambda g, p: SNOOPI(guidance_range=(4.0, 2.0)), "in this order"),
    (lambda g, p: SNOOPI(guidance_range=(2.0,)), "in this order"),
    (lambda g, p: SNOOPI(guidance=3.0), "leave it out"),
    (lambda g, p: SNOOPI().roles(replace(tiny(), conds=None)), "this one is unconditional"),
    (lambda g, p: SNOOPI().roles(guided(tiny(), 2.0)), "a CFG already"),
    (lambda g, p: nasa(g, "blue dog", -0.1), "alpha >= 0"),
    (lambda g, p: nasa(g, "blue dog", float("nan")), "alpha >= 0"),
    (lambda g, p: nasa(g, 3), "a text or its embeddings"),
    (lambda g, p: nasa(g, torch.zeros(2, 5, 8)), r"\(1, T, 8\), got \(2, 5, 8\)"),
    (lambda g, p: nasa(tiny(), "blue dog"), "got a ResMLP"),
    (lambda g, p: nasa(nasa(g, "blue dog"), "tree"), "steered away from a prompt already"),
    (lambda g, p: nasa(replace(g, conds=None), "blue dog"), "reads no prompts"),
    (lambda g, p: nasa(g, "blue dog").save(p), "NASA cannot be saved"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input(make: Any, message: str, text: Generator, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make(text, tmp_path)


def test_other_attention_is_refused(text: Generator) -> None:
    class Own:
        def __call__(self, *args: Any, **options: Any) -> Any:
            raise AssertionError

    layer = attention(text)
    kept = layer.processor
    try:
        layer.processor = Own()
        with pytest.raises(InputError, match="has the processor Own"):
            nasa(text, "blue dog")
    finally:
        layer.processor = kept
