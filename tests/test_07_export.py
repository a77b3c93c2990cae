"""Whole pipelines out: stock diffusers, in a process without fewstep, makes the generator's own pictures."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import Generator, InputError, guided, load
from fewstep.core.denoiser import Wrapper
from fewstep.core.role import Optim
from fewstep.core.solver import build
from fewstep.core.state import load_tensors
from fewstep.distill import SFD, distill
from fewstep.export import apply_lora, export_lora, save_lora, stock_scheduler, to_diffusers, verify
from fewstep.export import pipeline as exporting
from fewstep.export.calls import Call, Plan, call_for, check_call
from fewstep.export.layout import copy_component, in_float32
from fewstep.export.lora_repo import _compared
from fewstep.export.pipeline import exported_facts
from fewstep.export.place import check_place, taking_place
from fewstep.export.verify import PictureDifference, replayed
from fewstep.models.lora import LoRA, adapter, merge
from fewstep.solve.amed import AMED
from tiny_models import dit, flux, sd3, stable_diffusion
from tiny_runs import tiny

PROMPTS = ["a red cat", "small house on a tree"]
NEGATIVE = "blue dog"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, written once."""
    made: dict[str, Path] = {}
    makers: dict[str, Callable[[], Any]] = {"sd": stable_diffusion, "sd3": sd3, "flux": flux, "dit": dit}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "source"
            makers[name]().save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def sd(saved: Callable[[str], Path]) -> Generator:
    return load(saved("sd"), steps=4)


@pytest.fixture(scope="module")
def own() -> Generator:
    return tiny("unet", channels=8, multipliers=(1, 2), blocks=1, attention=(2,))


def at_times(generator: Generator, *times: int) -> torch.Tensor:
    """The levels of these trained times, and 0."""
    path = generator.denoiser.path  # type: ignore[attr-defined]
    return torch.tensor([*(float(path.sigma(float(t))) for t in times), 0.0], dtype=torch.float64)


def four_steps(generator: Generator) -> Generator:
    return generator.with_sampler(build("consistency", at_times(generator, 999, 749, 499, 249)))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the fresh process's script here, where the libraries are loaded already: stock folders alone allow it."""

    def run(request: Path, name: str, timeout: float) -> None:
        with monkeypatch.context() as patch:
            # The script bars fewstep from being imported; this puts it back.
            patch.setitem(sys.modules, "fewstep", sys.modules["fewstep"])
            runpy.run_path(str(Path(verify.__file__).with_name("fresh.py")))["main"](str(request))

    monkeypatch.setattr(verify, "_run", run)


# ---- proved in a process of its own


def test_a_guided_student_becomes_a_stock_pipeline(sd: Generator, tmp_path: Path) -> None:
    student = guided(four_steps(sd), 3.0, NEGATIVE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = student.to_diffusers(tmp_path / "out", prompts=PROMPTS)
    facts = exported_facts(out)
    assert facts is not None and facts["scheduler"] == "LCMScheduler" and not facts["trust_remote_code"]
    assert facts["checked"]["largest_difference"] < 1e-4 and facts["checked"]["asked"] == [999, 749, 499, 249]
    assert (facts["guidance_scale"], facts["negative_prompt"], facts["num_inference_steps"]) == (3.0, NEGATIVE, 4)
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert config["original_inference_steps"] == 4, "its default grid would be 999, 759, 499, 259"
    assert not any(n.endswith((".py", ".bin")) for n in names(out)) and (out / "sample.png").is_file()
    card = (out / "README.md").read_text()
    assert 'negative_prompt="blue dog"' in card and 'from_pretrained("out")' in card and str(tmp_path) not in card
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    again = load(out)
    assert again.sampler.nfe == 4
    assert far(again.sample(2, PROMPTS, seed=3), four_steps(sd).sample(2, PROMPTS, seed=3)) < 1e-5


def test_a_table_without_a_stock_scheduler_ships_its_code(saved: Callable[[str], Path], tmp_path: Path) -> None:
    levels = torch.tensor([1e8, 3.0, 0.7, 0.0], dtype=torch.float64)
    made = load(saved("sd3"), steps=4).with_sampler(build("dpmpp2m", levels))
    with pytest.raises(InputError, match="no stock scheduler of diffusers does what 'dpmpp-2m' does"):
        made.to_diffusers(tmp_path / "out", scheduler="stock", prompts=PROMPTS)
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(
        UserWarning, match=r"code of its own \(scheduler/scheduling_fewstep.py\).*trust_remote_code=True"
    ):
        out = made.to_diffusers(tmp_path / "out", prompts=PROMPTS)
    facts = exported_facts(out)
    assert facts is not None and facts["scheduler"] == "TableauScheduler" and facts["trust_remote_code"]
    assert facts["checked"]["largest_difference"] < 1e-4 and len(facts["checked"]["asked"]) == 3
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    again = load(out)
    assert far(again.sample(2, PROMPTS, seed=3), made.sample(2, PROMPTS, seed=3)) < 1e-5


def test_a_network_of_our_own_travels_with_its_code(own: Generator, tmp_path: Path) -> None:
    levels = torch.tensor([80.0, 5.0, 0.5, 0.0], dtype=torch.float64)
    student = guided(own.with_sampler(build("heun", levels)), 2.0)
    with pytest.raises(InputError, match="UNet is no class of diffusers"):
        student.to_diffusers(tmp_path / "out", scheduler="stock")
    with pytest.warns(UserWarning, match="code of its own"):
        out = student.to_diffusers(tmp_path / "out")
    assert {"pipeline.py", "denoiser/modeling_fewstep.py", "scheduler/scheduling_fewstep.py"} <= names(out)
    facts = exported_facts(out)
    assert facts is not None and facts["nfe"] == 5 and facts["checked"]["largest_difference"] < 1e-4
    assert facts["checked"]["asked"] == pytest.approx([80, 5, 5, 0.5, 0.5]), "told sigma itself"


def test_a_difference_shows_both_grids_and_leaves_nothing(
    sd: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sd.with_sampler(build("consistency", at_times(sd, 999)))
    out = one.to_diffusers(tmp_path / "out", prompts=PROMPTS, check=False)
    before = (out / "fewstep.json").read_bytes()
    lay = exporting.lay_pipeline

    def spoilt(generator: Generator, table: Any, place: Path, *rest: Any) -> Any:
        laid = lay(generator, table, place, *rest)
        config = place / "scheduler" / "scheduler_config.json"
        # DDIM's own spacing asks about pure noise at time 1.
        config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "DDIMScheduler"}))
        index = json.loads((place / "model_index.json").read_text())
        (place / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
        return laid

    monkeypatch.setattr(exporting, "lay_pipeline", spoilt)
    without_a_process(monkeypatch)
    with pytest.raises(PictureDifference, match=r"14\.61 -> 999; DDIMScheduler asked the network at") as caught:
        one.to_diffusers(out, prompts=PROMPTS, overwrite=True)
    assert "they differ by" in str(caught.value) and "the exported pipeline out " in str(caught.value)
    assert caught.value.table.splitlines()[0].split() == ["sigma", "time", "asked", "by", "DDIMScheduler"]
    assert len(caught.value.table.splitlines()) == 2
    assert (out / "fewstep.json").read_bytes() == before, "the old export stays until the new one is whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lora_repository(saved: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    teacher, quick = load(saved("sd"), steps=4, prompts=PROMPTS), Optim(lr=1e-2)
    options: dict[str, Any] = {"budget": 2, "batch": 2, "progress": False, "grid_every": 0, "lora": LoRA(rank=2)}
    student = distill(teacher, SFD(steps=2, between=1, optim=quick), out=tmp_path / "run", **options)
    with pytest.warns(UserWarning, match="no stock scheduler does the same"):
        out = export_lora(tmp_path / "run", tmp_path / "repo", prompts=PROMPTS, base_model="jane/base")
    facts = json.loads((out / "fewstep.json").read_text())
    assert facts["format"] == "fewstep-lora/1" and facts["base_model"] == "jane/base" and facts["nfe"] == 2
    assert facts["checked"]["largest_difference"] < 1e-4
    assert far(student.sample(2, PROMPTS), teacher.sample(2, PROMPTS, sampler=student.sampler)) > 1e-3, "LoRA matters"
    own_file = tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"
    assert (out / own_file.name).read_bytes() == own_file.read_bytes()
    assert {"scheduler/scheduler_config.json", "scheduler/scheduling_fewstep.py", "sample.png"} <= names(out)
    card = (out / "README.md").read_text()
    assert "base_model: jane/base" in card and "base_model_relation: adapter" in card
    assert 'from_pretrained("jane/base")' in card and 'load_lora_weights("repo")' in card
    with pytest.raises(InputError, match="already holds an export"):
        export_lora(tmp_path / "run", out)
    stock = student.with_sampler(build("consistency", at_times(student, 999)))
    again = export_lora(tmp_path / "run", out, generator=stock, overwrite=True, check=False, scheduler="stock")
    assert json.loads((again / "fewstep.json").read_text())["scheduler"] == "LCMScheduler"
    assert "scheduler/scheduling_fewstep.py" not in names(again), "the old export is gone"
    with pytest.raises(InputError, match=r"fewstep-lora/1.*expected 'fewstep-generator/1'"):
        load(out)


def test_a_run_without_lora_has_no_lora_repository(
    own: Generator, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    own.save(tmp_path / "run")
    with pytest.raises(InputError, match="has no LoRA"):
        export_lora(tmp_path / "run", tmp_path / "repo")
    file = tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"")
    with pytest.raises(InputError, match="no pipeline of diffusers"):
        export_lora(tmp_path / "run", tmp_path / "repo")
    with pytest.raises(InputError, match="diffusers loads no LoRA into a DiTTransformer2DModel"):
        export_lora(tmp_path / "run", tmp_path / "repo", generator=load(saved("dit"), steps=2))
    with pytest.raises(InputError, match="owner/name on the Hub, got '/models/sd'"):
        export_lora(tmp_path / "run", tmp_path / "repo", base_model="/models/sd")
    assert not (tmp_path / "repo").exists()


def test_a_lora_of_half_precision_is_compared_unrounded(saved: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    half, whole = load(saved("sd"), steps=2, dtype="bfloat16"), load(saved("sd"), steps=2)
    view = adapter(half.network, LoRA(rank=2))
    g = torch.Generator().manual_seed(0)
    for p in view.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    save_lora(view, tmp_path)
    student = guided(replace(half, denoiser=merge(view)), 2.0)
    compared = _compared(student, student.pipeline, tmp_path)  # type: ignore[arg-type]
    expected = guided(apply_lora(whole, tmp_path), 2.0)
    assert far(compared.sample(2, PROMPTS), expected.sample(2, PROMPTS)) < 1e-5
    assert far(compared.sample(2, PROMPTS), student.sample(2, PROMPTS)) > 1e-3


# ---- what lies in the folder


def test_one_step_starts_at_the_last_time(sd: Generator, tmp_path: Path) -> None:
    one = sd.with_sampler(build("euler", at_times(sd, 999)))
    out = one.to_diffusers(tmp_path / "out", prompts=PROMPTS, check=False)
    facts = exported_facts(out)
    assert facts is not None and facts["checked"] is None and facts["num_inference_steps"] == 1
    import diffusers

    made = getattr(diffusers, facts["scheduler"]).from_pretrained(out, subfolder="scheduler")
    made.set_timesteps(1)
    assert [float(t) for t in made.timesteps] == [999.0]
    assert "was not checked" in (out / "README.md").read_text()
    assert load(out).sampler.nfe == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_flow_models_have_stock_schedulers(saved: Callable[[str], Path], steps: int) -> None:
    for name, pushed in (("sd3", None), ("flux", "linspace")):
        made = load(saved(name), steps=steps, size=16)
        config = made.pipeline.scheduler_config  # type: ignore[union-attr]
        options: dict[str, Any] = {"start_std": made.start_std(), "pipeline_sigmas": pushed}
        found = stock_scheduler(made.sampler, config, **options)  # type: ignore[arg-type]
        assert found is not None and found[0]["_class_name"] == "FlowMatchEulerDiscreteScheduler" and found[1] == steps


def as_snapshot(source: Path, target: Path) -> Path:
    """The folder as the Hub's cache has it: links to blobs."""
    for file in [p for p in source.rglob("*") if p.is_file()]:
        link = target / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return target


def test_only_what_is_needed_is_copied_and_opens_by_its_plain_name(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "blobs", variant="fp16")
    pipe.text_encoder.save_pretrained(tmp_path / "blobs" / "text_encoder", variant="fp16", max_shard_size="5KB")
    (tmp_path / "blobs" / "text_encoder" / "model.fp16.safetensors").unlink()
    pipe.unet.save_pretrained(tmp_path / "blobs" / "unet", max_shard_size="20KB")
    pipe.vae.save_pretrained(tmp_path / "blobs" / "vae")
    for name in ("text_encoder/pytorch_model.bin", "vae/model.onnx", "vae/.hidden", "safety_checker/pytorch_model.bin"):
        (tmp_path / "blobs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "blobs" / name).write_bytes(b"never opened")
    index = json.loads((tmp_path / "blobs" / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (tmp_path / "blobs" / "model_index.json").write_text(json.dumps(index))
    made = load(as_snapshot(tmp_path / "blobs", tmp_path / "snapshot"), steps=4)
    out = made.to_diffusers(tmp_path / "out", prompts=PROMPTS, check=False, dtype=torch.float16)
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert not any(n.endswith((".bin", ".onnx", ".hidden")) or ".fp16" in n for n in names(out)), names(out)
    assert len([n for n in names(out) if n.startswith("text_encoder/model-0")]) > 1, "shards stay shards"
    facts = exported_facts(out)
    assert facts is not None and sorted(facts["left_out"]) == ["feature_extractor", "safety_checker"]
    assert facts["dtype"] == "float16"
    unet = load_tensors(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in unet.values()} == {torch.float16}
    shutil.rmtree(tmp_path / "blobs")
    opened = StableDiffusionPipeline.from_pretrained(out, use_safetensors=True)
    for name in ("text_encoder", "vae"):
        expected = getattr(pipe, name).state_dict()
        assert all(torch.equal(t, expected[k]) for k, t in getattr(opened, name).state_dict().items()), name
    assert max(far(t, pipe.unet.state_dict()[k]) for k, t in opened.unet.state_dict().items()) < 1e-2


def test_a_component_of_pickles_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"has no weights as safetensors.*pickles are not opened"):
        copy_component(tmp_path / "vae", tmp_path / "out")


def test_half_precision_is_compared_as_others_will_read_it(saved: Callable[[str], Path]) -> None:
    half = guided(load(saved("sd"), steps=2, dtype="bfloat16"), 2.0, NEGATIVE)
    wide = in_float32(half)
    whole = guided(load(saved("sd"), steps=2), 2.0, NEGATIVE)
    assert in_float32(whole) is whole
    # Text and autoencoder from the files, the network as it was rounded.
    assert all(torch.equal(a, whole.encode(PROMPTS)[k]) for k, a in wide.encode(PROMPTS).items())
    rounded = replace(whole, denoiser=in_float32(load(saved("sd"), steps=2), torch.bfloat16).denoiser)
    assert far(wide.sample(2, PROMPTS), guided(rounded, 2.0, NEGATIVE).sample(2, PROMPTS)) < 1e-5
    assert far(wide.sample(2, PROMPTS), whole.sample(2, PROMPTS)) > 1e-4


# ---- where it goes


def test_the_old_export_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), taking_place(target) as place:
        (place / "new").write_text("half")
        assert names(target) == {"old"}
        raise RuntimeError
    assert names(tmp_path) == {"out/old"}
    with taking_place(target) as place:
        (place / "new").write_text("whole")
    assert names(tmp_path) == {"out/new"}


def test_what_a_killed_process_left_is_cleared_and_put_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target, living = tmp_path / "out", os.getppid()
    for name in (f".out.{dead.pid}.tmp", f".out.{dead.pid}.old.tmp", f".out.{living}.tmp", ".out.mine.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    with pytest.raises(RuntimeError), taking_place(target):
        raise RuntimeError
    assert names(tmp_path) == {"out/file", f".out.{living}.tmp/file", ".out.mine.tmp/file"}


def test_places_in_the_way(sd: Generator, saved: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "full" / "model_index.json").write_text("{}")
    cases: list[tuple[Path, str]] = [
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "no earlier export"),
        (tmp_path / "file" / "out", "Not a directory|cannot write"),
        (saved("sd"), "holds the pipeline that the generator is read from"),
        (saved("sd").parent, "holds the pipeline that the generator is read from"),
        (Path(), "is the folder that this process works in"),
    ]
    for place, said in cases:
        with pytest.raises(InputError, match=said):
            sd.to_diffusers(place, prompts=PROMPTS, check=False, overwrite=True)
    assert (saved("sd") / "model_index.json").is_file() and (tmp_path / "full" / "thesis.tex").is_file()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert check_place(tmp_path / "link", False, sd) == (tmp_path / "real").resolve()


# ---- what cannot be exported


class Shifted(Wrapper):
    def __call__(self, x: Any, sigma: Any, cond: Any = None) -> Any:
        return self.denoiser(x, sigma, cond)


def amed() -> AMED:
    return object.__new__(AMED)


def ends_early(g: Generator) -> Generator:
    return g.with_sampler(build("euler", torch.tensor([80.0, 3.0], dtype=torch.float64)))


def renamed(g: Generator) -> Generator:
    around: Any = g.pipeline
    made = object.__new__(type(around))
    made.__dict__ |= {**around.__dict__, "class_name": "StableDiffusionPipelin"}
    return replace(g, pipeline=made)


REFUSED: list[tuple[Callable[[Generator], Generator], dict[str, Any], str]] = [
    (lambda g: g.with_sampler(amed()), {}, "AMED cannot be exported: its weights depend on the picture"),
    (ends_early, {}, "ends at sigma 3, expected 0"),
    (lambda g: replace(g, denoiser=Shifted(g.denoiser)), {}, "Shifted around Precond cannot be exported"),
    (lambda g: guided(guided(g, 2.0), 2.0), {}, "CFG around CFG cannot be exported"),
    (lambda g: replace(g, denoiser=lambda x, sigma, cond=None: x), {}, "function cannot be exported"),
    (renamed, {}, "pipeline class to export to 'StableDiffusionPipelin': did you mean 'StableDiffusionPipeline'"),
    (lambda g: g, {"prompts": []}, "checked with prompts: pass a list of at least one"),
    (lambda g: g, {"prompts": "a fox"}, "checked with prompts: pass a list"),
    (lambda g: g, {"prompts": [" "]}, "checked with prompts"),
    (lambda g: g, {"scheduler": "stok"}, "kind of scheduler 'stok': did you mean 'stock'"),
    (lambda g: g, {"tolerance": 0}, "tolerance must be between 0 and 1"),
    (lambda g: guided(g, 0.5), {}, "apply guidance above 1 only, got 0.5"),
]


@pytest.mark.parametrize(("change", "options", "said"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_what_is_refused(
    sd: Generator, change: Callable[[Generator], Generator], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        to_diffusers(change(sd), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_calls(saved: Callable[[str], Path], own: Generator) -> None:
    made = load(saved("flux"), steps=2, size=16, embedded_guidance=2.5)
    plain = call_for("FluxPipeline", made, Plan(2, embedded=2.5), PROMPTS)
    assert plain.arguments["guidance_scale"] == 2.5 and "true_cfg_scale" not in plain.arguments and plain.passes == 1
    true = call_for("FluxPipeline", made, Plan(2, 4.0, embedded=2.5), PROMPTS)
    assert true.arguments["true_cfg_scale"] == 4.0 and true.arguments["negative_prompt"] == ["", ""]
    assert true.passes == 2 and true.show["negative_prompt"] == ""
    told_none = call_for("FluxPipeline", made, Plan(2, 4.0), PROMPTS)
    assert "guidance_scale" not in told_none.arguments and told_none.arguments["true_cfg_scale"] == 4.0
    labels = call_for("DiTPipeline", load(saved("dit"), steps=2), Plan(2, 1.5))
    assert labels.labels == (0, 1) and labels.show["class_labels"] == [1] and labels.arguments["guidance_scale"] == 1.5
    free = call_for("FewstepPipeline", replace(own, conds=None), Plan(3))
    assert free.arguments == {"batch_size": 2, "num_inference_steps": 3} and free.count == 2
    with pytest.raises(InputError, match="passes no labels to its network"):
        check_call("DDPMPipeline", own, Plan(2))
    with pytest.raises(InputError, match="is told its guidance applies no other, got 4"):
        check_call("StableDiffusionPipeline", own, Plan(2, 4.0, embedded=8.0), PROMPTS)


def test_too_few_draws_are_told(own: Generator) -> None:
    noisy = build("consistency", torch.tensor([80.0, 1.0, 0.0], dtype=torch.float64))
    call = Call({}, labels=(0, 1))
    with pytest.raises(InputError, match="drew no noise to start from"):
        replayed(own, noisy, call, [])
    with pytest.raises(InputError, match="drew 0 noises and the sampler needs more"):
        replayed(own, noisy, call, [torch.zeros(2, 1, 4, 4)])


def test_damaged_facts_are_named(sd: Generator, tmp_path: Path) -> None:
    out = four_steps(sd).to_diffusers(tmp_path / "out", prompts=PROMPTS, check=False)
    assert exported_facts(tmp_path) is None
    (out / "fewstep.json").write_text('{"format": ')
    for read in (exported_facts, load):
        with pytest.raises(InputError, match=r"out/fewstep\.json is not readable JSON"):
            read(out)
    with pytest.raises(InputError, match="no earlier export"):
        sd.to_diffusers(out, prompts=PROMPTS, overwrite=True, check=False)
