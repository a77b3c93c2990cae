"""Networks that are told more than the time: on every kind of network, in every way that networks are used."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Precond, build_denoiser, edm
from fewstep.core.exact import Mixture
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import DDPM, FLOW, widen
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.guide import CFG
from fewstep.models import (
    ADM,
    ADMConfig,
    EDM2Config,
    EDM2UNet,
    GuidedUNet,
    GuidedUNetConfig,
    KUNet,
    KUNetConfig,
    ResMLP,
    ResMLPConfig,
    SongUNet,
    SongUNetConfig,
    UNet,
    UNetConfig,
)
from fewstep.models.checkpointing import checkpointed
from fewstep.models.extended import Extended, extended
from fewstep.models.flow_map import UNTIL, Clipped, Told, flow_map, jump, landing
from fewstep.models.frozen import Frozen, frozen, network_under, nulls_of
from fewstep.models.lora import LoRA, merge, share
from fewstep.solve.consistency import consistency, tcd
from fewstep.solve.dpmpp import dpmpp
from fewstep.solve.euler import euler
from fewstep.solve.heun import heun
from tiny_runs import tiny

SHAPE = (3, 8, 8)
Known = tuple[Precond, dict[str, Tensor]]
NETS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet(UNetConfig(SHAPE, 3, 8, (1, 2), 1, (4,), 0.0)),
    "resmlp": lambda: ResMLP(ResMLPConfig(SHAPE, 3, 16, 8, 1)),
    "song": lambda: SongUNet(SongUNetConfig(SHAPE, 3, channels=8, multipliers=(1, 2), blocks=1, attention=(4,))),
    "song residual": lambda: SongUNet(
        SongUNetConfig(
            SHAPE, 3, channels=8, multipliers=(1, 2), blocks=1, attention=(), embedding="fourier", encoder="residual"
        )
    ),
    "adm": lambda: ADM(ADMConfig(SHAPE, 3, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=8)),
    "edm2": lambda: EDM2UNet(
        EDM2Config(SHAPE, 3, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=8)
    ),
    "guided": lambda: GuidedUNet(
        GuidedUNetConfig(SHAPE, 3, channels=32, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=32)
    ),
    "k-unet": lambda: KUNet(KUNetConfig(SHAPE, 32, (1, 1), (64, 64), (False, True))),
}
TEXT = {"prompt_embeds": (5, 8)}
MASKED = {**TEXT, "prompt_attention_mask": (5,)}
ATTENDING: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 2}
SMALL: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
# The class of a network of diffusers, a tiny configuration, and the shapes of what it reads.
STOCK: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "ddpm": (
        "UNet2DModel",
        {
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
        },
        {},
    ),
    "stable diffusion": (
        "UNet2DConditionModel",
        {
            **SMALL,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
        },
        TEXT,
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**ATTENDING, "in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 9},
        {"label": ()},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **ATTENDING,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 8,
            "cross_attention_dim": 12,
            "use_additional_conditions": False,
        },
        MASKED,
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **ATTENDING,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        {**TEXT, "pooled_prompt_embeds": (16,)},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            **ATTENDING,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 6,
            "cross_attention_dim": 12,
            "caption_channels": 8,
            "sample_size": 8,
            "patch_size": 1,
        },
        MASKED,
    ),
}


def own(name: str) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NETS[name]()
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return replace(tiny(), denoiser=edm(net.eval().requires_grad_(False), SHAPE), conds=None)


def stock(name: str) -> Generator:
    pytest.importorskip("diffusers")
    from fewstep.models import DiffusersConfig, DiffusersNet
    from tiny_models import randomised

    kind, config, _ = STOCK[name]
    net = randomised(DiffusersNet(DiffusersConfig(kind, config)), 3)
    flow = kind in ("SD3Transformer2DModel", "SanaTransformer2DModel")
    named: dict[str, Any] = {"path": FLOW, "predicts": "velocity", "time": "native*1000"} if flow else {}
    named = named or {"path": DDPM, "predicts": "noise", "sigma_min": 0.0101, "sigma_max": 157.0}
    return replace(tiny(), denoiser=Precond(net, (4, 8, 8), **named), conds=None)


def conditions(name: str, n: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    if name in NETS:
        return {} if name == "k-unet" else {"label": torch.arange(n) % 3}
    made = {key: torch.randn(n, *shape, generator=g) for key, shape in STOCK[name][2].items()}
    made |= {"label": torch.arange(n)} if "label" in made else {}
    return made | ({"prompt_attention_mask": torch.ones(n, 5)} if "prompt_attention_mask" in made else {})


def points(D: Precond, n: int = 3) -> tuple[Tensor, Tensor]:
    sigma = torch.tensor([0.3, 2.0, 9.0])[:n].double()
    return (1 + sigma**2).sqrt().float()[:, None, None, None] * torch.randn(
        n, *D.shape, generator=torch.Generator().manual_seed(2)
    ), sigma


def taught(D: Precond, seed: int = 3) -> Precond:
    """A copy whose terms are no longer zero."""
    made = copy.deepcopy(D)
    g = torch.Generator().manual_seed(seed)
    for p in made.net.terms.parameters():  # type: ignore[union-attr]
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return made


@pytest.fixture(scope="module", params=[*NETS, *STOCK])
def teacher(request: pytest.FixtureRequest) -> Known:
    name = request.param
    return network_under((own if name in NETS else stock)(name).denoiser), conditions(name)


def test_a_two_time_student_starts_as_the_teacher_and_reads_the_level_once_it_is_trained(teacher: Known) -> None:
    D, cond = teacher
    x, sigma = points(D)
    hooks = sum(len(module._forward_hooks) for module in D.modules())
    with torch.no_grad():
        said = D(x, sigma, cond)
        student = flow_map(D)
        for until in (torch.zeros(3), sigma.float(), torch.tensor([0.1, 1e8, 0.0])):
            assert torch.equal(student(x, sigma, {**cond, UNTIL: until}), said), "bit for bit at the start"
        assert torch.equal(student(x, sigma, cond), said)
        assert sum(len(module._forward_hooks) for module in D.modules()) == hooks, "the teacher is left as it was"
        other = taught(student)
        a, b = (other(x, sigma, {**cond, UNTIL: torch.tensor(v)}) for v in ([0.1, 0.1, 0.1], [0.1, 1.0, 0.1]))
        far = (a - b).flatten(1).abs().amax(1)
        assert far[1] > 1e-3 * float(a.abs().max()) and max(far[0], far[2]) < 1e-5 * float(a.abs().max()), far
        assert torch.equal(other(x, sigma, cond), said), "a number that is not told adds nothing"
        assert torch.equal(student(x, sigma, {**cond, UNTIL: torch.zeros(3)}), said), "copies are independent"
    assert student.net.net is not D.net and {p.data_ptr() for p in student.net.net.parameters()} == {
        p.data_ptr() for p in D.net.parameters()
    }, "the weights themselves stand in memory once"
    again = build_denoiser(other.describe())
    again.load_state_dict(other.state_dict())  # type: ignore[attr-defined]
    again.eval()  # type: ignore[attr-defined]
    told = {**cond, UNTIL: torch.tensor([0.1, 1.0, 0.1])}
    with torch.no_grad():
        assert torch.equal(again(x, sigma, told), b)
    if D.taps:
        tap = next(iter(D.taps))
        with torch.no_grad():
            a, b = (d.features(x, sigma, c, [tap])[1][tap] for d, c in ((student, told), (D, cond)))
        assert torch.equal(a, b)


def gradients(D: Precond, cond: dict[str, Tensor], twice: bool = False) -> list[Tensor]:
    x, sigma = points(D)
    D.requires_grad_(True)
    untils = (torch.tensor([0.1, 1.0, 0.1]), torch.tensor([0.2, 0.0, 3.0]))
    made = D(x, sigma, {**cond, UNTIL: untils[0]})
    loss = made.square().mean()
    if twice:
        # A later call on the output of the first one, so that the two are told different levels in one graph.
        loss = loss + D(made, sigma, {**cond, UNTIL: untils[1]}).square().mean()
    found = torch.autograd.grad(loss, list(D.parameters()), allow_unused=True)
    D.requires_grad_(False)
    return [torch.zeros(1) if g is None else g for g in found]


def test_checkpointing_gives_the_same_gradients(teacher: Known) -> None:
    D, cond = taught(flow_map(teacher[0])), teacher[1]
    plain = gradients(D, cond, twice=True)
    with checkpointed([D]):
        again = gradients(D, cond, twice=True)
    size = max(float(g.abs().max()) for g in plain)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, again, strict=True)) < 1e-5 * size
    terms = [float(g.abs().max()) for (n, _), g in zip(D.named_parameters(), plain, strict=True) if "terms" in n]
    assert min(terms) > 0, "every weight that reads the level has a gradient"


def test_forward_mode_agrees_with_differences_in_the_level(teacher: Known) -> None:
    if any(type(m).__name__ == "UNet2DModel" for m in teacher[0].modules()):
        pytest.skip("torch's forward-mode group norm fails on the transposed input of this network's attention")
    D = taught(flow_map(teacher[0])).double()
    x, sigma = points(D)
    x, cond = x.double(), {k: v.double() if v.is_floating_point() else v for k, v in teacher[1].items()}
    at, step = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64), 1e-4

    def said(until: Tensor) -> Tensor:
        return D(x, sigma, {**cond, UNTIL: until})

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slope = torch.func.jvp(said, (at,), (torch.ones_like(at),))[1]
        moved = (said(at + step) - said(at - step)) / (2 * step)
    assert float(moved.detach().abs().max()) > 1e-5
    assert float((slope - moved).detach().abs().max()) < 2e-3 * float(moved.detach().abs().max())


def test_bfloat16_autocast_is_close_and_reads_the_level(teacher: Known) -> None:
    D = taught(flow_map(teacher[0]))
    x, sigma = points(D)
    told = {**teacher[1], UNTIL: torch.tensor([0.1, 1.0, 5.0])}
    with torch.no_grad():
        exact = D(x, sigma, told)
        with torch.autocast("cpu", torch.bfloat16):
            half = D(x, sigma, told)
    assert half.dtype == torch.float32
    far = float((half - exact).abs().max())
    assert 0 < far < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("name", ["unet", "dit", "stable diffusion"])
def test_lora_trains_what_reads_the_level(name: str) -> None:
    pytest.importorskip("peft")
    D = network_under((own if name in NETS else stock)(name).denoiser)
    told = flow_map(share(D, LoRA(rank=2)))
    student = copy.deepcopy(told)
    x, sigma = points(D)
    cond = {**conditions(name), UNTIL: torch.tensor([0.1, 1.0, 5.0])}
    with torch.no_grad():
        assert torch.allclose(student(x, sigma, cond), D(x, sigma, cond), atol=1e-5)
    optimizer = torch.optim.Adam(student.requires_grad_(True).parameters(), 0.05)
    assert any("terms" in n for n, _ in student.named_parameters())
    aim = widen(cond[UNTIL], x) * torch.ones_like(x)
    for _ in range(3):
        optimizer.zero_grad()
        (student(x, sigma, cond) - aim).square().mean().backward()
        optimizer.step()
    merged = merge(student.requires_grad_(False).eval())
    with torch.no_grad():
        said = merged(x, sigma, cond)
        assert torch.allclose(said, student(x, sigma, cond), atol=1e-4 * float(said.abs().max()))
        other = merged(x, sigma, {**cond, UNTIL: torch.tensor([3.0, 0.0, 0.1])})
        assert float((other - said).abs().max()) > 1e-4 * float(said.abs().max()), "the level is read after training"
    assert type(merged.net) is Extended


def test_two_numbers_at_once_and_one_after_the_other() -> None:
    D = own("unet").denoiser
    both, nested = extended(D, "scale", UNTIL), extended(extended(D, "scale"), UNTIL)
    assert extended(both, UNTIL) is both
    x, sigma = points(D)
    for made in (taught(both), taught(nested)):
        for p in made.net.modules():
            if isinstance(p, Extended):
                for q in p.terms.parameters():
                    q.data += 0.2 * torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            base = made(x, sigma, {"scale": torch.ones(3), UNTIL: torch.ones(3)})
            for name in ("scale", UNTIL):
                cond = {"scale": torch.ones(3), UNTIL: torch.ones(3), name: torch.full((3,), 4.0)}
                assert float((made(x, sigma, cond) - base).abs().max()) > 1e-3
    with pytest.raises(InputError, match=r"cond\['until'\] must be \(3,\), got \(2,\)"):
        both(x, sigma, {UNTIL: torch.ones(2)})
    blank = own("unet").denoiser
    blank.net.embeds = {}  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="UNet does not say where it embeds the time, so it cannot be told until"):
        extended(blank, UNTIL)


@pytest.mark.skipif(importlib.util.find_spec("torch._inductor") is None, reason="no compiler")
def test_a_compiled_student_says_the_same() -> None:
    D = taught(flow_map(own("resmlp").denoiser))
    x, sigma = points(D)
    compiled = torch.compile(D, backend="eager", fullgraph=False)
    for value in (0.1, 4.0):
        told = {UNTIL: torch.full((3,), value)}
        with torch.no_grad():
            assert torch.allclose(compiled(x, sigma, told), D(x, sigma, told), atol=1e-6)


def test_offloaded_it_says_the_same() -> None:
    pytest.importorskip("accelerate")
    from fewstep.models.offload import offloaded

    D = taught(flow_map(own("unet").denoiser))
    x, sigma = points(D)
    told = {UNTIL: torch.tensor([0.1, 1.0, 5.0])}
    with torch.no_grad():
        assert torch.equal(offloaded(D, "cpu")(x, sigma, told), D(x, sigma, told))


# ---- jumps, and samplers that tell their ends


class FlowG(nn.Module):
    """The exact flow map of Gaussian data as ``g``."""

    def __init__(self, problem: Mixture) -> None:
        super().__init__()
        self.problem, self.shape, self.sigma_data = problem, problem.shape, problem.sigma_data
        self.sigma_min, self.sigma_max = problem.sigma_min, problem.sigma_max

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
        t = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        s = cond[UNTIL].double()
        mean, v = self.problem.means[0], self.problem.variances[0]
        gain = ((v + widen(s, x) ** 2) / (v + widen(t, x) ** 2)).sqrt()
        there = mean + gain * (x - mean)
        k = widen(s / t, x)
        return torch.where(k == 1, self.problem(x, t), (there - k * x) / (1 - k).clamp(min=1e-300))


def exact() -> FlowG:
    g = torch.Generator().manual_seed(5)
    return FlowG(Mixture(torch.randn(1, 1, 2, 2, generator=g), 0.36))


def test_exact_jumps_compose_and_are_the_identity_where_they_end() -> None:
    g = exact()
    x = 10 * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s, low = (torch.tensor(v, dtype=torch.float64) for v in ([9.0, 3, 1, 0.1], [4.0, 3, 0.2, 0.05], [0.01] * 4))
    assert torch.equal(jump(g, x, s, s), x)
    there = jump(g, jump(g, x, t, s), s, low)
    assert float((there - jump(g, x, t, low)).abs().max()) < 1e-12
    assert (
        float((there - torch.cat([g.problem.flow(x[k : k + 1], float(t[k]), 0.01) for k in range(4)])).abs().max())
        < 1e-12
    )
    at_end = g(x, t, {UNTIL: t})
    assert float((at_end - torch.cat([g.problem(x[k : k + 1], t[k]) for k in range(4)])).abs().max()) < 1e-12


@pytest.mark.parametrize("make", [euler, lambda s: tcd(s, gamma=0.3), consistency], ids=["euler", "tcd", "consistency"])
def test_landing_tells_the_level_that_each_step_comes_down_to(make: Callable[..., Any]) -> None:
    levels = torch.tensor([20.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    g, table = exact(), make(levels)
    seen: list[tuple[float, float]] = []

    class Watch(FlowG):
        def forward(self, x: Tensor, sigma: Tensor | float, cond: Any = None) -> Tensor:
            seen.append((float(sigma), float(cond[UNTIL][0])))
            return super().forward(x, sigma, cond)

    x = 20 * torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = table(landing(Watch(g.problem), table), x, noise=Noise.of(0, len(x)))
    assert [a for a, _ in seen] == [20.0, 3.0, 0.5]
    down = [float(table.P[k, 0] * levels[k]) for k in range(3)]
    assert [s for _, s in seen] == pytest.approx(down, rel=1e-6)
    if make is euler:
        assert down == pytest.approx([3.0, 0.5, 0.0])
    # Each step is exact and its noise brings the level back, so that all samplers draw the data.
    assert float((made.mean(0) - g.problem.means[0]).abs().max()) < 0.06
    assert float((made.std(0) - 0.6).abs().max()) < 0.03
    floor = landing(g, table, 0.002)
    assert floor.values[-1] == 0.002 and min(floor.values) == 0.002


@pytest.mark.parametrize("make", [heun, lambda s: dpmpp(s, 2)])
def test_samplers_of_more_than_single_steps_cannot_tell(make: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="expected single steps, such as those of euler"):
        landing(exact(), make(karras(4, 0.002, 80)))


def test_told_and_clipped_are_saved_compose_with_guidance_and_are_not_exported(tmp_path: Path) -> None:
    start = tiny()
    table = euler(karras(3, 0.002, 80))
    D = taught(flow_map(start.network))  # type: ignore[arg-type]
    for k, wrap in enumerate((lambda d: landing(d, table), lambda d: Clipped(landing(d, table), 0.7))):
        made = replace(start, denoiser=wrap(D), sampler=table)
        again = Generator.load(made.save(tmp_path / str(k)))
        assert type(again.denoiser) is type(made.denoiser) and again.fingerprint() == made.fingerprint()
        assert torch.equal(again.sample(4, progress=False), made.sample(4, progress=False))
        guided = replace(made, denoiser=CFG(made.denoiser, 3.0))
        back = Generator.load(guided.save(tmp_path / f"g{k}"))
        assert torch.equal(back.sample(4, progress=False), guided.sample(4, progress=False))
        assert not torch.equal(guided.sample(4, progress=False), made.sample(4, progress=False))
        with pytest.raises(InputError, match=r"(Told|Clipped).* cannot be exported: expected a Precond"):
            made.to_diffusers(tmp_path / "out")
    x = 5 * torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    D.requires_grad_(False)
    bare, kept = D(x, 2.0, {UNTIL: torch.zeros(4)}), Clipped(Told(D, UNTIL, [0.0]), 0.1)(x, 2.0)
    assert torch.equal(kept, bare.clamp(-0.1, 0.1)) and float(bare.abs().max()) > 0.1
    per_sample = Told(D, UNTIL, [0.3, 0.0], [2.0, 0.1])(x, torch.tensor([2.0, 0.1, 1.9, 0.11]))
    want = D(x, torch.tensor([2.0, 0.1, 1.9, 0.11]), {UNTIL: torch.tensor([0.3, 0.0, 0.3, 0.0])})
    assert torch.equal(per_sample, want)
    said = Told(D, UNTIL, [0.3])(x, 2.0, {UNTIL: torch.ones(4)})
    assert torch.equal(said, D(x, 2.0, {UNTIL: torch.ones(4)})), "what the caller says is kept"
    with pytest.raises(InputError, match="until needs one value, or one for each of 2 levels, got 1"):
        Told(D, UNTIL, [1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="clipped to a positive limit, got 0"):
        Clipped(D, 0.0)


def test_a_frozen_teacher_tells_its_null_values() -> None:
    start = tiny()
    nulls = {"prompt_embeds": torch.zeros(2, 3)}
    calls: list[int] = []

    def late() -> dict[str, Tensor]:
        calls.append(1)
        return nulls

    role = frozen(Clipped(CFG(start.denoiser, 2.0, late), 1.0))
    assert isinstance(role, Frozen) and nulls_of(role) is nulls and nulls_of(role) is nulls and calls == [1]
    assert nulls_of(start.denoiser) is None and nulls_of(CFG(start.denoiser, 2.0)) is None
    with pytest.raises(InputError, match="Mixture has no weights to train"):
        frozen(exact().problem)
