"""``fewstep evaluate``: pictures that are there, stopped runs, several processes, classes, and files of statistics."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from fewstep.cli import main
from fewstep.core.generator import Generator
from fewstep.core.state import Run
from fewstep.data import load_data
from fewstep.grid import grid
from fewstep.measure import Moments, Statistics, digits_extractor, evaluate
from fewstep.report import shards
from fewstep.report.rows import converged
from fewstep.solve.dpmpp import dpmpp
from fewstep.train import untrained


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = untrained(load_data("digits"), "resmlp", width=16, embedding=8, blocks=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in made.network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    D = made.denoiser
    folder = tmp_path_factory.mktemp("evaluate") / "generator"
    return made.with_sampler(dpmpp(grid("karras", 2, D.sigma_min, D.sigma_max), 1)).save(folder)


pytestmark = pytest.mark.usefixtures("apart")


def cli(line: str) -> None:
    main(shlex.split(line))


def entry(folder: str) -> dict:
    (found,) = Run(Path(folder)).read_log()
    return {k: v for k, v in found.items() if not k.startswith("seconds")}


def check_equal(a: dict, b: dict) -> None:
    """The same numbers: exactly, but for roots of the rounding of covariances that fewer pictures leave singular."""
    assert a.keys() == b.keys()
    for key in a:
        if key.partition("@")[0] in ("fd", "pixel_fd"):
            assert a[key] == pytest.approx(b[key], rel=1e-7), key
        elif key != "intervals":
            assert a[key] == b[key], key
    for key, ends in a["intervals"].items():
        assert ends == pytest.approx(b["intervals"][key], rel=1e-7), key


def test_a_stopped_run_goes_on_to_the_same_numbers(generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"evaluate {generator} --n 90 --batch 30 --paired"
    cli(f"{line} --out whole")
    made = Generator.load(generator)
    pictures = made.sample(90, seed=1, batch=30)
    scores = evaluate(pictures, load_data("digits"), seed=1, intervals=True)
    assert {k: entry("whole")[k] for k in scores} == pytest.approx(dict(scores), rel=1e-7)
    assert entry("whole")["intervals"]["fd@90"] == pytest.approx(scores.interval("fd@90"), rel=1e-7)
    ends = converged(made, 90, seed=1, batch=30)
    expected = float((pictures - ends).flatten(1).double().square().mean(1).sqrt().mean())
    assert entry("whole")["rmse_to_converged"] == pytest.approx(expected, rel=1e-6)
    real, calls = shards.save_tensors, []

    def killed(path: Path, tensors: dict) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, tensors)

    monkeypatch.setattr(shards, "save_tensors", killed)
    with pytest.raises(SystemExit):
        cli(f"{line} --out part")
    cli(f"{line} --out part --resume")
    assert len(calls) == 3 + 1 + 3
    check_equal(entry("part"), entry("whole"))
    assert not list(Path("part").rglob("*.safetensors"))
    # A run that is done is only told again.
    cli(f"{line} --out part --resume")
    assert len(calls) == 7


def test_several_processes_give_the_same_numbers(generator: Path) -> None:
    cli(f"evaluate {generator} --n 40 --batch 10 --out one")
    cli(f"evaluate {generator} --n 40 --batch 10 --processes 2 --out two")
    check_equal(entry("one"), entry("two"))


def test_pictures_that_are_there(generator: Path) -> None:
    cli(f"sample {generator} --n 40 --seed 1 --png --out made")
    cli("evaluate made/samples.npz --out file")
    cli("evaluate made/png --metrics fd,recall --out folder")
    expected = evaluate(Generator.load(generator).sample(40, seed=1), load_data("digits"))
    assert entry("file")["recall@40"] == expected["recall@40"] and "accuracy@40" not in entry("file")
    # Pictures of files have 256 grey levels, and are snapped to 17 all the same.
    assert entry("folder")["fd@40"] == pytest.approx(expected["fd@40"], rel=0.05)


def test_each_class_and_statistics(generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"evaluate {generator} --n 200 --metrics fd,accuracy --by-class --out classes")
    found = entry("classes")["classes"]
    labels = [int(name.partition("@")[2]) for c in found.values() for name in c if name.startswith("fd@")]
    assert sorted(found) == [str(c) for c in range(10)] and sum(labels) == 200
    assert "each class for itself" in capsys.readouterr().out
    data, extractor = load_data("digits"), digits_extractor()
    Statistics.of(Moments.of(extractor(data.take(torch.arange(len(data))).x)), extractor, "digits").save("real.npz")
    cli(f"evaluate {generator} --n 200 --metrics fd --data real.npz --out stats")
    assert entry("stats")["fd@200"] == pytest.approx(entry("classes")["fd@200"], rel=1e-9)


BAD = {
    "{g} --n 12 --by-class": "raise --n",
    "{g} --metrics recall --n 3": "at least 6 samples",
    "{g} --metrics clip_score": "clip",
    "{g} --data stacked-digits": "makes pictures of (1, 8, 8)",
    "{g} --resume": "--resume needs --out",
    "{g} --processes 0": "must be at least 1",
    "pictures.npz --paired": "need a generator",
    "pictures.npz --by-class": "--by-class needs pictures with classes",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.savez("pictures.npz", arr_0=np.zeros((20, 8, 8), dtype=np.uint8))
    with pytest.raises(SystemExit) as stop:
        cli("evaluate " + line.format(g=generator))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[line] in said and said.count("\n") == 1
    assert not Path("runs").exists()
