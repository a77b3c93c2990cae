"""``fewstep export``: what it writes, what it says, and one line for what it cannot do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli import main
from fewstep.core.solver import build
from fewstep.core.state import save_tensors
from fewstep.core.stored import save_sampler
from fewstep.export import save_lora, verify
from fewstep.models.lora import LoRA, adapter, merge
from fewstep.sources import load
from test_07_export import without_a_process
from tiny_models import stable_diffusion
from tiny_runs import tiny

PROMPT = "--prompt 'a red cat' --prompt 'small house'"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny().save(tmp_path_factory.mktemp("own") / "student")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd") / "source"
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def cli(line: str) -> None:
    main(shlex.split(line))


def last(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command said at its end; diffusers may have said something before."""
    return capsys.readouterr().err.strip().splitlines()[-1]


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr of a command that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli(line)
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    return said.err.strip().splitlines()


def test_export_tells_what_it_wrote(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"export {own} --sampler heun --steps 3 --guidance 2 --title Tiny --no-check")
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert not said.out and len(lines) == 2
    assert lines[0].startswith("note: student-diffusers holds code of its own")
    assert lines[1] == "student-diffusers: TableauScheduler, num_inference_steps=5, not checked"
    assert json.loads(Path("student-diffusers/fewstep.json").read_text())["guidance_scale"] == 2
    assert "# Tiny" in Path("student-diffusers/README.md").read_text()


def test_export_of_a_pipeline_with_a_file_for_a_sampler(
    sd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_process(monkeypatch)
    path: Any = load(sd, steps=4).denoiser
    levels = [float(path.path.sigma(float(t))) for t in (999, 499)]
    save_sampler(build("consistency", torch.tensor([*levels, 0.0], dtype=torch.float64)), Path("two.json"))
    line = f"export {sd} --out out --sampler two.json --force"
    cli(f"{line} --dtype bfloat16 --guidance 2 --negative dog --seed 3 {PROMPT}")
    said = last(capsys)
    assert said.startswith("out: LCMScheduler, num_inference_steps=2, largest difference ")
    assert float(said.rpartition(" ")[2]) < 1e-4
    facts = json.loads(Path("out/fewstep.json").read_text())
    assert (facts["dtype"], facts["nfe"], facts["negative_prompt"]) == ("bfloat16", 2, "dog")
    assert "manual_seed(3)" in Path("out/README.md").read_text()
    again = refused(f"{line} --no-check", capsys)
    assert len(again) == 1 and "out already holds an export: choose another folder, or --overwrite" in again[0]
    cli(f"{line} --no-check --overwrite --scheduler tableau")
    assert json.loads(Path("out/fewstep.json").read_text())["scheduler"] == "TableauScheduler"


def test_a_difference_is_a_table_and_a_line(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(request: Path, name: str, timeout: float) -> None:
        """A process whose scheduler went another way."""
        out = Path(json.loads(request.read_text())["out"])
        save_tensors(
            out / "pictures.safetensors", {"pictures": torch.zeros(2, 1, 4, 4), "draw.0": torch.ones(2, 1, 4, 4)}
        )
        facts = {"class": "Other", "timesteps": [80.0], "asked": [80.0, 3.0, 1.0]}
        (out / "facts.json").write_text(json.dumps(facts))

    monkeypatch.setattr(verify, "_run", other)
    said = refused(f"export {own} --out out --sampler euler --steps 2", capsys)
    assert [line.split() for line in said[:-1]] == [
        ["sigma", "time", "asked", "by", "Other"],
        ["80", "80", "80"],
        ["0.002", "0.002", "3"],
        ["-", "-", "1"],
    ]
    assert "the exported pipeline out does not make fewstep's pictures" in said[-1] and "80 -> 80" in said[-1]
    assert list(Path().iterdir()) == []


def test_the_lora_of_a_run(sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    made = load(sd, steps=2)
    view = adapter(made.network, LoRA(rank=2))
    save_lora(view, Path("run/lora"))
    made.denoiser = merge(view)
    made.save("run")
    cli(f"export run --lora --base-model jane/base --no-check {PROMPT}")
    assert last(capsys) == "run-lora: DDIMScheduler, num_inference_steps=2, not checked"
    assert Path("run-lora/pytorch_lora_weights.safetensors").is_file()
    card = Path("run-lora/README.md").read_text()
    assert 'load_lora_weights("run-lora")' in card and 'from_pretrained("jane/base")' in card
    assert "--dtype is for whole pipelines" in refused("export run --lora --dtype float16", capsys)[-1]
    assert "export the merged" not in refused(f"export {sd} --lora --out x", capsys)[-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("export {own} --scheduler stock", "ResMLP is no class of diffusers, so that its pipeline brings code"),
        ("export {own} --scheduler none", "invalid choice 'none'"),
        ("export {own} --dtype int8", "invalid choice 'int8'"),
        ("export {own} --lora", "has no LoRA"),
        ("export {own} --base-model a/b", "--base-model is for --lora"),
        ("export {own} --push nowhere", "'nowhere' is no repository of the Hub"),
        ("export {own} --tolerance 2", "tolerance must be between 0 and 1, got 2.0"),
        ("export {own} --negative dog", "this generator reads no prompts"),
        ("export {own} --steps 3", "--steps needs a named --sampler"),
        ("export {own} --out .", "is the folder that this process works in"),
        ("export nothing-here", "nothing-here does not exist"),
        ("export", "required"),
    ],
)
def test_bad_input_is_one_line(own: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(line.format(own=own), capsys)
    assert len(lines) == 1 and said in lines[0], lines
    assert list(Path().iterdir()) == []


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("export --help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "GENERATOR" in text
    for flag in (
        "--scheduler",
        "--dtype",
        "--prompt",
        "--no-check",
        "--lora",
        "--overwrite",
        "--sampler",
        "--guidance",
    ):
        assert flag in text, flag
