"""Splitting into micro-batches, bitwise resume, real kills, and what a run folder refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core import state
from fewstep.core.generator import Generator
from fewstep.core.role import Optim
from fewstep.core.state import Run
from fewstep.distill import SFD
from fewstep.errors import InputError
from tiny_runs import METHODS, Stop, bits, child, differing, furthest, log_of, run, tiny

NETWORKS: dict[str, dict[str, Any]] = {
    "resmlp": {},
    "resmlp with dropout": {"width": 16, "embedding": 8, "blocks": 1, "dropout": 0.3},
    "unet": {"network": "unet", "channels": 8, "multipliers": (1, 2), "blocks": 1, "dropout": 0.1},
}
CASES = [(name, "resmlp", 5) for name in METHODS]
CASES += [("SFD", "resmlp", 1), ("SiD", "resmlp with dropout", 5), ("EDMTraining", "unet", 5)]


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A whole run of six steps of every method, made once, which tests copy before they write to it."""
    made: dict[str, Path] = {}

    def get(name: str, network: str = "resmlp") -> Path:
        key = f"{name} {network}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("finished") / "run"
            run(name, made[key], start=tiny(**NETWORKS[network]))
        return made[key]

    return get


# ---- micro-batches


@pytest.mark.parametrize("name", METHODS)
def test_two_micro_batches_are_one_batch(name: str, finished: Callable[[str], Path], tmp_path: Path) -> None:
    run(name, tmp_path / "one", micro=1)
    two = finished(name)
    tensors = [bits(tmp_path / "one"), bits(two)]
    # A moment is a gradient in which much may cancel; the weights are what must agree.
    for part, most in (("roles/", 1e-6), ("optim/", 1e-5)):
        far, where = furthest(*({k: v for k, v in t.items() if part in k.split(":")[0]} for t in tensors))
        assert far < most, where
    for one, other in zip(log_of(tmp_path / "one"), log_of(two), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    start = tiny().denoiser.state_dict()
    end = Generator.load(two).denoiser.state_dict()
    assert min(float((start[k] - end[k]).abs().max()) for k in start) > 1e-5, "every weight must have moved"


# ---- resume


@pytest.mark.parametrize(("name", "network", "stop"), CASES)
def test_a_resumed_run_is_the_same_in_every_bit(
    name: str, network: str, stop: int, finished: Callable[..., Path], tmp_path: Path
) -> None:
    start = NETWORKS[network]
    with pytest.raises(Stop):
        run(name, tmp_path, start=tiny(**start), stop=stop)
    assert [p.name for p in Run(tmp_path).checkpoints()] == (["00000003"] if stop == 5 else [])
    torch.manual_seed(stop)  # dropout must not depend on what the process did before
    run(name, tmp_path, start=tiny(**start), resume=True)
    straight = finished(name, network)
    assert differing(bits(straight), bits(tmp_path)) == []
    assert log_of(straight) == log_of(tmp_path)
    assert [e["step"] for e in log_of(tmp_path)] == [2, 4, 6]
    cards = [json.loads((p / "fewstep.json").read_text()) for p in (straight, tmp_path)]
    for card in cards:
        assert card["card"]["trained"].pop("seconds") > 0
    assert cards[0] == cards[1]


def test_a_resume_that_forgets_something_would_be_noticed(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """The comparison above can fail: without Adam's moments, or with another seed, the bits differ."""
    run("SFD", tmp_path / "seed", seed=1)
    assert len(differing(bits(finished("SFD")), bits(tmp_path / "seed"))) > 10
    with pytest.raises(Stop):
        run("SFD", tmp_path / "run", stop=5)
    file = tmp_path / "run/checkpoints/00000003/optim/student.safetensors"
    moments = state.load_tensors(file)
    state.save_tensors(file, {k: v if k.endswith("step") else torch.zeros_like(v) for k, v in moments.items()})
    run("SFD", tmp_path / "run", resume=True)
    assert len(differing(bits(finished("SFD")), bits(tmp_path / "run"))) > 10


def test_resuming_a_finished_run_changes_nothing(finished: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished("SFD"), folder)
    before = fingerprint(folder)
    run("SFD", folder, resume=True)
    assert fingerprint(folder) == before


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"budget": 12, "save_every": 1, "log_every": 1}
    straight, out = tmp_path / "straight", tmp_path / "run"
    whole = child(run, ("SiD", straight), **options)
    kills, steps = 0, [0]
    for wait, delay in ((False, 0.0), (False, 0.05), (True, 0.0), (True, 0.02), (True, 0.06), (True, 0.1)):
        process = child(run, ("SiD", out), resume=True, **options)
        until = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < until:
            # As soon as there is a run, or, once that was tried, as soon as it has saved something new.
            found = Run(out).checkpoints()
            if int(found[-1].name) > steps[-1] if wait and found else (out / "recipe.json").exists() and not wait:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.join()
        kills += process.exitcode == -9
        latest = Run(out).latest()
        if latest is not None:
            facts, groups = latest
            steps.append(facts["step"])
            assert len(groups) == 5 and all(t.isfinite().all() for g in groups.values() for t in g.values())
            assert Run(out).read_log()[-1]["step"] >= facts["step"], "what is saved has been logged"
    assert kills >= 4 and steps == sorted(steps) and len(set(steps)) >= 4, (kills, steps)
    last = child(run, ("SiD", out), resume=True, **options)
    for process in (whole, last):
        process.join(120)
        assert process.exitcode == 0
    assert differing(bits(straight), bits(out)) == []
    assert log_of(straight) == log_of(out)
    assert not list(out.rglob("*.tmp")), "nothing half-written is left"


# ---- checkpoints


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    run("SFD", tmp_path, budget=5, save_every=1, keep=keep)
    assert [p.name for p in Run(tmp_path).checkpoints()] == [f"{i:08d}" for i in range(1, 6)][-keep:]
    facts, groups = Run(tmp_path).latest()
    assert facts["step"] == 5 and set(groups) == {"roles/student", "roles/student.ema", "optim/student"}
    assert any(k.endswith("net.leave.weight/exp_avg") for k in groups["optim/student"]), "keyed by parameter name"


def test_half_written_checkpoints_are_ignored_and_cleaned(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run("SFD", tmp_path, stop=4)
    half = tmp_path / "checkpoints/.00000099.1.tmp"
    (half / "roles").mkdir(parents=True)
    (half / "roles/student.safetensors").write_bytes(b"half")
    (tmp_path / ".fewstep.json.1.tmp").write_bytes(b"{")
    assert Run(tmp_path).latest()[0]["step"] == 3
    run("SFD", tmp_path, resume=True)
    assert not half.exists() and Run(tmp_path).latest()[0]["step"] == 6


def test_a_log_line_that_was_cut_short_is_dropped(tmp_path: Path, finished: Callable[[str], Path]) -> None:
    with pytest.raises(Stop):
        run("SFD", tmp_path, stop=5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "imag')
    run("SFD", tmp_path, resume=True)
    assert log_of(tmp_path) == log_of(finished("SFD"))


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    kept = Run(tmp_path)
    for value in (1.0, 2.0):
        kept.save(3, {"roles/a": {"w": torch.tensor([value])}}, {"seconds": value})
    facts, groups = kept.latest()
    assert float(groups["roles/a"]["w"]) == 2 and facts["seconds"] == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000003"]


# ---- what is refused


def test_another_recipe_is_refused_by_the_names_of_its_fields(finished: Callable[[str], Path]) -> None:
    out = finished("SFD")
    before = fingerprint(out)
    other = SFD(steps=2, between=1, rho=5.0, optim=Optim(lr=2e-3, eps=1e-4, warmup=2, decay="linear", clip=1.0))
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"seed": 4}, ["options.seed was 0 and is 4"]),
        ({"budget": "9 steps"}, ["options.budget.amount was 6.0 and is 9.0"]),
        ({"batch": 4, "micro": 1}, ["options.batch was 8 and is 4", "options.micro was 2 and is 1"]),
        ({"method": other}, ["settings.rho was 7.0 and is 5.0", "settings.optim.decay was 'cosine' and is 'linear'"]),
        ({"method": METHODS["SiD"]}, ["method was 'SFD' and is 'SiD'"]),
        ({"recipe": {"teacher": "other"}}, ["teacher was None and is 'other'"]),
    ]
    for change, said in cases:
        with pytest.raises(InputError, match="another recipe") as error:
            run("SFD", out, resume=True, **change)
        for part in said:
            assert part in str(error.value) and "\n" not in str(error.value)
    assert fingerprint(out) == before


def test_an_occupied_folder_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    out = finished("SFD")
    before = fingerprint(out)
    with pytest.raises(InputError, match=r"already holds files.*--resume.*--overwrite"):
        run("SFD", out)
    assert fingerprint(out) == before
    (tmp_path / "thesis.txt").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError):
            run("SFD", tmp_path, **options)
        assert fingerprint(tmp_path) == {"thesis.txt": b"years of work"}
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match="file"):
            run("SFD", place)
    with pytest.raises(InputError, match="at least 1 checkpoint"):
        run("SFD", tmp_path / "new", keep=0)


def test_overwriting_starts_anew_and_an_early_kill_claims_nothing(tmp_path: Path) -> None:
    run("SFD", tmp_path / "run", budget=2, seed=3)
    (tmp_path / "run/stray").touch()
    run("SFD", tmp_path / "run", budget=1, overwrite=True)
    assert not (tmp_path / "run/stray").exists() and [e["step"] for e in log_of(tmp_path / "run")] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    (tmp_path / "early").mkdir()
    (tmp_path / "early/.recipe.json.1.tmp").write_text("{")
    run("SFD", tmp_path / "early", budget=1)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_an_input_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=f"cannot write.*{os.strerror(number)}"):
        run("SFD", tmp_path / "run")


@pytest.mark.parametrize("call", ["fsync", "save_file"])
def test_a_full_disk_is_an_input_error_and_costs_no_checkpoint(
    call: str, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        run("SFD", tmp_path, stop=4)
    before = fingerprint(tmp_path / "checkpoints")
    where = os if call == "fsync" else state
    real, left = getattr(where, call), 0

    def full(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, call, full)
        left = 3 if call == "fsync" else 1  # fsync: recipe, log, one file of the checkpoint
        with pytest.raises(InputError, match=r"cannot write.*No space left on device") as error:
            run("SFD", tmp_path, resume=True)
    assert "\n" not in str(error.value)
    assert fingerprint(tmp_path / "checkpoints") == before
    run("SFD", tmp_path, resume=True)
    assert differing(bits(finished("SFD")), bits(tmp_path)) == []


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("roles/student.safetensors", "not a whole safetensors file"),
        ("optim/student.safetensors", "not a whole safetensors file"),
        ("step.json", "not readable JSON"),
    ],
)
def test_a_damaged_checkpoint_is_named(file: str, said: str, finished: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished("SFD"), folder)
    path = Run(folder).checkpoints()[-1] / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=said) as error:
        run("SFD", folder, resume=True)
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(InputError) as error:
        run("SFD", folder, resume=True)
    assert path.stem in str(error.value)


def test_resuming_with_another_teacher_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(finished("SFD"), tmp_path / "run")
    with pytest.raises(InputError, match="made with another recipe: from was"):
        run("SFD", tmp_path / "run", start=tiny(width=8, embedding=8, blocks=1), resume=True)


def test_a_checkpoint_of_another_network_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(finished("SFD"), tmp_path / "run")
    run("SFD", tmp_path / "small", start=tiny(width=8, embedding=8, blocks=1))
    student = "roles/student.safetensors"
    foreign, own = (sorted((tmp_path / f / "checkpoints").iterdir())[-1] / student for f in ("small", "run"))
    shutil.copy(foreign, own)
    with pytest.raises(InputError, match="holds another architecture"):
        run("SFD", tmp_path / "run", resume=True)
