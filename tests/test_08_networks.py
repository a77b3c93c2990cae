"""Published networks, resizes, files of statistics and weights."""

from __future__ import annotations

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.core.cond import Batch
from fewstep.data import load_data
from fewstep.errors import InputError
from fewstep.measure import (
    Moments,
    Statistics,
    clean_fid_name,
    clip_score,
    cmmd,
    digits_extractor,
    evaluate,
    extractor,
    inception_extractor,
)
from fewstep.measure.foundation import CLIP, IMAGENET, clip_extractor, dino_extractor
from fewstep.measure.inception import Inception
from fewstep.measure.resize import clean, levels, pytorch, tf1
from fewstep.measure.weight_files import weights_file

torch.set_num_threads(1)
DIGITS = load_data("digits")
X = DIGITS.take(torch.arange(len(DIGITS))).x


def colour(n: int, side: int, seed: int = 0) -> torch.Tensor:
    """Pictures (n, 3, side, side) of whole levels in [-1, 1]."""
    drawn = torch.randint(256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return drawn / 127.5 - 1


class Photos:
    name, fingerprint = "photos", "photos"

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.shape = images, tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def take(self, ids: torch.Tensor) -> Batch:
        return Batch(self.images[ids], {})


def test_inception_has_the_published_tensors() -> None:
    with torch.device("meta"):
        state = Inception().state_dict()
    tensors = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(tensors) == 94 * 5 + 2
    # Those of torchvision's network without its auxiliary head, with 1008 classes in place of 1000.
    trained = [v for k, v in tensors.items() if not k.endswith(("running_mean", "running_var"))]
    assert sum(v.numel() for v in trained) == 23_834_568 + 8 * 2049
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["Mixed_6e.branch7x7dbl_5.conv.weight"].shape == (192, 192, 1, 7)


def test_inception_from_files_of_other_tools(tmp_path) -> None:
    torch.manual_seed(0)
    net = Inception().eval()
    # pytorch-fid's file holds the counters of training, safetensors of other tools do not.
    torch.save(net.state_dict(), tmp_path / "w.pth")
    found = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    (tmp_path / "w.pth").rename(path := tmp_path / f"pt_inception-{found[:8]}.pth")
    images = colour(2, 40)
    x = pytorch((images + 1) * 127.5, 299)
    with torch.no_grad():
        wanted = net(x / 127.5 - 1)
        classes = (wanted @ net.fc.weight.T).softmax(1)
    pixels = inception_extractor(path, resize="pytorch")
    features, logs = pixels.seen(images)
    assert (features - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (logs.exp() - classes).abs().max() <= 1e-4
    assert pixels.weights == found
    plain = {k: v.clone() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(plain, tmp_path / "w.safetensors")
    named = extractor(f"inception:{tmp_path / 'w.safetensors'}", (3, 40, 40))
    x = tf1((images + 1) * 127.5, 299)
    with torch.no_grad():
        wanted = net((x - 128) / 128)
    assert (named(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (named.resize, named.dim) == ("tf1", 2048)
    assert named.fingerprint != pixels.fingerprint
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=f"expected {found[:8]}: it is damaged or another file"):
        inception_extractor(path)


def test_inception_refuses_what_is_not_its_weights(tmp_path) -> None:
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(InputError, match=r"torchvision's Inception-v3 with 1000 classes"):
        inception_extractor(tmp_path / "torchvision.pth")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "part.pth")
    with pytest.raises(InputError, match="holds another architecture"):
        inception_extractor(tmp_path / "part.pth")

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"fc.weight": Trap()}, tmp_path / "trap.pth", pickle_module=pickle)
    with pytest.raises(InputError, match="which is not executed"):
        inception_extractor(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(InputError, match="unknown resize 'bilinear'"):
        inception_extractor(tmp_path / "part.pth", resize="bilinear")
    with pytest.raises(InputError, match="extractor 'inception' needs its weights"):
        extractor("inception", (3, 8, 8))


def test_dinov2_takes_the_class_token(tmp_path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).eval()
    model.save_pretrained(tmp_path)
    images = colour(3, 28)
    mean, deviation = (torch.tensor(v).reshape(1, 3, 1, 1) for v in IMAGENET)
    with torch.no_grad():
        wanted = model(pixel_values=((images + 1) / 2 - mean) / deviation).last_hidden_state[:, 0]
    network = dino_extractor(tmp_path, side=28)
    assert (network(images) - wanted).abs().max() <= 1e-5
    assert network(images[:, :1]).shape == (3, 16)
    assert extractor(f"dinov2:{tmp_path}", (3, 8, 8)).side == 224
    with pytest.raises(InputError, match="give a multiple of 14"):
        dino_extractor(tmp_path, side=30)
    with pytest.raises(InputError, match="cannot be opened as a Dinov2Model"):
        dino_extractor(tmp_path / "absent")


def tiny_clip(folder) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = {letter + end: 0 for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")}
    words |= {"<|startoftext|>": 0, "<|endoftext|>": 0}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=16).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    vision = size | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)


def test_clip_embeds_pictures_and_prompts(tmp_path) -> None:
    from transformers import CLIPModel

    tiny_clip(tmp_path / "clip")
    network = clip_extractor(tmp_path / "clip")
    images, prompts = colour(12, 16), ["a red fox", "b", "a long prompt of more words than the network reads"] * 4
    mean, deviation = (torch.tensor(v).reshape(1, 3, 1, 1) for v in CLIP)
    with torch.no_grad():
        model = CLIPModel.from_pretrained(tmp_path / "clip").eval()
        words = network.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        seen = model(**words, pixel_values=((images + 1) / 2 - mean) / deviation)
    assert (network(images) - seen.image_embeds).abs().max() <= 1e-5
    assert (network.text(prompts) - seen.text_embeds).abs().max() <= 1e-5
    data = Photos(colour(20, 16, 1))
    scores = evaluate(
        images, data, metrics=("cmmd", "clip_score"), extractor=f"clip:{tmp_path / 'clip'}", prompts=prompts,
        batch=5, cache=tmp_path,
    )  # fmt: skip
    assert scores["cmmd@12"] == pytest.approx(cmmd(network(images), network(data.images)).value, rel=1e-4)
    fit = (seen.image_embeds * seen.text_embeds).sum(1).clamp(min=0).mean().item() * 100
    assert scores["clip_score@12"] == pytest.approx(fit, rel=1e-4)
    assert clip_score(network(images), network.text(prompts)).value == pytest.approx(fit, rel=1e-4)
    for given, message in ((prompts[:9], "9 prompts for 10 images"), ([*prompts, "c"], "13 prompts for 12 images")):
        with pytest.raises(InputError, match=message):
            evaluate(
                images, data, metrics="clip_score", extractor=network, prompts=given, batch=5, cache=tmp_path
            )  # fmt: skip
    with pytest.raises(InputError, match="'clip_score' got no prompts"):
        evaluate(images, data, metrics="clip_score", extractor=network, cache=tmp_path)
    with pytest.raises(InputError, match="'cmmd' got extractor 'pixel'"):
        evaluate(images, data, metrics="cmmd", extractor="pixel", cache=tmp_path)


def test_resizes() -> None:
    grid = torch.arange(256.0).reshape(1, 1, 16, 16)
    assert torch.equal(levels(grid / 127.5 - 1)[:, :1], grid)
    for side in (41, 9):
        wanted = np.asarray(Image.fromarray(grid[0, 0].numpy()).resize((side, side), Image.Resampling.BICUBIC))
        assert np.abs(clean(grid, side)[0, 0].numpy() - wanted).max() < 1e-2
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    # Place i of 16 lies at i / 2, and nothing lies behind the last pixel.
    assert (tf1(ramp, 16)[0, 0, 0] - (torch.arange(16.0) / 2).clamp(max=7)).abs().max() < 1e-5


def test_statistics_files(tmp_path) -> None:
    network = digits_extractor()
    Statistics.of(Moments.of(network(X)), network, "digits").save(tmp_path / "s.npz")
    got = evaluate(X[:300].flip(3), tmp_path / "s.npz", metrics="fd", extractor=network)
    wanted = evaluate(X[:300].flip(3), DIGITS, metrics="fd", cache=tmp_path)
    assert got["fd@300"] == pytest.approx(wanted["fd@300"], rel=1e-9)
    assert got.facts["reference_n"] == 1797
    assert got.facts["fingerprint"] == network.fingerprint
    with pytest.raises(InputError, match="made with fingerprint"):
        evaluate(X[:300], tmp_path / "s.npz", metrics="fd", extractor=digits_extractor(snap=False))
    np.savez(tmp_path / "birds_legacy_pytorch_train_32.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(InputError, match="made with extractor 'inception'"):
        evaluate(X[:300], tmp_path / "birds_legacy_pytorch_train_32.npz", metrics="fd", extractor=network)
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match="holds 2048 features and extractor 'digits' gives 64"):
        evaluate(X[:300], tmp_path / "edm.npz", metrics="fd", extractor=network)
    with pytest.raises(InputError, match="got a file of statistics, expected real pictures"):
        evaluate(X[:300], tmp_path / "s.npz", metrics="recall", extractor=network)
    with pytest.raises(InputError, match="clean-fid has no statistics of extractor 'digits'"):
        clean_fid_name("digits", network)


def test_weights_are_checked(tmp_path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"content")
    found = hashlib.sha256(b"content").hexdigest()
    assert weights_file(path, sha256=found[:8]) == (path, found)
    assert weights_file(f"{path}#sha256={found}")[1] == found
    with pytest.raises(InputError, match="expected 00000000: it is damaged or another file"):
        weights_file(path, sha256="00000000")
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    named.write_bytes(b"content")
    with pytest.raises(InputError, match="expected 6726825d"):
        inception_extractor(named)
    with pytest.raises(InputError, match="comes without a checksum"):
        weights_file("https://example.org/weights.pth")
    with pytest.raises(InputError, match="no file"):
        weights_file(tmp_path / "absent.pth")
