"""Zero-shot editing with consistency models: what is known stays, and the rest has the exact conditional law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.core.cond import Cond
from fewstep.core.denoiser import CountingDenoiser
from fewstep.core.generator import Generator
from fewstep.edit import Known, colorize, denoise, edit, inpaint, super_resolve
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.models.consistency import anchored
from fewstep.solve.consistency import consistency
from fewstep.solve.euler import euler
from tiny_runs import tiny

LOW, TOP = 0.002, 20.0


class Flow:
    """The exact consistency function of independent Gaussian pixels."""

    def __init__(self, shape: tuple[int, ...], mean: float = 0.1, spread: float = 0.2) -> None:
        self.shape, self.mean, self.variance = shape, mean, spread**2
        self.sigma_min, self.sigma_max, self.sigma_data = LOW, TOP, spread

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype)
        gain = ((self.variance + LOW**2) / (self.variance + level**2)).sqrt()
        return self.mean + gain * (x - self.mean)


def exact(*shape: int) -> Generator:
    return Generator(Flow(shape), consistency(torch.tensor([TOP, 1.0, 0.0]), sigma_min=LOW))


def trained() -> Generator:
    made = tiny()
    table = consistency(torch.tensor([80.0, 1.0, 0.0]), sigma_min=LOW)
    return replace(made, denoiser=anchored(made.denoiser, LOW), sampler=table)  # type: ignore[arg-type]


def pictures(n: int, *shape: int, seed: int = 0) -> Tensor:
    return 0.1 + 0.2 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)


def edits(
    generator: Generator, n: int, **options: object
) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor], Tensor]]:
    """By name: the edited pictures, what was measured of the original, and that measurement."""
    channels = generator.denoiser.shape[0]
    y = pictures(n, *generator.denoiser.shape).clamp(-1, 1)
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    shrink = torch.nn.AvgPool2d(2)
    made = {
        "inpaint": (inpaint(generator, y, mask, **options), lambda x: x * mask, y * mask),
        "super_resolve": (super_resolve(generator, shrink(y), **options), shrink, shrink(y)),
    }
    if channels == 3:
        w = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
        grey = (y * w).sum(1, keepdim=True)
        made["colorize"] = (
            colorize(generator, grey, **options),
            lambda x: (x * w).sum(1, keepdim=True),
            grey,
        )
    return made


@pytest.mark.parametrize("name", ["inpaint", "super_resolve", "colorize"])
def test_what_is_known_stays(name: str) -> None:
    for steps in (1, 3):
        found, measure, told = edits(exact(3, 4, 4), 50, steps=steps)[name]
        assert found.shape == (50, 3, 4, 4) and float((measure(found) - told).abs().max()) < 1e-6


def test_the_trained_network_is_held_to_what_is_known_too() -> None:
    for name, (found, measure, told) in edits(trained(), 5, steps=4).items():
        assert float((measure(found) - told).abs().max()) < 1e-6, name
        assert bool(found.isfinite().all())


def test_unknown_pixels_of_independent_ones_have_the_data_law() -> None:
    generator = exact(1, 4, 4)
    y = pictures(3000, 1, 4, 4)
    mask = torch.zeros(4, 4)
    mask[:2] = 1
    made = inpaint(generator, y, mask, steps=8)
    unknown = made[:, :, 2:].double()
    assert float(unknown.mean()) == pytest.approx(0.1, abs=0.01)
    assert float(unknown.std()) == pytest.approx(0.2, abs=0.01)
    # Nothing in them can depend on the known pixels, which are independent.
    both = torch.corrcoef(torch.stack([unknown.flatten(), y[:, :, :2].double().flatten()]))
    assert abs(float(both[0, 1])) < 0.02


def test_enlarged_blocks_have_the_law_given_their_means() -> None:
    small = torch.full((3000, 1, 2, 2), 0.3)
    made = super_resolve(exact(1, 4, 4), small, steps=12).double()
    assert float((torch.nn.functional.avg_pool2d(made, 2) - 0.3).abs().max()) < 1e-6
    # Four independent pixels of variance v given their mean: v (1 - 1/4).
    assert float(made.std()) == pytest.approx(0.2 * 0.75**0.5, abs=0.006)


def test_colours_have_the_law_given_the_luma() -> None:
    made = colorize(exact(3, 2, 2), torch.full((3000, 1, 2, 2), 0.1), steps=12).double()
    w = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    want = 0.04 * (torch.eye(3, dtype=torch.float64) - torch.outer(w, w) / w.square().sum())
    got = torch.cov(made.permute(1, 0, 2, 3).flatten(1))
    assert float((got - want).abs().max()) < 0.002


def test_one_evaluation_a_level_and_the_papers_noise() -> None:
    generator = exact(1, 4, 4)
    counted = CountingDenoiser(generator.denoiser)
    levels = torch.tensor([20.0, 3.0, 0.5])
    seen: list[tuple[float, Tensor]] = []

    class Watched(Flow):
        def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
            seen.append((float(sigma), x))
            return counted(x, sigma, cond)

    y = pictures(2000, 1, 4, 4)
    watched = replace(generator, denoiser=Watched((1, 4, 4)))
    inpaint(watched, y, torch.ones(4, 4), levels=levels, batch=2000)
    assert counted.nfe == 3 and [s for s, _ in seen] == levels.tolist()
    for k, (level, x) in enumerate(seen):
        want = level if k == 0 else (level**2 - LOW**2) ** 0.5
        # With everything known, what the network sees is the picture and this noise.
        assert float((x - y).std()) == pytest.approx(want, rel=0.02)


def test_a_picture_is_a_function_of_its_seed_alone() -> None:
    generator = trained()
    y = pictures(6, 1, 4, 4).clamp(-1, 1)
    mask = torch.eye(4)
    label = {"label": torch.tensor([0, 1, 2, 0, 1, 2])}
    whole = inpaint(generator, y, mask, cond=label, seed=3)
    parts = inpaint(generator, y, mask, cond=label, seed=3, batch=1)
    assert float((whole - parts).abs().max()) < 1e-5
    first = inpaint(generator, y[:2], mask, cond={"label": label["label"][:2]}, seed=3)
    assert float((whole[:2] - first).abs().max()) < 1e-5
    assert float((inpaint(generator, y, mask, cond=label, seed=4) - whole).abs().max()) > 1e-2
    shifted = inpaint(generator, y, mask, cond={"label": label["label"].flip(0)}, seed=3)
    assert float((shifted - whole).abs().max()) > 1e-4


def test_denoising_is_one_evaluation_at_the_level_of_the_noise() -> None:
    generator = exact(1, 4, 4)
    x = pictures(7, 1, 4, 4)
    found = denoise(generator, x, 0.5, batch=3)
    assert float((found - generator.denoiser(x, 0.5).clamp(-1, 1)).abs().max()) < 1e-6


Y = torch.zeros(2, 1, 4, 4)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: inpaint(tiny(), Y, torch.ones(4, 4)), "needs a consistency model.*'heun'.*cd, ct or ect"),
    (lambda: inpaint(replace(exact(1, 4, 4), codec=object()), Y, torch.ones(4, 4)), "makes latents"),  # type: ignore[arg-type]
    (lambda: inpaint(exact(1, 4, 4), Y, torch.ones(3, 4)), r"got \(3, 4\) for pictures \(2, 1, 4, 4\)"),
    (lambda: inpaint(exact(1, 4, 4), Y, torch.full((4, 4), 0.5)), "nothing between"),
    (lambda: inpaint(exact(1, 8, 8), Y, torch.ones(4, 4)), r"are \(1, 8, 8\), what is known is \(2, 1, 4, 4\)"),
    (lambda: inpaint(exact(1, 4, 4), Y.long(), torch.ones(4, 4)), "must be floats"),
    (lambda: inpaint(exact(1, 4, 4), Y, torch.ones(4, 4), steps=0), "steps >= 1, got 0"),
    (lambda: inpaint(exact(1, 4, 4), Y, torch.ones(4, 4), levels=karras(3, 0.1, 10.0).flip(0)), "must fall"),
    (lambda: inpaint(exact(1, 4, 4), Y, torch.ones(4, 4), levels=torch.tensor([90.0, 1.0])), "between 20 and 0.002"),
    (lambda: inpaint(exact(1, 4, 4), Y, torch.ones(4, 4), cond={"label": torch.zeros(2)}), "unconditional"),
    (lambda: inpaint(trained(), Y, torch.ones(4, 4), cond={"label": torch.tensor([0])}), r"conditions for \[1\]"),
    (lambda: colorize(exact(1, 4, 4), Y), "1 channels"),
    (lambda: colorize(exact(3, 4, 4), Y, luma=(0.5, 0.5)), "3 channels"),
    (lambda: super_resolve(exact(1, 4, 4), Y), "sides smaller by a whole factor"),
    (lambda: super_resolve(exact(1, 4, 4), torch.zeros(2, 1, 2, 3)), "sides smaller by a whole factor"),
    (lambda: denoise(exact(1, 4, 4), Y, 100.0), "noise of 0.002 to 20"),
    (
        lambda: edit(exact(1, 4, 4).with_sampler(euler(karras(2, LOW, TOP))), Known(Y, lambda x, rows: x)),
        "needs a consistency model",
    ),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
