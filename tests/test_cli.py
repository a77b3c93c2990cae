"""Every command end to end on a tiny generator; runs that repeat from their recipe; a killed run that goes on."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.cli import COMMANDS, main
from fewstep.core.state import Run
from fewstep.core.tableau import Tableau
from fewstep.data import load_data
from fewstep.distill import DMD2
from fewstep.train import untrained

TRAIN = "train --network resmlp --width 16 --batch 8 --log-every 2 --save-every 3 --grid-every 0"


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "gen"
    return untrained(load_data("digits"), "resmlp", width=16, embedding=8, blocks=1).save(folder)


pytestmark = pytest.mark.usefixtures("apart")


def cli(line: str) -> None:
    main(shlex.split(line))


def pictures(folder: str) -> np.ndarray:
    with np.load(Path(folder) / "samples.npz") as held:
        return held["arr_0"]


def same(file: str, a: str = "one", b: str = "two") -> bool:
    return (Path(a) / file).read_bytes() == (Path(b) / file).read_bytes()


def test_train_then_sample() -> None:
    cli(f"{TRAIN} --budget 4 --out run")
    assert [e["step"] for e in Run(Path("run")).read_log()] == [2, 4]
    for name in ("fewstep.json", "student.safetensors", "sampler.json", "recipe.json", "samples/00000004.png"):
        assert (Path("run") / name).is_file(), name
    cli("sample run --n 3 --out pics")
    assert pictures("pics").shape == (3, 1, 8, 8)


def test_the_default_folder_is_the_next_free_one(generator: Path) -> None:
    for _ in range(2):
        cli(f"sample {generator} --n 1")
    assert sorted(p.name for p in Path("runs").iterdir()) == ["sample-001", "sample-002"]


def test_sample(generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"sample {generator} --n 5 --label 3 --sampler dpmpp2m --steps 4 --png --out a")
    said = capsys.readouterr()
    assert "5 pictures, dpmpp-2m, 4 evaluations" in " ".join(said.err.split()) and not said.out
    made = pictures("a")
    assert made.shape == (5, 1, 8, 8) and np.isfinite(made).all() and abs(made).max() <= 1
    assert len(list(Path("a/png").glob("*.png"))) == 5
    with Image.open("a/png/000000.png") as one:
        assert one.mode == "L" and np.abs(np.asarray(one) - (made[0, 0] + 1) * 127.5).max() <= 0.51
    entry = Run(Path("a")).read_log()[0]
    assert (entry["nfe"], entry["images"]) == (4, 5)
    cli(f"sample {generator} --n 2 --label 3 --sampler dpmpp2m --steps 4 --batch 1 --out b")
    assert np.abs(pictures("b") - made[:2]).max() < 1e-5
    cli(f"sample {generator} --n 2 --label 4 --sampler dpmpp2m --steps 4 --out b --overwrite")
    cli(f"sample {generator} --n 2 --out c --seed 7")
    assert not np.array_equal(pictures("c"), made[:2])


def test_calibrate_then_use(generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"calibrate {generator} --nfe 3 --trajectories 8 --searches 2 --out fit")
    table = Tableau.from_json(Path("fit/tableau.json").read_text())
    assert table.nfe == 3 and Path("fit/tableau.png").is_file()
    cli(f"sample {generator} --n 2 --sampler fit/tableau.json --out pics")
    assert Run(Path("pics")).read_log()[0]["nfe"] == 3
    capsys.readouterr()
    cli("show fit --out pictures/table.png")
    assert "calibrated-3: 3 evaluations" in capsys.readouterr().out
    with Image.open("pictures/table.png") as drawn:
        assert min(drawn.size) > 100


@pytest.mark.parametrize(("method", "nfe"), [("sid", 1), ("sfd --steps 2 --between 1", 2)])
def test_distill(method: str, nfe: int, generator: Path) -> None:
    cli(f"distill {method} --teacher {generator} --budget 3 --batch 8 --log-every 1 --grid-every 0 --out student")
    log = Run(Path("student")).read_log()
    assert [e["step"] for e in log] == [1, 2, 3] and all(np.isfinite(e["student/loss"]) for e in log)
    cli("sample student --n 2 --out pics")
    assert Run(Path("pics")).read_log()[0]["nfe"] == nfe


def test_evaluate(generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"evaluate {generator} --paired --n 64 --out score")
    entry, said = Run(Path("score")).read_log()[0], capsys.readouterr().out
    for name in ("fd@64", "precision@64", "recall@64", "accuracy@64", "rmse_to_converged"):
        assert np.isfinite(entry[name]) and name in said, name
    assert entry["nfe"] == 35 and Path("score/samples.png").is_file()
    cli(f"evaluate {generator} --n 6 --metrics fd,recall --sampler euler --steps 2 --out few")
    assert {"fd@6", "recall@6", "nfe"} <= Run(Path("few")).read_log()[0].keys()


def test_show(generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"show {generator}")
    said = capsys.readouterr().out
    assert "parameters, fingerprint" in said and "heun: 35 evaluations" in said
    cli(f"show {generator}/sampler.json --out t.svg")
    assert "heun: 35 evaluations" in capsys.readouterr().out and "<svg" in Path("t.svg").read_text()
    cli(f"sample {generator} --n 1 --out run")
    capsys.readouterr()
    cli("show run")
    said = capsys.readouterr().out
    assert '"command": "sample"' in said and '"images": 1' in said


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    cli("methods")
    listed = capsys.readouterr().out
    assert "sid" in listed and "sfd" in listed
    cli("methods sid")
    card = capsys.readouterr().out
    assert re.search(r"sigma_init +2\.5 +the student's only", card) and "2404.04057" in card
    cli("methods --markdown methods.md")
    text = Path("methods.md").read_text()
    assert "## sid" in text and "## sfd" in text and "2404.04057" in text


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        main(argv)
        said = capsys.readouterr()
        assert all(f"fewstep {command}" in said.out for command in COMMANDS) and not said.err
    main(["--version"])
    assert re.fullmatch(r"fewstep \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", [*COMMANDS, "distill sid", "distill sfd"])
def test_help_prints_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    said = capsys.readouterr()
    assert not stop.value.code and not said.err
    assert "default:" in said.out and f"fewstep {command.split()[0]}" in said.out


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "fewstep", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fewstep ")
    done = subprocess.run([sys.executable, "-m", "fewstep", "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'train'" in done.stderr


@pytest.mark.parametrize(
    ("line", "file"),
    [
        (f"{TRAIN} --budget 4 --seed 3 --optim.lr 0.002", "student.safetensors"),
        ("distill sid --teacher {gen} --budget 3 --batch 8 --grid-every 0 --alpha 1.1", "student.safetensors"),
        ("distill sfd --teacher {gen} --budget 2 --batch 8 --grid-every 0 --steps 1", "student.safetensors"),
        ("sample {gen} --n 3 --seed 5 --label 2 --sampler heun --steps 3", "samples.npz"),
        ("calibrate {gen} --nfe 2 --trajectories 8 --searches 2", "tableau.json"),
        ("calibrate {gen} --nfe 2 --trajectories 8 --grid karras --ridge 0.01", "tableau.json"),
    ],
    ids=["train", "sid", "sfd", "sample", "calibrate", "calibrate-grid"],
)
def test_recipe_repeats_a_run(line: str, file: str, generator: Path) -> None:
    cli(f"{line.format(gen=generator)} --out one")
    cli(f"{line.split()[0]} --recipe one/recipe.json --out two")
    assert same(file)
    assert same("recipe.json")


def test_flags_change_a_recipe(generator: Path) -> None:
    cli(f"sample {generator} --n 3 --seed 5 --out one")
    cli("sample --recipe one/recipe.json --n 2 --out two")
    assert np.abs(pictures("two") - pictures("one")[:2]).max() < 1e-5


def test_a_killed_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cli(f"{TRAIN} --budget 8 --out one")
    save = Run.save

    def dies(run: Run, step: int, *rest: object) -> None:
        if step > 3:
            raise KeyboardInterrupt
        save(run, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", dies)
        with pytest.raises(SystemExit) as stop:
            cli(f"{TRAIN} --budget 8 --out two")
    assert stop.value.code == 130 and [p.name for p in Run(Path("two")).checkpoints()] == ["00000003"]
    assert not Path("two/fewstep.json").exists()
    cli(f"{TRAIN} --budget 8 --out two --resume")
    assert same("student.safetensors")
    assert [e["step"] for e in Run(Path("two")).read_log()] == [e["step"] for e in Run(Path("one")).read_log()]


def test_demo() -> None:
    cli("demo --steps 6 --student-steps 2 --n 100 --nfes 3 --width 16 --batch 16 --out demo")
    log, page = Run(Path("demo")).read_log(), Path("demo/index.html").read_text()
    # teacher, three solvers, one calibrated sampler, student
    assert (log[0]["row"], log[0]["nfe"]) == ("teacher", 35) and log[-1]["nfe"] == 1
    assert len(log) == 6 and all(np.isfinite(e["fd@100"]) for e in log)
    table = Tableau.from_json(Path("demo/calibrated-3/tableau.json").read_text())
    assert table.nfe == 3 and Path("demo/demo.png").is_file()
    found = [html.unescape(c) for c in re.findall(r"<code>(fewstep evaluate [^<]*)</code>", page)]
    assert len(found) == 6
    for i, command in enumerate(found):
        program, *argv = shlex.split(command)
        assert program == "fewstep"
        main([*argv, "--out", f"again-{i}"])
        entry = Run(Path(f"again-{i}")).read_log()[0]
        rows = [e for e in log if e["nfe"] == entry["nfe"] and entry["fd@100"] == pytest.approx(e["fd@100"], rel=1e-6)]
        assert rows, (command, entry)
        paired = entry.get("rmse_to_converged")
        assert paired == rows[0]["rmse"] or paired == pytest.approx(rows[0]["rmse"], rel=1e-5, abs=1e-6)


QUICKLY = "--batch 8 --log-every 1 --grid-every 0"


def test_distill_for_several_numbers_of_steps(generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"distill cd --teacher {generator} --data digits --budget 2 {QUICKLY} --steps 1,2,4 --out any")
    said = " ".join(capsys.readouterr().err.split())
    assert "for 1, 2, 4 steps; try `fewstep sample any --sampler any/samplers/1.json`" in said
    for count in (1, 2, 4):
        cli(f"sample any --sampler any/samplers/{count}.json --n 2 --out pics-{count}")
        assert Run(Path(f"pics-{count}")).read_log()[0]["nfe"] == count
    cli(f"distill sfd --teacher {generator} --budget 2 {QUICKLY} --between 1 --steps=1,2 --out each")
    assert "try `fewstep sample each/2`" in " ".join(capsys.readouterr().err.split())
    for count in (1, 2):
        cli(f"sample each/{count} --n 2 --out own-{count}")
        assert Run(Path(f"own-{count}")).read_log()[0]["nfe"] == count
    cli("distill --recipe any/recipe.json --out again")
    assert same("samplers/2.json", "any", "again") and same("student.safetensors", "any", "again")
    cli("distill --recipe each/recipe.json --out single --steps 1")
    assert Path("single/fewstep.json").is_file() and not Path("single/2").exists()


def test_learning_rates_follow_the_size_unless_they_are_given(
    generator: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rates(line: str, out: str) -> tuple[float, float]:
        cli(f"distill {line} --out {out}")
        recipe = Run(Path(out)).folder / "recipe.json"
        made = json.loads(recipe.read_text())["settings"]
        return made["student"]["lr"], made["fake"]["lr"]

    start = f"sid --teacher {generator} --budget 1 {QUICKLY}"
    scaled = rates(start, "one")
    told = capsys.readouterr().out
    assert "--student.lr" in told and told.count("settings for") == 1
    assert scaled[0] == scaled[1] > 1e-5
    assert rates(f"{start} --published", "two") == (1e-5, 1e-5)
    assert rates(f"{start} --student.lr 2e-4", "three") == (2e-4, scaled[1])
    capsys.readouterr()
    assert rates(f"{start} --student.lr 2e-4 --fake.lr=3e-4", "four") == (2e-4, 3e-4)
    assert "settings for" not in capsys.readouterr().out
    # A recipe repeats what was given, although it equals a default.
    assert rates("--recipe three/recipe.json", "five") == (2e-4, scaled[1])


def test_small_networks_get_their_settings_unless_they_are_given(generator: Path) -> None:
    def ratio(line: str, out: str) -> int:
        cli(f"distill dmd2 --gan 0 --teacher {generator} --budget 1 {QUICKLY} {line} --out {out}")
        return int(json.loads((Path(out) / "recipe.json").read_text())["settings"]["ratio"])

    default = DMD2().ratio
    assert ratio("", "one") == 1 != default
    # What is given holds, also where it is the default.
    assert ratio(f"--ratio {default}", "two") == ratio("--published", "three") == default


def test_bad_numbers_of_steps(generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, message in (
        ("cd --steps 1,x --data digits", "expected whole numbers"),
        ("cd --steps 1,1 --data digits", "distinct whole numbers"),
        ("progressive --steps 2,8 --start-steps 8 --data digits", "passes 2, 4, and not 8"),
        ("sid --steps 1,2", "steps"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli(f"distill {line} --teacher {generator} --out bad")
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1, said
        assert message in said
        assert not Path("bad").exists()


def test_a_card_tells_roles_memory_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    cli("methods sfd")
    card = " ".join(capsys.readouterr().out.split())
    assert "arXiv 2409.19681" in card and "one training for each number of evaluations" in card
    # Teacher, student, two moments of Adam, an average and gradients.
    assert "6.0 times the teacher's weights" in card
    assert re.search(r"student the teacher's weights Adam 0\.\d+, drop power 0\.05 yes", card)
    assert "5e-05 published" in card
