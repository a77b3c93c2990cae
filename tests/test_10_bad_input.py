"""Bad input of every kind: one line on stderr, exit code 2, and nothing on disk is new or changed."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import sys
import warnings
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import Generator, InputError, calibrate, solve
from fewstep.cli import main
from fewstep.core.denoiser import Precond
from fewstep.core.path import FLOW
from fewstep.core.solver import build
from fewstep.data import load_data
from fewstep.train import untrained

TRAIN = "train --network resmlp --width 16 --batch 8 --log-every 1"


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoilt(source: Path, target: Path, file: str, data: bytes) -> None:
    shutil.copytree(source, target)
    (target / file).write_bytes(data)


def picture(path: Path, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), side, dtype=np.uint8)).save(path)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a generator, a run, and everything that can be wrong with them."""
    root = tmp_path_factory.mktemp("bad_input")
    here = Path.cwd()
    made = untrained(load_data("digits"), "resmlp", width=16, embedding=8, blocks=1)
    made.save(root / "gen")
    untrained(load_data("digits"), "resmlp", width=24, embedding=8, blocks=1).save(root / "wide")
    Generator(made.denoiser, made.sampler).save(root / "free")
    weights = (root / "gen/student.safetensors").read_bytes()
    spoilt(root / "gen", root / "swapped", "student.safetensors", (root / "wide/student.safetensors").read_bytes())
    spoilt(root / "gen", root / "cut", "student.safetensors", weights[: len(weights) // 2])
    noise = np.random.default_rng(0).bytes(len(weights))
    spoilt(root / "gen", root / "noise", "student.safetensors", noise)
    text = (root / "gen/fewstep.json").read_bytes()
    spoilt(root / "gen", root / "half", "fewstep.json", text[: len(text) // 2])
    spoilt(root / "gen", root / "binary", "fewstep.json", noise)
    spoilt(root / "gen", root / "list", "fewstep.json", b"[]")
    spoilt(root / "gen", root / "future", "fewstep.json", text.replace(b"fewstep-generator/1", b"fewstep-generator/9"))
    shutil.copytree(root / "gen", root / "no-weights")
    (root / "no-weights/student.safetensors").unlink()

    table = build("euler", torch.tensor([80.0, 1.0, 0.0]))
    good = table.to_json()
    for name, changes in {
        "levels": {"levels": [80.0, 1.0]},
        "ragged": {"P": [[1.0], [1.0, 0.0]]},
        "words": {"W": [["a"], ["b"]]},
        "future": {"P": [[1.0, 1.0], [1.0, 0.0]]},
        "negative": {"levels": [80.0, -1.0, 0.0]},
        "extra": {"colour": "red"},
        "format": {"format": "other/1"},
        "low": {"levels": [14.6, 1.0, 0.0], "sigmas": [14.6, 1.0]},
        "fitted": {"meta": {"calibration": {"fingerprint": "0" * 16}}},
    }.items():
        (root / f"t-{name}.json").write_text(good)
        edited(root / f"t-{name}.json", **changes)
    flow = Precond(made.network.net, made.denoiser.shape, path=FLOW, predicts="velocity", sigma_max=1e8)
    Generator(flow, build("euler", torch.tensor([1e8, 1.0, 0.0])), conds=made.conds).save(root / "flow")
    (root / "garbage.pt").write_bytes(b"abc")
    (root / "part").mkdir()
    (root / "part/model_index.json").write_text("{}")
    (root / "part/weights.safetensors").write_bytes(b"")
    (root / "t-text.json").write_text("not json")
    (root / "t-binary.json").write_bytes(noise)

    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts/a.txt").write_text("no picture")
    picture(root / "mixed/a.png", 8)
    picture(root / "mixed/b.png", 9)
    pixels = np.zeros((12, 8, 8), dtype=np.float32) - 0.5
    np.save(root / "grey.npy", pixels)
    pixels[3, 2, 1] = np.nan
    np.save(root / "nan.npy", pixels)

    for name, body in {
        "r-other": {"command": "train", "arguments": {}},
        "r-unknown": {"command": "sample", "arguments": {"generator": "gen", "nn": 3}},
        "r-type": {"command": "sample", "arguments": {"generator": "gen", "n": "three"}},
        "r-missing": {"command": "sample", "arguments": {"n": 3}},
    }.items():
        (root / f"{name}.json").write_text(json.dumps(body))
    try:
        os.chdir(root)
        main(f"{TRAIN} --budget 4 --out run".split())
    finally:
        os.chdir(here)
    return root


def snapshot(root: Path) -> dict[str, str]:
    """Every file with the hash of what it holds, and every folder."""
    found = sorted(root.rglob("*"))
    return {str(p.relative_to(root)): sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for p in found}


def refused(argv: list[str], root: Path, capsys: pytest.CaptureFixture[str], *, folders: bool = True) -> str:
    """The one line that a refused command says; ``folders=False`` forgives an empty folder."""
    before = snapshot(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.count("\n") == 1 and said.endswith("\n"), said
    assert said.startswith("fewstep: ") and "Traceback" not in said, said
    after = {k: v for k, v in snapshot(root).items() if folders or k in before or v != "folder"}
    assert after == before
    return said


SAMPLE, SCORE = "sample {} --n 2 --out new", "evaluate gen --out new"
BAD: list[tuple[str, str]] = [
    # names, each with the nearest
    ("trian", "unknown command 'trian': did you mean 'train'"),
    ("sample gen --sampler eular --out new", "unknown sampler 'eular': did you mean 'euler'"),
    ("sample gen --sampler euler --grid karas --out new", "unknown grid 'karas': did you mean 'karras'"),
    ("calibrate gen --grid chosn --out new", "unknown grid 'chosn': did you mean 'chosen'"),
    ("distill sidd --teacher gen --out new", "unknown method 'sidd': did you mean 'sid'"),
    ("methods sfdd", "unknown method 'sfdd': did you mean 'sfd'"),
    (f"{SCORE} --metrics fd,recal", "unknown metric 'recal': did you mean 'recall'"),
    (f"{SCORE} --data digit", "unknown data set 'digit': did you mean 'digits'"),
    ("train --data digist --out new", "unknown data set 'digist': did you mean 'digits'"),
    # flags
    ("sample gen --stepz 3", "(?i)unrecognized options.*--stepz.*--steps"),
    ("train --network resnet --out new", "resnet.*unet.*resmlp"),
    ("sample gen --n three", "--n.*'three'"),
    ("calibrate gen --ridge strong --out new", "--ridge.*'strong'"),
    ("sample --n 2", r"(?i)missing.*required.*fewstep sample --help"),
    ("distill sid --out new", "--teacher.*required"),
    ("distill --out new", "needs a method"),
    # numbers
    ("sample gen --sampler euler --steps 0 --out new", "at least 1 step, got 0"),
    ("sample gen --sampler heun --steps -3 --out new", "at least 1 step, got -3"),
    ("sample gen --steps 3 --out new", "--steps needs a named --sampler"),
    ("sample gen --n 0 --out new", "at least 1, got 0"),
    ("sample gen --n -2 --out new", "at least 1, got -2"),
    ("sample gen --batch 0 --out new", "at least 1, got 0"),
    (f"{SCORE} --n 0", "at least 1, got 0"),
    ("calibrate gen --nfe 0 --out new", "from 1 to .*got nfe=0"),
    ("calibrate gen --nfe 2 --trajectories 7 --out new", "at least 8 trajectories, got 7"),
    ("calibrate gen --nfe 2 --ridge -1 --out new", "ridge must be .* >= 0"),
    ("calibrate gen --nfe 2 --batch 0 --out new", "--batch and --memory must be at least 1"),
    ("sample gen --sampler euler --sigma-min 3 --sigma-max 3 --out new", "0 < sigma_min < sigma_max.*3.0 and 3.0"),
    ("sample gen --sampler euler --sigma-min 4 --sigma-max 3 --out new", "0 < sigma_min < sigma_max.*4.0 and 3.0"),
    ("distill sfd --teacher gen --steps 0 --out new", "steps >= 1"),
    (f"{TRAIN} --budget soon --out new", "budget 'soon'.*2000 steps"),
    (f"{TRAIN} --budget 0 --out new", "budget '0'.*expected"),
    (f"{TRAIN} --micro 3 --out new", "batch 8 must divide into 3 micro-batches"),
    (f"{TRAIN} --keep 0 --out new", "at least 1 checkpoint, got 0"),
    ("train --network resmlp --width 0 --out new", "--width must be at least 1"),
    ("demo --n 3 --out new", "n >= 100"),
    ("demo --batch 0 --out new", "batch.* >= 1"),
    # tableaux
    ("sample gen --sampler t-levels.json --out new", r"levels must be \(3,\), got \(2,\)"),
    ("sample gen --sampler t-ragged.json --out new", "rectangular lists of numbers"),
    ("sample gen --sampler t-words.json --out new", "rectangular lists of numbers"),
    ("sample gen --sampler t-future.json --out new", "row 0 needs the point of row -1"),
    ("sample gen --sampler t-negative.json --out new", "levels must be finite and >= 0"),
    ("sample gen --sampler t-extra.json --out new", r"unknown \['colour'\]"),
    ("sample gen --sampler t-format.json --out new", "fewstep-tableau/1.*'other/1'"),
    ("sample gen --sampler t-text.json --out new", "not JSON"),
    ("sample gen --sampler t-binary.json --out new", "not text"),
    ("sample gen --sampler t-none.json --out new", "does not exist"),
    ("sample gen --sampler t-fitted.json --out new", "another generator.*--force"),
    ("show t-text.json", "not JSON"),
    ("show t-binary.json", "not text"),
    ("sample flow --sampler t-low.json --force --label 11 --out new", "label 11 is out of range"),
    ("sample flow --sampler t-low.json --out new", "starts at noise level 14.6, 0.936 noise, .*pure noise.*--force"),
    # opening
    ("sample gen --open device=cpu --out new", "--open cannot take device=cpu: pass --device"),
    ("sample gen --open kind=edm --out new", "--open cannot take kind=edm: pass --kind"),
    ("sample gen --open source=x --out new", "--open cannot take source=x"),
    ("sample gen --open stps=3 --out new", "opened as 'fewstep', which cannot take stps: it takes base"),
    ("sample gen --kind difusers --out new", "unknown kind of source 'difusers': did you mean 'diffusers'"),
    ("sample gen --kind hub --out new", "gen is a file or folder here, no Hub id: leave out kind='hub'"),
    ("sample part/weights.safetensors --out new", "a part of a diffusers pipeline: pass the pipeline's folder, part"),
    ("sample garbage.pt --out new", "garbage.pt is .*a checkpoint|garbage.pt is not a whole checkpoint"),
    ("sample gen --guidance nan --out new", "guidance needs a scale >= 0 .* got nan"),
    ("sample gen --prompt= --out new", "takes labels: it cannot read the prompt"),
    ("distill sid --teacher gen --offload --dry-run --out new", "device 'cpu' has them: leave it out"),
    # labels
    ("sample gen --label 10 --out new", "label 10 is out of range: classes are 0 to 9"),
    ("sample gen --label -2 --out new", "label -2 is out of range"),
    ("sample free --label 3 --out new", "unconditional"),
    # generators
    (SAMPLE.format("swapped"), r"another architecture: .*net\.\S+ is \(.*\), expected \("),
    (SAMPLE.format("cut"), "cut/student.safetensors is not a whole safetensors file"),
    (SAMPLE.format("noise"), "noise/student.safetensors is not a whole safetensors file"),
    (SAMPLE.format("no-weights"), "student.safetensors does not exist"),
    (SAMPLE.format("half"), "half/fewstep.json is not readable JSON"),
    (SAMPLE.format("binary"), "binary/fewstep.json is not readable JSON"),
    (SAMPLE.format("list"), "list/fewstep.json must hold a JSON object, got list"),
    (SAMPLE.format("future"), "format 'fewstep-generator/9', expected 'fewstep-generator/1'"),
    (SAMPLE.format("empty"), "empty is not a fewstep generator"),
    (SAMPLE.format("nowhere"), "nowhere does not exist"),
    ("distill sid --teacher cut --out new", "not a whole safetensors file"),
    ("show empty", "empty is no tableau, generator or run"),
    # data
    ("train --data empty --out new", "empty: 0 images accepted, it holds no files"),
    ("train --data texts --out new", "texts: 0 images accepted, 1 rejected .*a.txt"),
    ("train --data mixed --out new", "mixed.*resize"),
    ("train --data nan.npy --out new", r"1 of 12 images hold NaN or infinity \(indices 3\)"),
    ("distill sid --teacher gen --data digits --out new", "data-free"),
    (f"{SCORE} --data stacked-digits", r"\(1, 8, 8\) and the data stacked-digits has \(3, 8, 8\)"),
    (f"{SCORE} --data grey.npy", "no packaged extractor knows data 'grey'"),
    # metrics
    (f"{SCORE} --n 5", "at least 6 samples, got 5"),
    (f"{SCORE} --n 5 --metrics recall", "'recall' needs at least 6 samples, got 5"),
    (f"{SCORE} --n 1 --metrics fd", "'fd' needs at least 2 samples, got 1"),
    (f"{SCORE} --metrics modes", "metric 'modes'.*leave the metric out"),
    ("evaluate free --metrics accuracy --out new", "'accuracy' needs a generator with classes"),
    # folders
    (f"{TRAIN} --budget 4 --out run", "run already holds files: .*--resume, or --overwrite"),
    ("sample gen --n 2 --out run", "run already holds files"),
    (f"{TRAIN} --budget 5 --out run --resume", "another recipe: .*budget.*4.*5"),
    (f"{TRAIN} --budget 4 --seed 3 --out run --resume", "another recipe: .*seed was 0 and is 3"),
    ("sample gen --n 2 --out mixed --overwrite", "not a run folder .*will not delete it"),
    ("sample gen --n 2 --out grey.npy", "grey.npy is a file: --out must be a folder"),
    (f"{TRAIN} --budget 4 --out grey.npy --overwrite", "grey.npy is a file: --out must be a folder"),
    # Modes do not stop root, so these places refuse everyone: nothing lies below a file, and /proc takes no folder.
    ("sample gen --n 2 --out grey.npy/new", "cannot write grey.npy/new/recipe.json"),
    ("sample gen --n 2 --out /proc/new", "cannot write /proc/new/recipe.json"),
    (f"{TRAIN} --budget 4 --out grey.npy/new", "cannot write grey.npy/new/recipe.json"),
    # recipes
    ("sample --recipe", "--recipe needs a file"),
    ("sample --recipe none.json", "none.json does not exist"),
    ("sample --recipe t-text.json", "not readable JSON"),
    ("sample --recipe r-other.json", "recipe of 'train', not of 'sample'"),
    ("sample --recipe r-unknown.json --out new", r"unknown fields \['nn'\]"),
    ("sample --recipe r-type.json --out new", r"arguments.n: expected int, got 'three'"),
    ("sample --recipe r-missing.json --out new", "'generator'"),
]


@pytest.mark.parametrize(("line", "pattern"), BAD, ids=[line for line, _ in BAD])
def test_one_line(
    line: str, pattern: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("FEWSTEP_CACHE", str(place / "cache"))
    said = refused(line.split(), place, capsys)
    assert re.search(pattern, said), said


def test_remarks_of_libraries_are_kept_back(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    logger = logging.getLogger("diffusers")
    level, handler = logger.level, logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)

    def chatty(*_: object, **__: object) -> Generator:
        logger.warning("a remark")
        warnings.warn_explicit("another", UserWarning, "x.py", 1, module="transformers.x")
        warnings.warn_explicit("of ours", UserWarning, "y.py", 1, module="fewstep.y")
        raise InputError("refused")

    monkeypatch.setattr("fewstep.cli.base.load", chatty)
    try:
        with pytest.warns(UserWarning, match="of ours") as seen:
            assert refused(["sample", "gen", "--out", "new"], place, capsys) == "fewstep: refused\n"
        assert [str(w.message) for w in seen] == ["of ours"]
        assert logger.level == logging.WARNING
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(
    "command",
    ["sample gen", "evaluate gen", TRAIN, "distill sid --teacher gen", "calibrate gen", "compare gen --nfe 1,2"],
)
def test_no_gpu(command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    # So that the test says the same on a machine that has one.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, pattern in (("cuda", "'cuda' was asked for and there is none"), ("gpuu", "unknown device 'gpuu'")):
        said = refused([*command.split(), "--device", device, "--out", "new"], place, capsys)
        assert re.search(pattern, said), said


@pytest.mark.parametrize("line", ["sample gen --n 2 --out full", f"{TRAIN} --budget 2 --out full"])
def test_full_disk(line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk cannot be filled here, so the flush of a file says what a full one says; the folder made before stays."""
    monkeypatch.chdir(place)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    said = refused(line.split(), place, capsys, folders=False)
    assert re.search("cannot write full/recipe.json: No space left.*free some space", said)
    (place / "full").rmdir()


def test_force_runs_a_foreign_tableau(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    main(["sample", "gen", "--n", "2", "--sampler", "t-fitted.json", "--force", "--out", str(tmp_path / "forced")])
    assert np.load(tmp_path / "forced/samples.npz")["arr_0"].shape == (2, 1, 8, 8)


@pytest.mark.parametrize("sigmas", [[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [1.0], [2.0, float("nan"), 0.0], [1.0, -1.0]])
def test_grids_must_decrease(sigmas: list[float], place: Path) -> None:
    made = Generator.load(place / "gen")
    grid = torch.tensor(sigmas)
    for call in (
        lambda: solve.euler(grid),
        lambda: build("dpmpp2m", grid),
        lambda: calibrate(made.denoiser, sigmas=grid, trajectories=8),
    ):
        with pytest.raises(InputError, match=r"a grid (must|is)") as error:
            call()
        assert "\n" not in str(error.value)
