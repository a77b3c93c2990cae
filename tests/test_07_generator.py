"""Generators: pictures that depend on their seed alone, folders that open anywhere, and damaged ones that say so."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import CFG, DDPM, EDM, Classes, Generator, InputError, Mixture, Noise, Precond, guided, load
from fewstep.core.denoiser import CountingDenoiser, start_std
from fewstep.core.tableau import Builder
from fewstep.data import load_data
from fewstep.grid import karras
from fewstep.solve import dpmpp2m, euler
from fewstep.sources import options_of
from fewstep.sources.checkpoint import check_dtype
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
    "half a picture": (lambda g: g.sample(1.5), "n must be a whole number, got 1.5"),
    "n as text": (lambda g: g.sample("2"), "n must be a whole number, got '2'"),
    "n as a truth value": (lambda g: g.sample(True), "n must be a whole number, got True"),
    "half a batch": (lambda g: g.sample(2, batch=0.5), "batch must be a whole number, got 0.5"),
    "seed as text": (lambda g: g.sample(seed="x"), "a seed must be a whole number, or a list of them, got 'x'"),
    "no seed": (lambda g: g.sample(seed=None), "a seed must be a whole number, got None"),
    "half a seed": (lambda g: g.sample(seed=[1, 2.5]), "a seed must be a whole number, got 2.5"),
    "seeds that are no numbers": (lambda g: g.sample(seed=torch.rand(2)), "a seed must be a whole number, got 0."),
    "a table of seeds": (lambda g: g.sample(seed=torch.ones(2, 99)), r"a whole number, got tensor\(.{70,80}\.\.\.$"),
    "a number for a condition": (lambda g: g.sample(cond=3), "cond must be a mapping such as .*, got 3"),
    "a tensor for a condition": (lambda g: g.sample(cond=torch.tensor([1])), "cond must be a mapping"),
    "half a label": (lambda g: g.sample(cond={"label": [1.5]}), r"whole number .* got float32 of shape \(1,\)"),
    "a table of labels": (lambda g: g.sample(cond={"label": torch.ones(2, 1).long()}), r"got int64 of shape \(2, 1\)"),
    "a truth value for a label": (lambda g: g.sample(cond={"label": [True]}), "got bool of shape"),
    "one label": (lambda g: g.sample(cond={"label": 3}), r"cond\['label'\] must have a row per sample, got .* 3"),
    "words for labels": (lambda g: g.sample(cond={"label": ["cat"]}), r"must be a tensor with a row .* \['cat'\]"),
    "another name": (lambda g: g.sample(cond={"labl": [1]}), "unknown condition .* 'labl': did you mean 'label'"),
    "no name": (lambda g: g.sample(cond={1: [1]}), "a condition needs a name such as 'label', got 1"),
    "the empty prompt": (lambda g: g.sample(cond=""), "takes labels: it cannot read the prompt"),
    "guidance as text": (lambda g: guided(g, "7.5"), "guidance needs a scale >= 0 .* got '7.5'"),
    "guidance that is no number": (lambda g: guided(g, float("nan")), "guidance needs a scale >= 0 .* got nan"),
    "guidance below 0": (lambda g: guided(g, -1), "guidance needs a scale >= 0 .* got -1"),
    "a number to move away from": (lambda g: guided(g, 2.0, negative=3), "a negative prompt is a text, got 3"),
    "load nothing": (lambda g: load(None), "expected the path of a file or folder, got None"),
    "load a number": (lambda g: load(3), "expected the path of a file or folder, got 3"),
    "load no text": (lambda g: load(""), "expected the path of a file or folder, got ''"),
    "save nowhere": (lambda g: g.save(None), "expected the path of a file or folder, got None"),
    "a kind that is none": (lambda g: load("x", kind="difusers"), "unknown kind of source 'difusers': did you mean"),
    "nobody's home": (lambda g: load("~no-such-user/x"), "could not determine home directory: write the whole path"),
    "unconditional": (
        lambda g: replace(g, conds=None).sample(cond={"label": torch.tensor([1])}),
        r"unconditional: it cannot take \['label'\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), SAMPLING.values(), ids=SAMPLING.keys())
def test_bad_calls(made: Generator, call: Callable[[Generator], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(made)


def test_numbers_of_other_libraries_count(made: Generator) -> None:
    plain = made.sample(2, {"label": torch.tensor([1, 2])}, seed=[7, 8])
    for label in ([1, 2], np.array([1, 2], np.int32), torch.tensor([1, 2], dtype=torch.uint8)):
        assert torch.equal(made.sample(np.int64(2), {"label": label}, seed=(7, np.int64(8))), plain)
    for seed in (np.array([7, 8]), torch.tensor([7, 8])):
        assert torch.equal(made.sample(2, {"label": [1, 2]}, seed=seed, batch=np.int64(2)), plain)
    assert torch.equal(made.sample(2, seed=np.int64(3)), made.sample(2, seed=3))
    assert guided(made, np.float32(2.5)).denoiser.scale == 2.5


class Words:
    """Conditions that read prompts: the number of letters is the label."""

    def draw(self, noise: Noise) -> dict[str, torch.Tensor]:
        return {"label": torch.full((len(noise),), 9)}

    def check(self, cond: Any) -> None:
        pass

    def encode(self, prompts: Any) -> dict[str, torch.Tensor]:
        return {"label": torch.tensor([len(p) for p in prompts])}

    def nulls(self, negative: str = "") -> Any:
        return {}


def test_the_empty_prompt_is_a_prompt(made: Generator) -> None:
    reads, noise = replace(made, conds=Words()), Noise.of(0, 3)
    assert reads.conditions("", noise)["label"].tolist() == [0, 0, 0]
    assert reads.conditions(["", "a", ""], noise)["label"].tolist() == [0, 1, 0]
    assert reads.conditions(None, noise)["label"].tolist() == [9, 9, 9]


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


def test_the_home_folder(made: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert made.save("~/kept") == tmp_path / "home/kept"
    assert not (tmp_path / "~").exists()
    assert load("~/kept").fingerprint() == Generator.load("~/kept").fingerprint() == made.fingerprint()


def test_sources_that_are_something_else(made: Generator, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "pipe/unet").mkdir(parents=True)
    (tmp_path / "pipe/model_index.json").write_text("{}")
    shutil.copy(saved / "student.safetensors", tmp_path / "pipe/unet/weights.safetensors")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/config.json").write_text('{"_class_name": "UNet2DModel"}')
    shutil.copy(saved / "student.safetensors", tmp_path / "alone/weights.safetensors")
    whole = re.escape(f"a part of a diffusers pipeline: pass the pipeline's folder, {tmp_path / 'pipe'}")
    for call, message in (
        (lambda: load(tmp_path / "pipe/unet/weights.safetensors"), whole),
        (lambda: load(tmp_path / "pipe/unet"), whole),
        (lambda: load(tmp_path / "alone/weights.safetensors"), "without its pipeline: pass the folder of a whole"),
        (lambda: load(saved, kind="hub"), "is a file or folder here, no Hub id: leave out kind='hub'"),
        (lambda: load(saved, stps=3), "opened as 'fewstep', which cannot take stps: it takes base"),
        (
            lambda: load(saved, kind="edm", steps=3),
            "opened as 'edm', which cannot take steps: it takes dtype, key, vae",
        ),
        (
            lambda: load("a/b", stps=3),
            r"opened as 'hub', which cannot take stps: it takes .*prompts, revision.*variant",
        ),
        (lambda: made.save(tmp_path / "pipe"), "holds a diffusers pipeline .* save it in a folder of its own"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert sorted(p.name for p in (tmp_path / "pipe").iterdir()) == ["model_index.json", "unet"]
    for kind, some in (("guided", "preset"), ("consistency", "preset"), ("k-diffusion", "config"), ("hub", "token")):
        assert some in options_of(kind)


def test_types_of_weights_have_names() -> None:
    for name, kind in (("bfloat16", torch.bfloat16), ("torch.float16", torch.float16), ("bf16", torch.bfloat16)):
        assert check_dtype(name) is check_dtype(kind) is kind
    assert check_dtype(None) is check_dtype("fp32") is torch.float32
    for wrong, message in (
        ("bfloat", "unknown dtype 'bfloat': did you mean 'bfloat16'"),
        (3, "floating type .* got 3"),
    ):
        with pytest.raises(InputError, match=message):
            check_dtype(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"abc", b"", b"\x80\x02", b"PK\x03\x04 no archive", b"(lp0\n", bytes(range(256))])
def test_bytes_that_are_no_checkpoint(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    (tmp_path / "x.pkl").write_bytes(data)
    for name in ("x.pt", "x.pkl"):
        with pytest.raises(InputError, match=re.escape(name)) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


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
    with pytest.raises(InputError, match=r"a CountingDenoiser cannot be saved: only .*CFG.* around a Precond can"):
        replace(made, denoiser=CountingDenoiser(made.denoiser)).save(tmp_path / "x")
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
