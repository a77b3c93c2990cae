"""Super-resolution data, conditions that are pictures and how files hold them, and scores of paired pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep import Generator, Noise
from fewstep.core.generator import CONFIG
from fewstep.core.pipeline import open_conditions
from fewstep.data import Images, load_data
from fewstep.data.conditions import ConditionsOnly, ImageConditions
from fewstep.data.sr import SuperResolution, shrink, sr_digits
from fewstep.errors import InputError
from fewstep.measure.paired import colour_bias, colour_shift, paired, psnr, ssim
from fewstep.models.image_conditioned import image_conditioned
from fewstep.train import untrained


def colours(count: int = 6, side: int = 8) -> Images:
    g = torch.Generator().manual_seed(0)
    return Images("colours", torch.rand(count, 3, side, side, generator=g) * 2 - 1, torch.arange(count) % 3)


# ---- data


def test_small_digits_are_the_means_of_their_blocks() -> None:
    data, ids = sr_digits(), torch.tensor([0, 5, 1700])
    batch = data.take(ids)
    assert data.name == "sr-digits" and data.shape == (1, 8, 8) and data.image_shape == (1, 4, 4)
    assert len(data) == 1797 and data.classes == 0 and data.frequencies == [] and set(batch.cond) == {"image"}
    assert batch.x is not None and torch.equal(batch.x, load_data("digits").take(ids).x)
    by_hand = batch.x.reshape(3, 1, 4, 2, 4, 2).mean((3, 5))
    assert float((batch.cond["image"] - by_hand).abs().max()) < 1e-6
    assert data.std == load_data("digits").std and len(sr_digits(50)) == 50


def test_noise_is_keyed_by_the_picture_and_labels_are_kept_when_asked_for() -> None:
    plain, noisy = SuperResolution(colours()), SuperResolution(colours(), noise=0.3, labelled=True)
    ids = torch.tensor([4, 1])
    batch, swapped = noisy.take(ids), noisy.take(ids.flip(0))
    assert batch.cond["label"].tolist() == [1, 1] and noisy.classes == 3 and len(noisy.frequencies) == 3
    assert torch.equal(batch.cond["image"], swapped.cond["image"].flip(0))
    added = batch.cond["image"] - plain.take(ids).cond["image"]
    assert 0.2 < float(added.std()) < 0.4 and not torch.equal(added[0], added[1])
    other = SuperResolution(colours(), noise=0.3, seed=1, labelled=True)
    assert not torch.equal(other.take(ids).cond["image"], batch.cond["image"])
    assert len({d.fingerprint for d in (plain, noisy, other, SuperResolution(colours(), 4))}) == 4
    assert SuperResolution(colours()).fingerprint == plain.fingerprint
    assert SuperResolution(colours(), 4).take(ids).cond["image"].shape == (2, 3, 2, 2)


# ---- conditions


def test_conditions_are_drawn_by_each_samples_own_seed() -> None:
    conds, noise = ImageConditions(sr_digits()), Noise.of(3, 40)
    drawn = conds.draw(noise)["image"]
    assert drawn.shape == (40, 1, 4, 4)
    order = torch.arange(40).flip(0)
    assert torch.equal(conds.draw(noise[order])["image"], drawn[order])
    everything = sr_digits().take(torch.arange(1797)).cond["image"].flatten(1)
    assert float(torch.cdist(drawn.flatten(1), everything).min(1).values.max()) < 1e-3
    assert len(drawn.flatten(1).unique(dim=0)) > 30
    batch = ConditionsOnly(conds).take(torch.arange(4))
    assert batch.x is None and batch.cond["image"].shape == (4, 1, 4, 4)
    assert float(conds.nulls()["image"].abs().max()) == 0 and conds.nulls()["image"].shape == (1, 4, 4)


def reading(data: SuperResolution) -> Generator:
    """A tiny generator whose pictures depend on the condition."""
    start = untrained(data, "resmlp", width=16, embedding=8, blocks=1)
    D = image_conditioned(start.denoiser, data.image_shape)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(4)
    for p in D.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return replace(start, denoiser=D, conds=ImageConditions(data))


@pytest.mark.parametrize("labelled", [False, True])
def test_a_generator_with_image_conditions_is_saved_and_opened(tmp_path: Path, labelled: bool) -> None:
    from fewstep.data import digits

    made = reading(SuperResolution(digits(), noise=0.1, labelled=labelled))
    again = Generator.load(made.save(tmp_path))
    assert isinstance(again.conds, ImageConditions) and again.fingerprint() == made.fingerprint()
    pictures = made.sample(4, seed=2, progress=False)
    assert torch.equal(again.sample(4, seed=2, progress=False), pictures)
    image = torch.zeros(4, 1, 4, 4)
    assert float((again.sample(4, {"image": image}, seed=2, progress=False) - pictures).abs().max()) > 0.01
    assert ("classes=10" in repr(again.conds)) == labelled


def test_a_generator_opens_where_the_data_are_not(tmp_path: Path) -> None:
    made = reading(SuperResolution(colours()))
    again = Generator.load(made.save(tmp_path))
    assert again.sample(2, {"image": torch.zeros(2, 3, 4, 4)}, progress=False).shape == (2, 3, 8, 8)
    with pytest.raises(InputError, match=r"does not say where the data .* pass the pictures as cond="):
        again.sample(2, progress=False)
    body = json.loads((tmp_path / CONFIG).read_text())
    body["conditions"] |= {"source": "/nowhere/at/all"}
    (tmp_path / CONFIG).write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"data of these image conditions do not open: pass the pictures"):
        Generator.load(tmp_path).sample(2, progress=False)
    body["conditions"] |= {"source": "digits"}
    (tmp_path / CONFIG).write_text(json.dumps(body))
    with pytest.raises(InputError, match="data 'digits' have changed since"):
        Generator.load(tmp_path).sample(2, progress=False)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: SuperResolution(colours(), 1), r"'colours' of 8x8 cannot shrink by the factor 1"),
    (lambda: SuperResolution(colours(), 3), "by the factor 3: expected a whole number of at least 2 that divides"),
    (lambda: SuperResolution(colours(), 2.0), r"factor must be a whole number, got 2\.0"),  # type: ignore[arg-type]
    (lambda: SuperResolution(colours(), noise=-1.0), r"must be finite and >= 0, got -1\.0"),
    (lambda: SuperResolution(Images("bare", colours().pixels), labelled=True), "'bare' has no labels to keep"),
    (lambda: sr_digits(5).take(torch.tensor([5])), "id 5 does not exist"),
    (lambda: ImageConditions(colours()), "'colours' has no pictures as conditions: expected data such as sr-digits"),  # type: ignore[arg-type]
    (
        lambda: ImageConditions(sr_digits()).check({"image": torch.zeros(2, 1, 8, 8)}),
        r"image conditions of wrong size: expected floating \(B, 1, 4, 4\), got float32 of shape \(2, 1, 8, 8\)",
    ),
    (
        lambda: ImageConditions(sr_digits()).check({"image": torch.zeros(2, 1, 4, 4).long()}),
        r"image conditions of wrong size: .* got int64",
    ),
    (lambda: ImageConditions(sr_digits()).check({}), "condition 'image' is missing"),
    (lambda: ImageConditions(sr_digits()).check({"label": torch.zeros(2).long()}), "unknown condition .* 'label'"),
    (
        lambda: ImageConditions(sr_digits()).check({"image": torch.full((1, 1, 4, 4), torch.nan)}),
        "not finite",
    ),
    (lambda: open_conditions({"kind": "sounds"}), "unknown kind of conditions 'sounds'"),
    (lambda: open_conditions({"kind": "images", "shape": [1, 4, 4]}), "'images' conditions lacks or garbles 'classes'"),
    (
        lambda: open_conditions(
            {"kind": "images", "shape": [1, 4], "classes": [], "fingerprint": "", "source": None, "options": None}
        ),
        r"need a shape \(C, h, w\), got \(1, 4\)",
    ),
    (lambda: psnr(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4)), "paired scores need two batches"),
    (lambda: psnr(torch.zeros(0, 1, 8, 8), torch.zeros(0, 1, 8, 8)), "paired scores need two batches"),
    (lambda: ssim(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)), "window of 11 pixels .* odd one, at most 7"),
    (lambda: ssim(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), window=4), "window of 4 pixels"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


# ---- paired scores


def test_paired_scores_are_those_of_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    g = torch.Generator().manual_seed(0)
    right = (torch.rand(5, 3, 32, 24, generator=g) * 2 - 1).double()
    made = (right + 0.3 * torch.randn(right.shape, generator=g)).clamp(-1, 1)
    for i in range(5):
        one, other = made[i : i + 1], right[i : i + 1]
        wanted = functional.peak_signal_noise_ratio(one, other, data_range=2.0)
        assert abs(float(psnr(one, other) - wanted)) < 1e-4
        _, full = functional.structural_similarity_index_measure(one, other, data_range=2.0, return_full_image=True)
        # It counts windows that reach beyond the picture too; the publication and this library do not.
        assert abs(float(ssim(one, other) - full[..., 5:-5, 5:-5].mean())) < 1e-6
    assert paired(made, right).psnr == pytest.approx(float(psnr(made, right).mean()))


def test_equal_pictures_and_a_cast() -> None:
    right = colours(4, 16).pixels * 0.5
    same = paired(right, right)
    assert same.psnr == float("inf") and same.ssim == pytest.approx(1, abs=1e-12) and same.colour_shift == 0
    cast = right + torch.tensor([0.3, 0.0, -0.4]).reshape(1, 3, 1, 1)
    assert colour_shift(cast, right) == pytest.approx(0.5, abs=1e-6)
    assert colour_bias(cast, right) == pytest.approx([0.3, 0.0, -0.4], abs=1e-6)
    # Noise of mean 0 moves pixels and no colours.
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
    moved = right + 0.5 * (noise - noise.mean((2, 3), keepdim=True))
    assert colour_shift(moved, right) < 1e-6 and float(psnr(moved, right).mean()) < 15
    assert float(shrink(right, 16)[0, 0]) == pytest.approx(float(right[0, 0].mean()))
