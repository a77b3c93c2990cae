"""Generators: pictures that depend on their seed alone, folders that open anywhere, and damaged ones that say so."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import CFG, DDPM, EDM, Classes, Generator, InputError, Mixture, Noise, Precond, guided, load
from fewstep.core.denoiser import start_std
from fewstep.core.tableau import Builder
from fewstep.data import load_data
from fewstep.grid import karras
from fewstep.solve import dpmpp2m, euler
from fewstep.train import untrained


def make(width: int = 16, classes: bool = True) -> Generator:
    """A tiny network with weights that matter, and a sampler of a few steps."""
    made = untrained(load_data("digits"), "resmlp", width=width, embedding=8, blocks=1)
    assert isinstance(made.denoiser, Precond)
    generator = torch.Generator().manual_seed(4)
    for p in made.denoiser.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3, generator=generator)
    sampler = dpmpp2m(karras(4, made.denoiser.sigma_min, made.denoiser.sigma_max))
    return replace(made, sampler=sampler, conds=made.conds if classes else None, card={"made": "by a test"})


def noisy_sampler(generator: Generator) -> Any:
    table = Builder(80.0)
    table.row(80.0, 1.0, {0: 0.0}, {0: 1.0}, {0: 1.0})
    table.row(1.0, 0.0, {}, {1: 1.0})
    return table.build("stochastic")


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def made() -> Generator:
    return make()


@pytest.fixture(scope="module")
def saved(made: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save(tmp_path_factory.mktemp("generator") / "digits")


# ---- sampling


@pytest.mark.parametrize("stochastic", [False, True])
def test_any_batch_size_gives_the_same_pictures(made: Generator, stochastic: bool) -> None:
    sampler = noisy_sampler(made) if stochastic else None
    whole = made.sample(11, seed=3, sampler=sampler)
    assert whole.shape == (11, 1, 8, 8)
    assert whole.dtype == torch.float32
    assert -1 <= float(whole.min()) < float(whole.max()) <= 1
    for batch in (1, 2, 4, 10, 11):
        assert far(made.sample(11, seed=3, sampler=sampler, batch=batch), whole) < 1e-5
    assert far(made.sample(5, seed=3, sampler=sampler), whole[:5]) < 1e-5
    assert far(made.sample(11, seed=4, sampler=sampler), whole) > 0.1


def test_each_picture_can_have_its_own_seed(made: Generator) -> None:
    whole = made.sample(seed=[5, 6, 7, 8])
    assert len(whole) == 4
    assert far(made.sample(seed=[8, 6]), whole[[3, 1]]) < 1e-5
    assert far(made.sample(1, seed=7), whole[2:3]) < 1e-5
    assert far(whole[0], whole[1]) > 0.1


def test_labels_are_drawn_by_each_pictures_own_seed(made: Generator) -> None:
    noise = Noise.of(3, 500)
    assert made.conds is not None
    labels = made.conds.draw(noise)["label"]
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(10))
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.conds.draw(noise[order])["label"], labels[order])
    drawn = made.sample(6, seed=3)
    assert far(made.sample(6, {"label": labels[:6]}, seed=3), drawn) < 1e-5
    assert far(made.sample(6, {"label": (labels[:6] + 1) % 10}, seed=3), drawn) > 0.01


def test_labels_follow_their_frequencies() -> None:
    labels = Classes((1.0, 0.0, 3.0)).draw(Noise.of(0, 8000))["label"]
    counts = torch.bincount(labels, minlength=3).tolist()
    assert counts[1] == 0
    assert abs(counts[2] - 6000) < 5 * (8000 * 0.75 * 0.25) ** 0.5


def test_the_number_of_pictures_follows_from_conditions_or_seeds(made: Generator) -> None:
    assert len(made.sample()) == 1
    assert len(made.sample(cond={"label": torch.tensor([1, 2, 3])})) == 3
    assert len(made.sample(cond={"label": torch.tensor([1, -1])}, seed=[4, 5])) == 2


def test_a_mixture_is_a_generator_too() -> None:
    D = Mixture(torch.tensor([[0.2, -0.3]]), 0.01)
    out = Generator(D, euler(karras(6, 0.002, 80.0))).sample(5)
    assert out.shape == (5, 2)
    assert far(out.mean(0), torch.tensor([0.2, -0.3])) < 0.2


SAMPLING: dict[str, tuple[Callable[[Generator], Any], str]] = {
    "no pictures": (lambda g: g.sample(0), "must be at least 1, got 0"),
    "fewer than none": (lambda g: g.sample(-2), "must be at least 1, got -2"),
    "no seeds": (lambda g: g.sample(seed=[]), "must be at least 1, got 0"),
    "labels and n": (
        lambda g: g.sample(3, {"label": torch.tensor([1, 2])}),
        r"how many pictures\? n says 3, cond\['label'\] says 2",
    ),
    "seeds and n": (lambda g: g.sample(3, seed=[1, 2]), "n says 3, seed says 2"),
    "label too large": (
        lambda g: g.sample(cond={"label": torch.tensor([1, 10])}),
        "label 10 is out of range: classes are 0 to 9",
    ),
    "label too small": (lambda g: g.sample(cond={"label": torch.tensor([-2])}), "label -2 is out of range"),
    "batch": (lambda g: g.sample(2, batch=0), "batch must be at least 1, got 0"),
    "unconditional": (
        lambda g: replace(g, conds=None).sample(cond={"label": torch.tensor([1])}),
        r"unconditional: it cannot take \['label'\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), SAMPLING.values(), ids=SAMPLING.keys())
def test_bad_calls(made: Generator, call: Callable[[Generator], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(made)


def test_pictures_that_are_not_finite_are_counted() -> None:
    broken = make()
    assert isinstance(broken.denoiser, Precond)
    with torch.no_grad():
        next(broken.denoiser.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="3 of 3 pictures are not finite, the first is number 0"):
        broken.sample(3)


def test_no_bar_is_shown_when_told_so(made: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    made.sample(4, batch=1, progress=False)
    done = capsys.readouterr()
    assert done.out == done.err == ""


# ---- folders

CHILD = """
import hashlib, sys, torch, fewstep
torch.set_num_threads(int(sys.argv[2]))
g = fewstep.load(sys.argv[1])
print(hashlib.sha256(g.sample(5, seed=9).numpy().tobytes()).hexdigest(), g.fingerprint(), g.card["made"])
"""


def test_a_fresh_process_makes_the_same_pictures(made: Generator, saved: Path) -> None:
    arguments = [sys.executable, "-c", CHILD, str(saved), str(torch.get_num_threads())]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    here = hashlib.sha256(made.sample(5, seed=9).numpy().tobytes()).hexdigest()
    assert done.stdout.split(maxsplit=2) == [here, made.fingerprint(), "by a test\n"]


def test_a_loaded_generator_is_the_saved_one(made: Generator, saved: Path) -> None:
    again = load(saved)
    assert isinstance(again.denoiser, Precond)
    assert isinstance(made.denoiser, Precond)
    assert again.denoiser.describe() == made.denoiser.describe()
    assert (again.conds, again.card) == (made.conds, made.card)
    assert not again.denoiser.training
    assert not any(p.requires_grad for p in again.denoiser.parameters())
    old, new = made.denoiser.state_dict(), again.denoiser.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)
    assert torch.equal(again.sample(3, seed=1), made.sample(3, seed=1))
    assert sorted(p.name for p in saved.iterdir()) == ["fewstep.json", "sampler.json", "student.safetensors"]


def test_an_unconditional_generator_survives(tmp_path: Path) -> None:
    plain = make(classes=False)
    assert load(plain.save(tmp_path / "x")).conds is None


def test_the_fingerprint_is_that_of_weights_and_description() -> None:
    first, second = make(), make()
    assert first.fingerprint() == second.fingerprint()
    assert len(first.fingerprint()) == 16
    assert isinstance(second.denoiser, Precond)
    with torch.no_grad():
        weight = next(second.denoiser.parameters()).view(-1)
        weight[3] = torch.nextafter(weight[3], torch.tensor(10.0))
    assert first.fingerprint() != second.fingerprint()
    third = make()
    third.denoiser.sigma_max = 40.0
    assert first.fingerprint() != third.fingerprint()
    with pytest.raises(InputError, match="Mixture has no fingerprint"):
        replace(first, denoiser=Mixture(torch.zeros(1, 2), 1.0)).fingerprint()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads((folder / "fewstep.json").read_text())
    change(body)
    (folder / "fewstep.json").write_text(json.dumps(body))


def truncate(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda f: (f / "fewstep.json").unlink(), r"not a fewstep generator \(it has no fewstep.json\)"),
    "half a description": (lambda f: truncate(f / "fewstep.json", 0.5), "fewstep.json is not readable JSON"),
    "a list": (lambda f: (f / "fewstep.json").write_text("[]"), "must hold a JSON object, got list"),
    "bytes": (lambda f: (f / "fewstep.json").write_bytes(b"\xff\xfe\x00"), "not readable JSON"),
    "another format": (lambda f: rewrite(f, lambda b: b.update(format="pickle")), "has format 'pickle', expected"),
    "half the weights": (lambda f: truncate(f / "student.safetensors", 0.5), "not a whole safetensors file"),
    "a little of them": (lambda f: truncate(f / "student.safetensors", 0.001), "not a whole safetensors file"),
    "no weights": (lambda f: (f / "student.safetensors").unlink(), "student.safetensors does not exist"),
    "a pickle": (
        lambda f: torch.save({"x": torch.zeros(1)}, f / "student.safetensors"),
        "not a whole safetensors file",
    ),
    "a wider network": (
        lambda f: rewrite(f, lambda b: b["denoiser"]["net"].update(width=24)),
        r"holds another architecture: shapes differ: .* is \(.*\), expected",
    ),
    "a deeper network": (
        lambda f: rewrite(f, lambda b: b["denoiser"]["net"].update(blocks=2)),
        r"holds another architecture: missing net\.blocks\.1\.",
    ),
    "a shallower network": (
        lambda f: rewrite(f, lambda b: b["denoiser"]["net"].update(blocks=1, classes=0)),
        "holds another architecture",
    ),
    "an unknown network": (
        lambda f: rewrite(f, lambda b: b["denoiser"]["net"].update(kind="resnlp")),
        "unknown network 'resnlp': did you mean 'resmlp'",
    ),
    "an unknown field": (lambda f: rewrite(f, lambda b: b["denoiser"]["net"].update(depth=3)), "cannot be built from"),
    "an unknown path": (lambda f: rewrite(f, lambda b: b["denoiser"]["path"].update(kind="?")), "unknown path"),
    "a missing level": (lambda f: rewrite(f, lambda b: b["denoiser"].pop("path")), "incomplete or has unknown fields"),
    "a bad sampler": (lambda f: (f / "sampler.json").write_text("{"), "not a tableau"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_says_what_is_wrong(
    saved: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_nothing_named_in_a_file_is_executed(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for kind in ("os.system", "builtins.exec", f"__import__('pathlib').Path({str(marker)!r}).touch()"):
        folder = Path(shutil.copytree(saved, tmp_path / "copy", dirs_exist_ok=True))
        rewrite(folder, lambda b, kind=kind: b["denoiser"].update(net={"kind": kind, "command": f"touch {marker}"}))  # type: ignore[misc]
        with pytest.raises(InputError, match="unknown network"):
            load(folder)
    assert not marker.exists()


def test_places_that_are_no_generator(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a fewstep generator"):
        load(tmp_path)
    with pytest.raises(InputError, match="not a fewstep generator"):
        load(saved / "fewstep.json")


def test_devices_that_are_not_here(made: Generator, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="'cuda' was asked for and there is none here: use --device cpu"):
        load(saved, device="cuda")
    with pytest.raises(InputError, match="none here"):
        made.to("cuda:3")
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        load(saved, device="gpu")
    assert load(saved, device="cpu").device.type == "cpu"


def test_what_cannot_be_saved_is_refused_before_anything_is_written(made: Generator, tmp_path: Path) -> None:
    mixture = Mixture(torch.zeros(1, 2), 1.0)
    with pytest.raises(InputError, match="a Mixture cannot be saved as a folder: only a Precond can"):
        replace(made, denoiser=mixture).save(tmp_path / "x")
    with pytest.raises(InputError, match="only classes, or the codec and conditions of a pipeline"):
        replace(made, codec=object()).save(tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a object cannot be stored"):
        replace(made, sampler=object()).save(tmp_path / "x")  # type: ignore[arg-type]
    strange = replace(made, denoiser=Precond(torch.nn.Linear(2, 2), (2,)))
    with pytest.raises(InputError, match="Linear cannot be saved"):
        strange.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        made.save(tmp_path / "file" / "x")


def test_a_guided_generator_survives(made: Generator, tmp_path: Path) -> None:
    strong = guided(made, 2.5)
    back = load(strong.save(tmp_path / "guided"))
    assert isinstance(back.denoiser, CFG) and back.denoiser.scale == 2.5
    assert back.fingerprint() == strong.fingerprint() != made.fingerprint()
    assert far(back.sample(3, seed=1, progress=False), strong.sample(3, seed=1, progress=False)) == 0
    rewrite(tmp_path / "guided", lambda b: b["denoiser"].update(wrapper="CGF"))
    with pytest.raises(InputError, match="unknown wrapper of a denoiser 'CGF': did you mean 'CFG'"):
        load(tmp_path / "guided")


def test_guidance_needs_something_to_move_away_from(made: Generator) -> None:
    assert guided(made, 1.0) is made
    with pytest.raises(InputError, match="this one is unconditional"):
        guided(replace(made, conds=None), 2.0)
    with pytest.raises(InputError, match="reads no prompts: it cannot move away from 'blurry'"):
        guided(made, 2.0, "blurry")
    with pytest.raises(InputError, match="takes labels: it cannot read the prompt"):
        made.sample(cond="a cat")


def test_where_pure_noise_starts(made: Generator, tmp_path: Path) -> None:
    net = made.network.net
    path = DDPM(tuple(torch.linspace(1e-3, 0.05, 50).tolist()))
    plain = Precond(net, made.denoiser.shape, path=path, predicts="noise", sigma_max=float(path.levels[-1]))
    unit = Precond(net, plain.shape, path=path, predicts="noise", sigma_max=plain.sigma_max, unit_start=True)
    assert start_std(plain, plain.sigma_max) == plain.sigma_max
    assert start_std(unit, plain.sigma_max) == pytest.approx((1 + plain.sigma_max**2) ** 0.5)
    # A start further down is a noised picture, not pure noise.
    assert start_std(unit, 1.5) == 1.5
    assert start_std(CFG(unit, 2.0), plain.sigma_max) == start_std(unit, plain.sigma_max)
    whole = replace(made, denoiser=unit, sampler=euler(karras(3, 0.1, plain.sigma_max)))
    kept = load(whole.save(tmp_path))
    assert kept.start_std() == whole.start_std() == start_std(unit, plain.sigma_max)
    assert "unit_start" not in plain.describe()


def test_the_nearest_trained_level() -> None:
    path = DDPM(tuple(torch.linspace(1e-3, 0.05, 50).tolist()))
    levels = path.levels
    assert path.nearest(levels).tolist() == list(range(50))
    wanted = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * float(levels[-1]) * 1.2
    assert torch.equal(path.nearest(wanted), (wanted[:, None] - levels).abs().argmin(1).double())
    with pytest.raises(InputError, match="continuous"):
        EDM.nearest(1.0)
