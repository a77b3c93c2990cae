"""How tables run: parallel waves, live tensors, compilation, no wait for a device, and files of samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import CountingDenoiser, InputError, Mixture, Noise, Tableau, edm, sample
from fewstep.core.stored import load_sampler, save_sampler
from fewstep.core.tableau import Builder
from fewstep.grid import grid, karras
from fewstep.models import ResMLP, ResMLPConfig
from fewstep.solve import build, euler_ancestral


def problem() -> Mixture:
    generator = torch.Generator().manual_seed(0)
    return Mixture(torch.randn(3, 2, generator=generator, dtype=torch.float64), 0.2)


def forked() -> Tableau:
    """Two mid-points from one output, then a row that weighs both."""
    made = Builder(10.0)
    made.row(10.0, 4.0, {0: 0.4}, {0: 0.6})
    made.row(4.0, 2.0, {0: 0.2}, {0: 0.8})
    made.row(2.0, 1.0, {0: 0.1}, {0: 0.1, 1: 0.3, 2: 0.5})
    made.row(1.0, 0.0, {}, {3: 1.0})
    return made.build("forked")


def test_waves_are_the_rows_that_do_not_wait_for_each_other() -> None:
    table = forked()
    assert table.waves == (1, 2, 0, 1)
    assert (table.nfe, table.latency) == (4, 3)
    for name in ("dpmpp3m", "heun", "unipc", "euler_ancestral"):
        made = build(name, karras(5, 0.1, 10.0))
        assert set(made.waves) == {1} and made.latency == made.nfe


def test_a_wave_is_one_call_and_changes_nothing() -> None:
    D, x = CountingDenoiser(problem()), 10 * torch.randn(6, 2, dtype=torch.float64)
    cond = {"label": torch.tensor([0, 1, 2, 0, 1, -1])}
    steps: list[Any] = []
    together = sample(D, x, forked(), cond, parallel=True, on_step=steps.append)
    assert (D.nfe, D.images) == (3, 24)
    assert torch.allclose(together, sample(problem(), x, forked(), cond), rtol=1e-12)
    assert [s.k for s in steps] == [0, 1, 2, 3, 4]
    assert all(torch.allclose(s.denoised, problem()(s.point, s.level, cond)) for s in steps[:-1])


def test_waves_also_run_tables_with_noise_and_silent_rows() -> None:
    D, x, noise = problem(), 10 * torch.randn(4, 2, dtype=torch.float64), Noise.of(3, 4)
    made = Builder(10.0)
    made.row(None, 12.0, {0: 1.0}, {}, {0: 2.0})
    made.row(12.0, 4.0, {1: 0.4}, {1: 0.6})
    made.row(4.0, 2.0, {1: 0.2}, {1: 0.8})
    made.row(2.0, 1.0, {1: 0.1}, {1: 0.1, 2: 0.3, 3: 0.5})
    made.row(1.0, 0.0, {}, {4: 1.0}, {4: 0.1})
    table = made.build("mixed")
    assert table.waves == (1, 1, 2, 0, 1)
    plain = sample(D, x, table, noise=noise)
    assert torch.allclose(sample(D, x, table, noise=noise, parallel=True), plain, rtol=1e-12)


def test_a_thousand_ancestral_steps_hold_two_tensors() -> None:
    assert euler_ancestral(karras(1000, 0.01, 80.0)).live == 2
    assert build("dpmpp2m", karras(1000, 0.01, 80.0)).live == 3


@pytest.mark.parametrize("name", ["euler", "heun", "dpm3", "dpmpp3m", "ipndm4", "unipc"])
def test_compiled_loops_give_the_same_and_are_one_graph(name: str) -> None:
    table = build(name, grid("karras", 4, 0.1, 10.0))
    torch._dynamo.reset()
    x = 10 * torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoise(point: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        return torch.tanh(point / (1 + sigma))

    compiled = torch.compile(lambda start: sample(denoise, start, table), backend="eager", fullgraph=True)  # type: ignore[arg-type]
    assert torch.allclose(compiled(x), sample(denoise, x, table), rtol=1e-12)  # type: ignore[arg-type]


class _NoCopies(TorchDispatchMode):
    """Refuses what would make the host wait: reading a number, and copying from the host to a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if "_to_copy" in name and kwargs.get("device") is not None:
            assert args[0].device == torch.device(kwargs["device"]), f"{name} copies to {kwargs['device']}"
        assert "_local_scalar_dense" not in name or args[0].device.type == "cpu"
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["euler", "dpmpp2m", "heun", "unipc"])
def test_nothing_is_copied_to_the_device_during_a_run(name: str) -> None:
    """The network lies on the meta device, as on an accelerator: the host knows only shapes."""
    D = edm(ResMLP(ResMLPConfig((1, 4, 4), 0, 16, 8, 1)).to("meta"), (1, 4, 4))
    x = torch.empty(2, 1, 4, 4, device="meta")
    with _NoCopies():
        out = sample(D, x, build(name, karras(3, 0.01, 80.0)))
    assert out.shape == x.shape and out.device.type == "meta"


def test_samplers_as_files(tmp_path: Path) -> None:
    table = forked()
    assert save_sampler(table, tmp_path / "a.json") == tmp_path / "a.json"
    assert load_sampler(tmp_path / "a.json").to_json() == table.to_json()  # type: ignore[attr-defined]
    save_sampler(table, tmp_path / "folder")
    assert load_sampler(tmp_path / "folder").to_json() == table.to_json()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="does not exist"):
        load_sampler(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be stored"):
        save_sampler(object(), tmp_path / "b")  # type: ignore[arg-type]
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "sampler.json").write_text('{"format": "fewstep-sampler/1", "kind": "amd", "fields": {}}')
    with pytest.raises(InputError, match="unknown kind of sampler 'amd'"):
        load_sampler(tmp_path / "strange")
    (tmp_path / "strange" / "sampler.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="is not a sampler: expected format"):
        load_sampler(tmp_path / "strange")
