"""Pairs of a noise and a teacher's picture: what they hold, on disk and online, and whom they are refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.cli import main
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.data import OnlinePairs, Pairs, load_data, make_pairs, require_pairs
from fewstep.data import pairs as pairs_module
from fewstep.data.pairs import FILE, sampler_of
from fewstep.data.shards import is_whole, mapped, shard_name
from fewstep.errors import InputError
from fewstep.guide import guided
from fewstep.solve.euler import ddim, euler
from fewstep.solve.heun import heun
from tiny_runs import tiny, tiny_data

LEVELS = torch.tensor([80.0, 5.0, 1.0, 0.0], dtype=torch.float64)
SHORT = heun(LEVELS)
OPTIONS: dict[str, Any] = {"n": 21, "shard": 8, "batch": 5, "sampler": SHORT, "progress": False}
EVERY = torch.arange(21)


def made(out: Path, teacher: Generator | None = None, **options: Any) -> Pairs:
    return make_pairs(teacher or tiny(), out, **OPTIONS | options)


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "p"
    made(out)
    return out


def test_a_pair_is_a_noise_and_what_the_teachers_sampler_makes_of_it(folder: Path) -> None:
    teacher, batch = tiny(), Pairs(folder).take(EVERY)
    assert batch.noise is not None and batch.x is not None
    with torch.no_grad():
        again = SHORT(teacher.denoiser, 80.0 * batch.noise, batch.cond)
    assert float((again - batch.x).abs().max()) < 1e-5
    assert abs(float(batch.noise.std()) - 1) < 0.15 and batch.x.dtype == torch.float32
    assert batch.cond["label"].dtype == torch.int64 and set(batch.cond["label"].tolist()) == {0, 1, 2}
    # Pictures that are sampled later start elsewhere.
    assert float((Noise.of(0, EVERY).normal((1, 4, 4), "start") - batch.noise).abs().min(0)[0].max()) > 1e-3


def test_what_is_taken_depends_on_the_ids_only(folder: Path) -> None:
    pairs = Pairs(folder)
    whole = pairs.take(EVERY)
    ids = torch.randint(21, (60,), generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: Pairs(folder).take(torch.tensor([i])), ids.tolist()))
    batch = pairs.take(ids)
    for name in ("x", "noise"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(p, name) for p in parts])), name
        assert torch.equal(getattr(batch, name), getattr(whole, name)[ids]), name
    assert torch.equal(batch.cond["label"], whole.cond["label"][ids])
    assert pairs.take(ids[:0]).x.shape == (0, 1, 4, 4)  # type: ignore[union-attr]


def test_changing_what_was_taken_does_not_change_the_files(folder: Path) -> None:
    pairs, before = Pairs(folder), contents(folder)
    batch = pairs.take(EVERY)
    assert batch.x is not None
    kept = batch.x.clone()
    batch.x.zero_()
    mapped(folder / shard_name(0))["x"].zero_()
    assert torch.equal(Pairs(folder).take(EVERY).x, kept)  # type: ignore[arg-type]
    assert contents(folder) == before


def test_online_pairs_are_those_on_disk(folder: Path) -> None:
    kept, online = Pairs(folder), OnlinePairs(tiny(), SHORT, size=100, batch=7)
    a, b = kept.take(EVERY), online.take(EVERY)
    assert torch.equal(a.noise, b.noise) and torch.equal(a.cond["label"], b.cond["label"])  # type: ignore[arg-type]
    assert float((a.x - b.x).abs().max()) < 1e-5  # type: ignore[operator]
    assert not b.x.requires_grad and len(online) == 100  # type: ignore[union-attr]
    for one in (kept, online):
        assert one.shape == (1, 4, 4) and one.classes == 3 and one.frequencies == pytest.approx([1 / 3] * 3)
        assert one.std > 0 and str(len(one)) in str(one.report) and len(one.fingerprint) == 16
    assert kept.std == pytest.approx(float(a.x.double().std(correction=0)), rel=1e-6)  # type: ignore[union-attr]
    others = [OnlinePairs(tiny(), SHORT, seed=1, size=100), OnlinePairs(tiny(), euler(LEVELS), size=100)]
    assert len({p.fingerprint for p in (online, *others)}) == 3


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(
    stop: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, left = tmp_path / "p", [stop]
    write = pairs_module.write_shard

    def dies(file: Path, held: dict[str, Tensor]) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(file, held)

    monkeypatch.setattr(pairs_module, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        made(out)
    with pytest.raises(InputError, match="unfinished, go on with --resume"):
        Pairs(out)
    monkeypatch.setattr(pairs_module, "write_shard", write)
    times = {p: p.stat().st_mtime_ns for p in (out / "shards").glob("*")} if stop else {}
    made(out, resume=True)
    assert contents(out) == contents(folder)
    assert len(times) == stop and all(p.stat().st_mtime_ns == t for p, t in times.items())


def test_shortened_shards_are_named_and_made_again(folder: Path, tmp_path: Path) -> None:
    made(tmp_path / "p")
    file = tmp_path / "p" / shard_name(1)
    file.write_bytes(file.read_bytes()[:-4])
    assert not is_whole(file)
    assert Pairs(tmp_path / "p").take(torch.arange(8)).x is not None
    with pytest.raises(InputError, match=r"000001.safetensors is not a whole shard.*use --resume"):
        Pairs(tmp_path / "p").take(EVERY)
    made(tmp_path / "p", resume=True)
    assert contents(tmp_path / "p") == contents(folder)
    file.unlink()
    with pytest.raises(InputError, match=r"000001.safetensors is missing"):
        Pairs(tmp_path / "p")


def test_pairs_know_their_teacher(folder: Path) -> None:
    pairs, teacher = Pairs(folder), tiny()
    assert pairs.require(teacher) is pairs
    assert require_pairs(pairs, teacher, "Reflow") is pairs
    said = r"pairs on disk made by another teacher: fingerprint \w+ with guidance 1 .*`fewstep pairs`"
    with pytest.raises(InputError, match=said):
        pairs.require(tiny("resmlp", width=24, embedding=8, blocks=1))
    with pytest.raises(InputError, match=r"this teacher is .* with guidance 2"):
        pairs.require(guided(teacher, 2.0))
    with pytest.raises(InputError, match=r"KD learns from pairs .* got 'tiny', .*`fewstep pairs"):
        require_pairs(tiny_data(), teacher, "KD")
    with pytest.raises(InputError, match="got nothing"):
        require_pairs(None, teacher, "KD")


def test_guided_pairs_are_the_guided_teachers(folder: Path, tmp_path: Path) -> None:
    strong = guided(tiny(), 3.0)
    pairs = made(tmp_path / "p", strong)
    assert pairs.facts["guidance"] == 3.0 and pairs.require(strong) is pairs
    a, b = pairs.take(EVERY), Pairs(folder).take(EVERY)
    assert torch.equal(a.noise, b.noise)  # type: ignore[arg-type]
    assert float((a.x - b.x).abs().max()) > 1e-3  # type: ignore[operator]


def test_conditions_may_be_drawn_instead_of_stored(folder: Path, tmp_path: Path) -> None:
    pairs = made(tmp_path / "p", store_conditions=False)
    assert set(mapped(tmp_path / "p" / shard_name(0))) == {"x"}
    assert torch.equal(pairs.take(EVERY).cond["label"], Pairs(folder).take(EVERY).cond["label"])

    class Texts:
        """Conditions that a folder of pairs does not hold."""

        def draw(self, noise: Noise) -> dict[str, Tensor]:
            return {"prompt_embeds": noise.normal((2, 3), "text")}

        def check(self, cond: Any) -> None:
            assert set(cond) == {"prompt_embeds"}

    teacher = replace(tiny(), conds=Texts())
    made(tmp_path / "t", teacher, store_conditions=False)
    with pytest.raises(InputError, match=r"not stored: call require\(teacher\)"):
        Pairs(tmp_path / "t").take(EVERY)
    drawn = Pairs(tmp_path / "t").require(teacher).take(EVERY).cond["prompt_embeds"]
    made(tmp_path / "s", teacher)
    assert torch.equal(Pairs(tmp_path / "s").take(EVERY).cond["prompt_embeds"], drawn)


def test_latents_are_stored_before_they_are_decoded(tmp_path: Path) -> None:
    class Codec:
        def decode(self, latents: Tensor) -> Tensor:
            raise AssertionError("pairs need no pictures")

        encode = decode

    teacher = replace(tiny(), codec=Codec())
    assert torch.equal(made(tmp_path / "p", teacher).take(EVERY).x, made(tmp_path / "q").take(EVERY).x)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "far"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_halves_the_files(dtype: Any, far: float, folder: Path, tmp_path: Path) -> None:
    pairs = made(tmp_path / "p", dtype=dtype)
    a, b = pairs.take(EVERY).x, Pairs(folder).take(EVERY).x
    assert a is not None and b is not None and a.dtype == torch.float32
    assert 0 < float(((a - b).abs() / (b.abs() + 1)).max()) < far
    assert (mapped(tmp_path / "p" / shard_name(0))["x"].element_size()) == 2


def test_a_folder_of_pairs_is_data(folder: Path) -> None:
    opened = load_data(str(folder))
    assert isinstance(opened, Pairs) and opened.fingerprint == Pairs(folder).fingerprint and len(opened) == 21
    assert sampler_of(folder).nfe == SHORT.nfe
    with pytest.raises(InputError, match=r"holds pairs.*drop resize"):
        load_data(str(folder), resize=4)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save(Path("gen"))
    line = "pairs gen --n 6 --shard 4 --sampler heun --steps 3 --guidance 2 --seed 5"
    main([*line.split(), "--out", "one"])
    assert "6 pairs, heun, 5 evaluations" in " ".join(capsys.readouterr().err.split())
    main(["pairs", "--recipe", "one/recipe.json", "--out", "two"])
    assert contents(Path("one")) == contents(Path("two"))
    found = load_data("one")
    assert isinstance(found, Pairs) and found.seed == 5
    found.require(guided(Generator.load("gen"), 2.0))
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "gen", "--n", "6", "--out", "one"])
    assert stop.value.code == 2 and "already holds files" in capsys.readouterr().err


def damaged(folder: Path, out: Path, **changes: Any) -> Path:
    body = json.loads((folder / FILE).read_text())
    out.mkdir()
    (out / FILE).write_text(json.dumps(body | changes))
    return out


BAD: list[tuple[Callable[[Path, Path], object], str]] = [
    (lambda f, t: made(t / "p", n=0), "n >= 1, got 0"),
    (lambda f, t: made(t / "p", shard=0), "shard >= 1, got 0"),
    (lambda f, t: made(t / "p", n=1.5), "n must be a whole number"),
    (lambda f, t: made(t / "p", dtype="float8"), "unknown dtype of pairs 'float8'"),
    (lambda f, t: made(t / "p", sampler=ddim(LEVELS, eta=1.0)), "adds noise on its way.*--sampler heun"),
    (lambda f, t: made(f), "already holds files"),
    (lambda f, t: made(f, seed=1, resume=True), "another recipe: pairs.seed was 0 and is 1"),
    (lambda f, t: Pairs(t), "holds no pairs.*make some with `fewstep pairs`"),
    (lambda f, t: Pairs(damaged(f, t / "p", format="other/2")), "has format 'other/2'"),
    (lambda f, t: Pairs(damaged(f, t / "p", facts={})), "is damaged: it lacks or garbles"),
    (lambda f, t: Pairs(f).take(torch.tensor([21])), "id 21 does not exist, expected 0 to 20"),
    (lambda f, t: OnlinePairs(tiny(), size=0), "size >= 1 and batch >= 1, got 0"),
    (lambda f, t: mapped(t / "none"), "does not exist: expected a shard"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[Path, Path], object], said: str, folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    with pytest.raises(InputError, match=said) as error:
        make(folder, tmp_path)
    assert "\n" not in str(error.value) and contents(folder) == before


def test_pictures_that_are_not_finite_are_no_pairs(tmp_path: Path) -> None:
    teacher = tiny()
    for p in teacher.denoiser.parameters():  # type: ignore[attr-defined]
        p.data.fill_(float("nan"))
    with pytest.raises(InputError, match="5 of 5 pairs are not finite, the first is number 0"):
        made(tmp_path / "p", teacher)
