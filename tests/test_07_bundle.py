"""Networks as one file, and diffusers folders that carry their own code, in processes that cannot import fewstep."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Precond, edm
from fewstep.core.network import NETWORKS, network
from fewstep.core.noise import Noise
from fewstep.core.path import DDPM, FLOW
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.export.bundle import bundle_denoiser, bundle_network, write_custom_pipeline
from fewstep.export.collect import Bundle, source_of
from fewstep.grid import karras
from fewstep.guide import CFG
from fewstep.models import ResMLP, ResMLPConfig, UNet, UNetConfig
from fewstep.models.guided import GuidedUNet, GuidedUNetConfig
from fewstep.models.guided import karras as consistency
from fewstep.solve.heun import heun
from fewstep.solve.stochastic import euler_ancestral

diffusers = pytest.importorskip("diffusers")

BLOCKED = 'import sys\nsys.modules["fewstep"] = None\n'


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Zero-initialised layers would hide most of a network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return net.eval()


def unet(classes: int = 3) -> nn.Module:
    config = UNetConfig((1, 8, 8), classes, channels=16, multipliers=(1, 2), blocks=1, attention=(4,))
    return randomised(UNet(config))


def guided_unet() -> nn.Module:
    config = GuidedUNetConfig((3, 8, 8), 2, channels=32, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=32)
    return randomised(GuidedUNet(config))


def mlp() -> nn.Module:
    return randomised(ResMLP(ResMLPConfig((1, 4, 4), 2, width=16, embedding=8, blocks=2)))


def opened(text: str, name: str, folder: Path) -> ModuleType:
    """The file as a module, imported while fewstep cannot be."""
    file = folder / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    hidden = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "fewstep"}
    sys.modules["fewstep"] = None  # type: ignore[assignment]
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.update(hidden)
    return module


def imported(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return {n.split(".")[0] for n in names | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


@pytest.mark.parametrize("make", [unet, guided_unet, mlp])
def test_a_network_file_is_the_network(make: object, tmp_path: Path) -> None:
    net = make()  # type: ignore[operator]
    text = bundle_network(net)
    assert text == bundle_network(net)
    assert imported(text) <= {"torch", "numpy", *sys.stdlib_module_names}
    assert text.count("from __future__") == 1 and "@network" not in text
    module = opened(text, f"bundled_{type(net).__name__.lower()}", tmp_path)
    copy = getattr(module, type(net).__name__)(getattr(module, type(net.config).__name__)(**vars(net.config)))
    copy.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(2, *net.config.shape)
    args = (x, torch.tensor([0.3, 1.1]), {"label": torch.tensor([1, -1])})
    with torch.no_grad():
        want = net(*args)
        assert want.abs().max() > 0.1
        assert torch.equal(copy.eval()(*args), want)


def test_docstrings_and_comments_are_kept() -> None:
    text = bundle_network(unet())
    assert "Residual block with adaptive scale and shift" in text
    assert "# Geometric frequencies" in text


def denoisers() -> dict[str, Precond]:
    return {
        "edm": edm(unet(), (1, 8, 8)),
        "flow": Precond(
            unet(), (1, 8, 8), path=FLOW(shift=3.0), predicts="velocity", time="native*1000", sigma_max=1e8
        ),
        "ddpm": Precond(unet(0), (1, 8, 8), path=DDPM, predicts="noise", time="nearest", sigma_max=150.0),
        "consistency": consistency(guided_unet(), (3, 8, 8), distilled=True),
    }


@pytest.mark.parametrize("name", list(denoisers()))
def test_a_denoiser_file_is_the_denoiser(name: str, tmp_path: Path) -> None:
    denoiser = denoisers()[name]
    module = opened(bundle_denoiser(denoiser), f"denoiser_{name}", tmp_path)
    description = json.loads(json.dumps(denoiser.describe()))
    copy = module.FewstepDenoiser(description, classes=2).eval()
    copy.denoiser.load_state_dict(denoiser.state_dict(), strict=True)
    labels = None if name == "ddpm" else torch.tensor([1, -1])
    cond = None if labels is None else {"label": labels}
    for sigma in (0.01, 2.0, torch.tensor([0.5, 60.0])):
        x = torch.randn(2, *denoiser.shape) * 3
        with torch.no_grad():
            want = denoiser(x, sigma, cond)
            assert want.isfinite().all() and want.abs().max() > 1e-3
            assert torch.equal(copy(x, sigma, labels), want)


def scheduler(table: Tableau, **changes: object) -> object:
    from fewstep.export import TableauScheduler

    return TableauScheduler.from_tableau(table, path="edm", prediction_type="sample", **changes)


class Drawn(Noise):
    """Noise as a torch.Generator draws it, in the order of the rows."""

    def __init__(self, generator: torch.Generator, count: int) -> None:
        super().__init__(torch.zeros(count, dtype=torch.int64))
        object.__setattr__(self, "generator", generator)

    def normal(self, shape: Sequence[int], *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(len(self), *shape, generator=self.__dict__["generator"], dtype=dtype)


CALL = """
import torch
from diffusers import DiffusionPipeline

for folder, steps in {folders!r}:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    found = []
    for labels, scale in {calls!r}:
        generator = torch.Generator().manual_seed(5)
        call = dict(class_labels=labels, guidance_scale=scale, generator=generator, output_type="pt")
        found.append(pipe(3, **call).images)
    image = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(1)).images[0]
    image.save(folder + "/picture.png")
    torch.save(torch.stack(found), folder + "/found.pt")
try:
    import fewstep
except ImportError:
    print("no fewstep here")
"""


def fresh(code: str, cache: Path) -> str:
    """Runs code where fewstep cannot be imported; returns what it printed."""
    boot = f'import os\nos.environ["HF_MODULES_CACHE"] = {str(cache)!r}\nos.environ["HF_HUB_OFFLINE"] = "1"\n{BLOCKED}'
    done = subprocess.run([sys.executable, "-I", "-c", boot + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_custom_pipeline_makes_the_same_pictures_without_fewstep(tmp_path: Path) -> None:
    denoiser = edm(unet(), (1, 8, 8))
    grid = karras(5, denoiser.sigma_min, denoiser.sigma_max)
    calls: list[tuple[list[int], float]] = [([2, 0, -1], 1.0), ([1, 1, 0], 2.5)]
    tables = {"heun": heun(grid), "ancestral": euler_ancestral(grid)}
    folders = [
        (str(write_custom_pipeline(denoiser, scheduler(table), tmp_path / name, classes=3)), table.nfe)
        for name, table in tables.items()
    ]
    said = fresh(CALL.format(folders=folders, calls=calls), tmp_path / "modules")
    assert "no fewstep here" in said
    for name, table in tables.items():
        found = torch.load(tmp_path / name / "found.pt", weights_only=True)
        for pictures, (labels, scale) in zip(found, calls, strict=True):
            generator = torch.Generator().manual_seed(5)
            x = table.start * torch.randn(3, 1, 8, 8, generator=generator)
            with torch.no_grad():
                cond = {"label": torch.tensor(labels)}
                want = table(CFG(denoiser, scale), x, cond, noise=Drawn(generator, 3))
            assert (pictures - (want.clamp(-1, 1) / 2 + 0.5)).abs().max() < 1e-5
            assert pictures.std() > 0.02
        assert (tmp_path / name / "picture.png").stat().st_size > 50


def test_an_unconditional_repository_holds_exactly_its_files(tmp_path: Path) -> None:
    denoiser = edm(unet(0), (1, 8, 8))
    table = heun(karras(3, 0.002, 80.0))
    folder = write_custom_pipeline(denoiser, scheduler(table), tmp_path / "repo")
    # Again over the old one, as a later export does.
    write_custom_pipeline(denoiser, scheduler(table), folder)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "model_index.json",
        "pipeline.py",
        "denoiser/config.json",
        "denoiser/modeling_fewstep.py",
        "denoiser/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "scheduler/scheduling_fewstep.py",
    }
    for file in folder.rglob("*.py"):
        assert "fewstep" not in imported(file.read_text())
    body = json.loads((folder / "model_index.json").read_text())
    assert body["_class_name"] == ["pipeline", "FewstepPipeline"]
    assert body["denoiser"] == ["modeling_fewstep", "FewstepDenoiser"]
    assert body["scheduler"] == ["scheduling_fewstep", "TableauScheduler"]


def pipeline_here(classes: int) -> object:
    from fewstep.export.custom_pipeline import FewstepPipeline
    from fewstep.export.modeling import FewstepDenoiser

    denoiser = edm(unet(classes), (1, 8, 8))
    model = FewstepDenoiser(denoiser.describe(), classes)
    model.denoiser.load_state_dict(denoiser.state_dict())
    pipe = FewstepPipeline(model.eval(), scheduler(heun(karras(2, 0.002, 80.0))))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_the_pipeline_returns() -> None:
    pipe = pipeline_here(3)
    noise = torch.randn(2, 1, 8, 8)
    pictures = pipe(latents=noise, class_labels=1, output_type="pt").images  # type: ignore[operator]
    assert pictures.shape == (2, 1, 8, 8) and pictures.min() >= 0 and pictures.max() <= 1
    array = pipe(latents=noise, class_labels=[1, 1], output_type="np", return_dict=False)[0]  # type: ignore[operator]
    assert array.shape == (2, 8, 8, 1) and abs(torch.tensor(array).permute(0, 3, 1, 2) - pictures).max() < 1e-6
    images = pipe(2, generator=torch.Generator().manual_seed(0)).images  # type: ignore[operator]
    assert [i.size for i in images] == [(8, 8), (8, 8)]
    again = pipe(2, generator=torch.Generator().manual_seed(0)).images  # type: ignore[operator]
    assert [i.tobytes() for i in images] == [i.tobytes() for i in again]


@pytest.mark.parametrize(
    ("classes", "call", "message"),
    [
        (3, {"class_labels": 3}, "label 3 is out of range: classes are 0 to 2"),
        (3, {"class_labels": [0, 1], "batch_size": 3}, "how many pictures"),
        (3, {"batch_size": 0}, "how many pictures"),
        (3, {"output_type": "jpg"}, "output_type must be one of pil, np, pt, got 'jpg'"),
        (3, {"latents": torch.zeros(1, 3, 8, 8)}, "latents must be (B, 1, 8, 8), got (1, 3, 8, 8)"),
        (0, {"class_labels": 0}, "this model has no classes"),
        (0, {"guidance_scale": 2.0}, "this model has no classes"),
        (0, {"num_inference_steps": 17}, "num_inference_steps=17"),
    ],
)
def test_bad_calls_of_the_pipeline(classes: int, call: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        pipeline_here(classes)(**call)  # type: ignore[operator]
    assert message in str(caught.value)


def module_at(folder: Path, name: str, text: str) -> str:
    """A module of the library for the time of a test."""
    full = f"fewstep.models.{name}"
    file = folder / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(full, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return full


FIRST = '''"""First."""
import math
from torch import nn as F

SCALE = 2.0
"""What it is multiplied with."""


# Doubles.
def _twice(x: float) -> float:
    SCALE_OF = [SCALE for _ in range(1)]
    return SCALE_OF[0] * x * math.cos(0)


class Base:
    layer = F.Identity
'''
SECOND = '''"""Second."""
from torch.nn import functional as F
from fewstep.models.zz_first import Base, _twice as double

SCALE = 3.0


def _twice(x: float, *, SCALE: float = SCALE) -> float:
    return SCALE * double(x)


class Made(Base):
    SCALE = SCALE + 1

    def both(self, x: float) -> tuple[float, float, float]:
        made = (lambda SCALE: SCALE)(5.0)
        return _twice(x), SCALE, made + self.SCALE * float(F.relu.__name__ == "relu")
'''


@pytest.fixture
def two_modules(tmp_path: Path) -> str:
    module_at(tmp_path, "zz_first", FIRST)
    full = module_at(tmp_path, "zz_second", SECOND)
    yield full
    for name in ("zz_first", "zz_second"):
        sys.modules.pop(f"fewstep.models.{name}", None)
    source_of.cache_clear()  # type: ignore[attr-defined]


def test_names_that_clash_are_renamed_where_they_are_meant(two_modules: str, tmp_path: Path) -> None:
    bundle = Bundle()
    bundle.add(two_modules, "Made")
    text = bundle.text("Two modules.")
    assert "def _twice_zz_second" in text and "SCALE_zz_second = 3.0" in text and "# Doubles." in text
    assert '"""What it is multiplied with."""' in text
    made = opened(text, "bundled_two", tmp_path).Made
    want = sys.modules[two_modules].Made
    assert made().both(1.0) == want().both(1.0) == (6.0, 3.0, 9.0)
    assert made.layer is nn.Identity


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f():\n    from fewstep.core.noise import Noise\n    return Noise\n", "inside a definition"),
        ("def f():\n    return missing_name\n", "uses 'missing_name', which it neither defines nor imports"),
        ("g = 1\n", "has no top-level definition 'f'"),
    ],
)
def test_what_cannot_be_collected(body: str, message: str, tmp_path: Path) -> None:
    full = module_at(tmp_path, "zz_bad", body)
    source_of.cache_clear()  # type: ignore[attr-defined]
    try:
        with pytest.raises(InputError) as caught:
            Bundle().add(full, "f")
        assert message in str(caught.value)
    finally:
        sys.modules.pop(full, None)


def test_a_network_of_ones_own_is_not_ours_to_copy() -> None:
    @network("zz-own", ResMLPConfig)
    class Own(ResMLP):
        pass

    try:
        with pytest.raises(InputError, match="is no network of fewstep"):
            bundle_network(Own(ResMLPConfig((1, 4, 4), width=8, embedding=8, blocks=1)))
    finally:
        del NETWORKS["zz-own"]
    with pytest.raises(InputError, match="Linear cannot be written as a file: only"):
        bundle_network(nn.Linear(1, 1))


def bad_exports() -> list[tuple[object, object, dict[str, int], str]]:
    denoiser = edm(unet(), (1, 8, 8))
    table = heun(karras(2, 0.002, 80.0))
    good = scheduler(table)
    stock = diffusers.EulerDiscreteScheduler()
    return [
        (
            CFG(denoiser, 2.0),
            good,
            {},
            "a CFG cannot be written as a file: only a Precond can (take guidance off first)",
        ),
        (edm(nn.Linear(1, 1), (1,)), good, {}, "Linear cannot be written as a file"),
        (denoiser, stock, {}, "got path=None and prediction_type='epsilon'"),
        (denoiser, table, {}, "expected a scheduler of diffusers, got a Tableau"),
        (denoiser, good, {"classes": -1}, "classes must be 0 (none) or more, got -1"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_bad_exports_write_nothing(number: int, tmp_path: Path) -> None:
    denoiser, made, options, message = bad_exports()[number]
    with pytest.raises(InputError) as caught:
        write_custom_pipeline(denoiser, made, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_of_our_networks_can_be_bundled() -> None:
    ours = [cls for cls, _ in NETWORKS.values() if cls.__module__.startswith("fewstep.models.")]
    assert {UNet, ResMLP, GuidedUNet} <= set(ours)
    for cls in ours:
        bundle = Bundle()
        bundle.add(cls.__module__, cls.__name__)
        text = bundle.text(cls.__name__)
        compile(text, cls.__name__, "exec")
        assert "fewstep" not in imported(text)
