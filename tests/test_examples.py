"""The examples do what they claim, on tiny models; what each leaves is looked at."""

from __future__ import annotations

import ast
import importlib
import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from edm_files import tiny_edm
from fewstep import Generator, InputError, Precond, Tableau, edm, load
from fewstep.core.path import FLOW
from fewstep.distill import SFD
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.solve import euler

ROOT = Path(__file__).parents[1]
# A run takes twenty seconds, half of it the check in a process of its own: two stand for all four.
RUN = ("edm_one_step", "sd_five_steps")
SCRIPTS = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem not in ("tiny_models", "edm_files"))


def test_all_examples_are_known() -> None:
    assert SCRIPTS == ["edm_one_step", "flux_few_steps", "sd_five_steps", "sdxl_lora"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_begins_with_its_model_and_imports_what_there_is(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert text.startswith('MODEL = ""  # ')
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []
        elif isinstance(node, ast.Import):
            assert all(importlib.import_module(a.name) for a in node.names)


@pytest.mark.parametrize("name", RUN)
def test_an_example_runs_and_leaves_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="pipeline holds code of its own .* trust_remote_code=True"):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    place = tmp_path / "runs" / "examples" / name.replace("_", "-")
    with Image.open(place / "compare.png") as picture:
        assert min(picture.size) > 40
    index = json.loads((place / "pipeline" / "model_index.json").read_text())
    facts = json.loads((place / "pipeline" / "fewstep.json").read_text())
    assert facts["checked"]["largest_difference"] < 1e-4
    card = (place / "pipeline" / "README.md").read_text()
    assert "from_pretrained(" in card and f"num_inference_steps={facts['num_inference_steps']}" in card
    if name == "edm_one_step":
        assert index["_class_name"] == ["pipeline", "FewstepPipeline"]
        assert facts["nfe"] == 1 and Generator.load(place).sampler.nfe == 1
        assert load(tmp_path / "runs" / "examples" / "tiny-edm.pkl").denoiser.shape == (3, 8, 8)
    else:
        table = Tableau.from_json((place / "tableau.json").read_text())
        assert index["_class_name"] == "StableDiffusionPipeline" and facts["guidance_scale"] == 2.0
        assert facts["nfe"] == table.nfe == 5 and facts["sigmas"] == table.sigmas.tolist()
        found = table.meta["calibration"]
        assert found["check_rmse_fitted"] <= found["check_rmse_start"] or found["kept"] == "start"


def test_the_tiny_pickle_is_one_of_edm(tmp_path: Path) -> None:
    made = load(tiny_edm(tmp_path / "deep" / "tiny.pkl"))
    assert (made.denoiser.shape, made.sampler.nfe, made.card["class"]) == ((3, 8, 8), 35, "EDMPrecond")
    assert not list(tmp_path.rglob("*.ran"))


def teacher(low: float, high: float, **options: object) -> Generator:
    net = ResMLP(ResMLPConfig((1, 4, 4), 0, width=8))
    if options:
        made = Precond(net, (1, 4, 4), sigma_min=low, sigma_max=high, **options)  # type: ignore[arg-type]
    else:
        made = edm(net, (1, 4, 4), sigma_min=low, sigma_max=high)
    return Generator(made, euler(torch.tensor([high, 0.0])))


@pytest.mark.parametrize(("low", "expected"), [(0.002, 0.006), (0.0292, 0.0292)])
def test_sfd_stops_where_its_teacher_does(low: float, expected: float) -> None:
    method = SFD(steps=4)
    assert method.ends(teacher(low, 80.0).denoiser) == (expected, 80.0)
    assert method.sampler(teacher(low, 80.0)).end == expected
    assert SFD(sigma_min=0.1).ends(teacher(low, 80.0).denoiser) == (0.1, 80.0)


BAD = [
    (SFD(sigma_min=0.006), (0.03, 80.0), {}, r"SFD\(sigma_min=0.006\) is outside of the teacher's levels, 0.03 to 80"),
    (SFD(sigma_min=90.0), (0.002, 80.0), {}, r"SFD\(sigma_min=90\) is outside of .* leave sigma_min out"),
    (
        SFD(),
        (0.001, 1e8),
        {"path": FLOW, "predicts": "velocity"},
        r"cannot start at sigma 1e\+08, .* choose the grid native",
    ),
]


@pytest.mark.parametrize(("method", "levels", "options", "message"), BAD)
def test_sfd_refuses_levels_that_its_teacher_has_not(
    method: SFD, levels: tuple[float, float], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        method.roles(teacher(*levels, **options))
