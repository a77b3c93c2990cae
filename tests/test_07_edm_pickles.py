"""Networks of EDM and EDM2 from files in their wire format, against numbers of the published implementations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fewstep
from edm_files import Stands, dump, edm2_tensors, levels, network_file, weights
from fewstep import Generator, InputError
from fewstep.core.denoiser import Precond
from fewstep.core.network import build_network, describe_network
from fewstep.sources.edm import load_edm

# (D - x) / sigma of the implementations that the papers published, on the weights and pictures made below: three
# pixels and the mean of each picture.
GOLDEN = {
    ("VPPrecond", "ddpmpp"): [0.30962, -0.58368, -0.74441, -0.19954, -0.18926, -0.20653],
    ("VPPrecond", "ncsnpp"): [0.56704, -0.25940, -1.17680, -0.10549, -0.11162, -0.11653],
    ("VPPrecond", "skip"): [-0.44370, 1.59001, -0.00821, 0.29453, 0.29314, 0.28671],
    ("VPPrecond", "adm"): [0.42383, 0.31396, 0.37188, 0.67158, 0.65885, 0.72109],
    ("VEPrecond", "ddpmpp"): [-0.31597, 0.46856, 0.45735, 0.20225, 0.17254, -0.01808],
    ("VEPrecond", "ncsnpp"): [-0.53917, 0.17713, 1.37015, 0.10391, 0.10904, 0.00307],
    ("VEPrecond", "skip"): [0.43999, -1.49848, 0.18612, -0.29639, -0.29083, -0.27674],
    ("VEPrecond", "adm"): [-0.38331, -0.35494, -0.19429, -0.67378, -0.66436, -0.75887],
    ("iDDPMPrecond", "ddpmpp"): [0.30826, -0.55959, -0.74798, -0.19741, -0.18319, -0.19964],
    ("iDDPMPrecond", "ncsnpp"): [0.58511, -0.18665, -1.18445, -0.10930, -0.10659, -0.11070],
    ("iDDPMPrecond", "skip"): [-0.44910, 1.59020, -0.01570, 0.29232, 0.28713, 0.28587],
    ("iDDPMPrecond", "adm"): [0.31538, 0.24640, 0.35243, 0.66625, 0.64591, 0.72229],
    ("EDMPrecond", "ddpmpp"): [-0.18128, 1.82144, 0.22620, 0.17846, 0.08075, 0.01159],
    ("EDMPrecond", "ncsnpp"): [-0.58441, 1.70359, 0.23674, 0.11242, 0.04972, 0.00940],
    ("EDMPrecond", "skip"): [0.37898, 0.91170, 0.20764, -0.29910, -0.12953, -0.00056],
    ("EDMPrecond", "adm"): [-0.38045, 1.44340, 0.19945, -0.69375, -0.29524, -0.01102],
    ("Precond", "edm2"): [-0.03847, 1.60646, 0.19327, -0.12163, -0.05388, 0.00642],
    ("Precond", "edm2 options"): [0.05359, 1.56744, 0.19994, -0.12934, -0.05699, 0.00383],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("edm")
    yield place
    assert not list(place.glob("*.ran")), "source code in a file was executed"


@pytest.fixture(scope="module")
def generators(folder: Path) -> dict[tuple[str, str], Generator]:
    """One of each kind, read from its file."""
    made = {}
    for case in GOLDEN:
        loss = Stands("EDMLoss", {"P_mean": -1.2})
        path = dump(folder / f"{'-'.join(case).replace(' ', '-')}.pkl", {"ema": network_file(*case), "loss_fn": loss})
        made[case] = load_edm(path)
    return made


def pictures() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    sigma = torch.tensor([0.05, 1.0, 20.0])
    waves = torch.sin(1.3 * torch.arange(3 * 3 * 64, dtype=torch.float64)).reshape(3, 3, 8, 8)
    x = (waves * (1 + sigma.double()[:, None, None, None])).float()
    augment = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.5, 0.0]])
    return x, sigma, {"label": torch.tensor([1, -1, 2]), "augment": augment}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_the_denoiser_says_what_the_published_one_says(
    case: tuple[str, str], generators: dict[tuple[str, str], Generator]
) -> None:
    x, sigma, cond = pictures()
    if case[0] == "Precond":
        del cond["augment"]
    out = (generators[case].denoiser(x, sigma, cond) - x) / sigma[:, None, None, None]
    found = torch.stack([out[0, 0, 0, 0], out[1, 1, 3, 4], out[2, 2, 7, 7], *out.mean((1, 2, 3))])
    # The division by the lowest level magnifies what float32 leaves of D - x.
    assert (found - torch.tensor(GOLDEN[case])).abs().max() < 4e-5


def test_nothing_of_the_condition_is_the_zero_vector(generators: dict[tuple[str, str], Generator]) -> None:
    x, sigma, _ = pictures()
    for case in (("EDMPrecond", "ncsnpp"), ("VPPrecond", "adm"), ("Precond", "edm2")):
        D = generators[case].denoiser
        base = D(x, sigma)
        assert torch.equal(base, D(x, sigma, {"label": torch.full((3,), -1)}))
        far = (D(x, sigma, {"label": torch.tensor([0, -1, 2])}) - base).abs().amax((1, 2, 3))
        assert far[1] == 0 and far[0] > 1e-3 and far[2] > 1e-3
        if case[0] != "Precond":
            assert torch.equal(base, D(x, sigma, {"augment": torch.zeros(3, 2)}))
            assert not torch.equal(base, D(x, sigma, {"augment": torch.ones(3, 2)}))


@pytest.mark.parametrize("case", [("VPPrecond", "adm"), ("iDDPMPrecond", "ncsnpp"), ("Precond", "edm2 options")])
def test_a_saved_generator_is_the_same_bit_for_bit(
    case: tuple[str, str], generators: dict[tuple[str, str], Generator], tmp_path: Path
) -> None:
    gen = generators[case]
    again = Generator.load(gen.save(tmp_path))
    x, sigma, cond = pictures()
    label = {"label": cond["label"]}
    assert torch.equal(again.denoiser(x, sigma, label), gen.denoiser(x, sigma, label))
    assert again.card == gen.card and again.fingerprint() == gen.fingerprint()
    assert torch.equal(again.sampler.sigmas, gen.sampler.sigmas)


def test_levels_sampler_classes_and_card(generators: dict[tuple[str, str], Generator]) -> None:
    ranges = {"VPPrecond": (1e-3, 152.1), "VEPrecond": (0.02, 100.0), "EDMPrecond": (0.002, 80.0)}
    for (precond, _), gen in generators.items():
        D = gen.denoiser
        if precond in ranges:
            assert (D.sigma_min, D.sigma_max) == ranges[precond]
            assert gen.sampler.start == min(80.0, D.sigma_max)
            assert gen.sampler.levels[-2] == max(0.002, D.sigma_min)
        assert gen.sampler.nfe == (63 if precond == "Precond" else 35) and gen.sampler.end == 0
        assert gen.conds.frequencies == (1.0, 1.0, 1.0)
        assert gen.card["class"] == precond and gen.card["key"] == "ema" and len(gen.card["sha256"]) == 64
        assert not D.training and not any(p.requires_grad for p in D.parameters())
    gen = generators["iDDPMPrecond", "ddpmpp"]
    table = levels()[:-1].flip(0).double()
    assert (gen.denoiser.path.levels / table - 1).abs().max() < 1e-9
    far = (gen.sampler.sigmas[:, None] / table - 1).abs().amin(1)
    assert far.max() < 1e-9, "iDDPM is sampled at its trained levels"
    assert gen.sample(2, batch=2, progress=False).shape == (2, 3, 8, 8)


def test_every_tap_has_its_place(generators: dict[tuple[str, str], Generator]) -> None:
    x, sigma, _ = pictures()
    for case in (("EDMPrecond", "ncsnpp"), ("EDMPrecond", "adm"), ("Precond", "edm2")):
        D = generators[case].denoiser
        assert set(D.taps) == {"bottleneck", "encoder8", "encoder4", "decoder8", "decoder4"}
        out, found = D.features(x, sigma, None, sorted(D.taps))
        assert torch.equal(out, D(x, sigma))
        heights = {name: value.shape[-1] for name, value in found.items()}
        assert heights == {name: 8 if name.endswith("8") else 4 for name in D.taps}


def test_half_precision_keeps_the_frequencies(folder: Path, generators: dict[tuple[str, str], Generator]) -> None:
    x, sigma, _ = pictures()
    for case in (("EDMPrecond", "ncsnpp"), ("Precond", "edm2")):
        full = generators[case].denoiser
        half = load_edm(folder / f"{'-'.join(case)}.pkl", dtype=torch.bfloat16).denoiser
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in half.buffers()} == {torch.float32}
        far = (half(x, sigma) - full(x, sigma)).abs().max()
        assert 0 < far < 0.1 * full(x, sigma).abs().max()


SMALL = {"shape": (1, 4, 4), "classes": 3, "channels": 8, "multipliers": (1,), "blocks": 1, "attention": ()}
FRESH = {
    "song-unet": {"embedding": "fourier", "encoder": "residual", "filter": (1, 3, 3, 1), "multipliers": (1, 2)},
    "adm": {"head_channels": 8},
    "edm2-unet": {"head_channels": 8, "logvar_channels": 0},
}


@pytest.mark.parametrize("kind", FRESH)
def test_fresh_networks_start_silent_and_learn(kind: str) -> None:
    torch.manual_seed(0)
    net = build_network({"kind": kind, **SMALL, **FRESH[kind]}).train()
    x, time, label = torch.randn(4, 1, 4, 4), torch.linspace(-1, 1, 4), {"label": torch.tensor([0, 1, 2, -1])}
    assert net(x, time, label).abs().max() == 0
    losses = []
    for _ in range(12):
        # Twice in one step, as methods with two passes do.
        loss = ((net(x, time, label) + net(x, time, label)) / 2 - x).square().mean()
        grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        with torch.no_grad():
            for p, grad in zip(net.parameters(), grads, strict=True):
                p -= 0 if grad is None else 0.01 * grad.sign()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_training_keeps_the_weights_of_edm2_at_unit_magnitude(generators: dict[tuple[str, str], Generator]) -> None:
    net = build_network(describe_network(generators["Precond", "edm2"].denoiser.net))
    weight = net.decoder["4_in0"].conv1.weight
    before = weight.detach().clone().mul_(3)
    weight.data.mul_(3)
    x, time = torch.randn(2, 3, 8, 8), torch.zeros(2)
    net.eval()(x, time, {})
    assert torch.equal(weight, before)
    net.train()(x, time, {})
    assert (weight.square().mean((1, 2, 3)).sqrt() - 1).abs().max() < 1e-3


def test_the_head_for_the_loss_is_kept(generators: dict[tuple[str, str], Generator]) -> None:
    net = generators["Precond", "edm2"].denoiser.net
    made = weights(edm2_tensors("edm2"), [1, 1])
    time = torch.tensor([-0.5, 0.3])
    waves = (time[:, None] * made["logvar_fourier.freqs"] + made["logvar_fourier.phases"]).cos() * math.sqrt(2)
    row = made["logvar_linear.weight"][0]
    row = row / (row.square().mean().sqrt() + 1e-4) / math.sqrt(8)
    assert (net.log_variance(time) - waves @ row).abs().max() < 1e-6


def test_a_bare_network_and_another_key_are_found(folder: Path) -> None:
    made = network_file("VEPrecond", "skip")
    bare = load_edm(dump(folder / "bare.pkl", made))
    other = load_edm(dump(folder / "other.pkl", {"net": made}), key="net")
    x, sigma, _ = pictures()
    assert torch.equal(bare.denoiser(x, sigma), other.denoiser(x, sigma))
    assert isinstance(bare.denoiser, Precond) and other.card["key"] == "net"


def test_latents_are_decoded_by_the_autoencoder_that_is_given(folder: Path) -> None:
    import numpy as np

    state = {"vae_name": "some/vae", "scale": np.float32([0.5, 0.25]), "bias": np.float32([0.0, 1.0]), "_vae": None}
    content = {"ema": network_file("Precond", "edm2"), "encoder": Stands("StabilityVAEEncoder", state)}
    place = dump(folder / "latent.pkl", content)
    without = load_edm(place)
    with pytest.raises(InputError, match="makes latents of some/vae: pass vae="):
        without.decode(torch.zeros(1, 2, 4, 4))
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=2,
        norm_num_groups=4,
    ).eval()
    vae.save_pretrained(folder / "vae")
    made = load_edm(place, vae=folder / "vae")
    latents = torch.randn(1, 2, 4, 4)
    raw = (latents - torch.tensor([0.0, 1.0]).reshape(2, 1, 1)) / torch.tensor([0.5, 0.25]).reshape(2, 1, 1)
    # Pictures in [0, 1] went into this autoencoder and come out of it.
    assert (made.decode(latents) - (vae.decode(raw).sample * 2 - 1)).abs().max() < 1e-5
    pictures_in = torch.rand(1, 3, 32, 32) * 2 - 1
    inner = vae.encode((pictures_in + 1) / 2).latent_dist.mean
    wanted = inner * torch.tensor([0.5, 0.25]).reshape(2, 1, 1) + torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    assert made.codec is not None and (made.codec.encode(pictures_in) - wanted).abs().max() < 1e-5
    kept = fewstep.load(made.save(folder / "kept"))
    assert torch.equal(kept.decode(latents), made.decode(latents))
    with pytest.raises(InputError, match="a network of pictures: it cannot take vae="):
        load_edm(dump(folder / "pictures.pkl", {"ema": network_file("VEPrecond", "ddpmpp")}), vae=folder / "vae")


def changed(**fields: Any) -> Stands:
    made = network_file("VEPrecond", "ddpmpp")
    made.state |= fields
    return made


def broken(what: str) -> Any:
    """A file with one thing wrong."""
    made = network_file("VEPrecond", "ddpmpp")
    net = made.state["_modules"]["model"]
    layers = net.state["_modules"]
    if what == "class":
        made.class_name = "FlowPrecond"
    elif what == "network":
        net.class_name = "Transformer"
    elif what == "option":
        net.state["_init_kwargs"]["num_block"] = 2
    elif what == "unrecorded":
        net.state["_init_kwargs"] = None
    elif what == "missing":
        del layers["map_layer0"]
    elif what == "extra":
        layers["map_more"] = layers["map_layer0"]
    elif what == "misshapen":
        layers["map_layer0"].state["_parameters"]["bias"] = torch.zeros(3)
    elif what == "nan":
        layers["map_layer0"].state["_parameters"]["bias"] = torch.full((32,), math.nan)
    elif what == "filter":
        layers["dec"]._modules["8x8_up"].state["_modules"]["conv0"].state["_buffers"]["resample_filter"] += 1
    elif what == "no model":
        made.state["_modules"] = {}
    elif what == "width":
        net.state["_init_kwargs"]["model_channels"] = "wide"
    elif what == "encoder":
        net.state["_init_kwargs"]["encoder_type"] = "residul"
    return made


BROKEN = {
    "class": "unknown preconditioning in",
    "network": "unknown network in",
    "option": "unknown option of the SongUNet in",
    "unrecorded": "does not say which options it was made with",
    "missing": "holds another architecture: missing layer1.bias",
    "extra": "unknown map_more.bias",
    "misshapen": r"shapes differ: layer1.bias is (3,), expected (32,)",
    "nan": "its weight layer1.bias is not finite",
    "filter": "conv0.resample_filter is another filter than (1, 1)",
    "no model": "has no network 'model'",
    "width": "is not laid out as EDM's are",
    "encoder": "did you mean 'residual'?",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_belong_is_named(folder: Path, what: str) -> None:
    path = dump(folder / f"broken-{what.replace(' ', '-')}.pkl", {"ema": broken(what)})
    with pytest.raises(InputError) as error:
        load_edm(path)
    assert (BROKEN[what] in str(error.value) and path.name in str(error.value)) or what == "encoder"


def test_bad_calls_are_named(folder: Path, tmp_path: Path) -> None:
    path = dump(tmp_path / "net.pkl", {"ema": changed(), "G": changed(), "step": 3})
    with pytest.raises(InputError, match=r"no network under 'net': pass key= one of \['G', 'ema'\]"):
        load_edm(path, key="net")
    with pytest.raises(InputError, match="dtype must be a floating type"):
        load_edm(path, dtype=torch.int64)
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        load_edm(path, device="gpu")
    with pytest.raises(InputError, match="sigma_max is 'high', expected a number"):
        load_edm(dump(path, {"ema": changed(sigma_max="high")}))
    with pytest.raises(InputError, match="0 < sigma_min < sigma_max"):
        load_edm(dump(path, {"ema": changed(sigma_max=0.01)}))
    with pytest.raises(InputError, match="holds a list: expected a dictionary with a network under 'ema'"):
        load_edm(dump(path, [1]))
    with pytest.raises(InputError, match="no network under 'ema': it holds no networks"):
        load_edm(dump(path, {"step": 3}))
    vp = network_file("VPPrecond", "ddpmpp")
    vp.state["M"] = 500
    with pytest.raises(InputError, match="VPPrecond with M = 500 is not known, expected 1000"):
        load_edm(dump(path, {"ema": vp}))
    iddpm = network_file("iDDPMPrecond", "ddpmpp")
    iddpm.state["_buffers"]["u"] = torch.ones(5)
    with pytest.raises(InputError, match="the levels u of its iDDPMPrecond must fall to 0"):
        load_edm(dump(path, {"ema": iddpm}))


def test_conditions_that_do_not_belong_are_refused(generators: dict[tuple[str, str], Generator]) -> None:
    x, sigma, _ = pictures()
    D = generators["EDMPrecond", "ddpmpp"].denoiser
    with pytest.raises(InputError, match=r"'augment' is \(3, 5\), expected \(3, 2\)"):
        D(x, sigma, {"augment": torch.zeros(3, 5)})
    with pytest.raises(RuntimeError, match="out of bounds"):
        D(x, sigma, {"label": torch.tensor([0, 1, 3])})
    for kind in ("song-unet", "adm", "edm2-unet"):
        net = build_network({"kind": kind, "shape": (1, 8, 8), "channels": 8, "multipliers": (1,), "blocks": 1})
        with pytest.raises(InputError, match="has no classes"):
            net(torch.zeros(1, 1, 8, 8), torch.zeros(1), {"label": torch.zeros(1, dtype=torch.int64)})


CONFIGS = [
    ("song-unet", {"shape": (3, 30, 30), "multipliers": (1, 2, 2)}, "30x30 cannot be halved 2 times"),
    ("song-unet", {"embedding": "fourrier"}, "did you mean 'fourier'"),
    ("song-unet", {"decoder": "residual"}, "unknown decoder of a Song U-Net"),
    ("song-unet", {"filter": (1, 2, 1)}, "even number of weights"),
    ("song-unet", {"channels": 34}, "34 channels cannot be split into 8 groups"),
    ("adm", {"channels": 33}, "cannot have channels=33"),
    ("adm", {"blocks": 0}, "at least 1 block"),
    ("adm", {"multipliers": ()}, "at least one multiplier"),
    ("adm", {"head_channels": 0}, "at least 1 channel"),
    ("edm2-unet", {"label_balance": 1.5}, "label_balance is a share in [0, 1], got 1.5"),
    ("edm2-unet", {"classes": -1}, "cannot have classes=-1"),
    ("edm2-unet", {"filter": ()}, "even number of weights"),
]


@pytest.mark.parametrize(("kind", "fields", "said"), CONFIGS)
def test_impossible_sizes_are_named(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        build_network({"kind": kind, **fields})
    assert said in str(error.value)
