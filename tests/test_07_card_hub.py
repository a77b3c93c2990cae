"""Model cards, their executed snippets, and uploads to a Hub that runs in a thread of the test."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
from PIL import Image

import fewstep
from fewstep.core.cond import Classes
from fewstep.core.denoiser import edm
from fewstep.core.generator import Generator
from fewstep.core.stored import load_sampler
from fewstep.errors import InputError
from fewstep.export.card import Score, fewstep_snippet, model_card, run_snippet, scores, snippet_for
from fewstep.export.hub import check_repo, download, push_sampler, push_to_hub
from fewstep.grid import karras
from fewstep.guide import guided
from fewstep.models import UNet, UNetConfig
from fewstep.solve.heun import heun

hub = pytest.importorskip("huggingface_hub")

TRAINED = {
    "method": "SiD",
    "settings": {"alpha": 1.2, "lr": 1e-5},
    "options": {"batch": 64, "seed": 3},
    "trained": {"step": 2000, "images": 128000, "seconds": 61.5},
}
SNIPPET = snippet_for("FewstepPipeline", "jane/student", {"num_inference_steps": 2}, remote_code=True)


def generator(classes: int = 3, **card: Any) -> Generator:
    torch.manual_seed(0)
    config = UNetConfig((1, 8, 8), classes, channels=8, multipliers=(1,), blocks=1, attention=())
    denoiser = edm(UNet(config), (1, 8, 8)).eval()
    conds = Classes((1.0,) * classes) if classes else None
    return Generator(denoiser, heun(karras(2, 0.002, 80.0)), None, conds, card)


def meta(text: str) -> dict[str, Any]:
    found: dict[str, Any] = hub.ModelCard(text).data.to_dict()
    return found


def test_a_full_card_says_what_a_reader_needs() -> None:
    found = scores({"fd@2000": 1.5, "recall@2000": 0.8}, nfe=3, reference="Digits train")
    found += scores({"fd@2000": 1.1}, nfe=35, reference="Digits train", of="teacher")
    text = model_card(
        guided(generator(**TRAINED), 1.5),
        title="Digits in three",
        base_model="jane/teacher",
        base_license="apache-2.0",
        snippet=SNIPPET,
        metrics=found,
        extra={"num_inference_steps": 3, "checked": {"largest_difference": 2e-6}, "picture": "sample.png"},
        datasets=["jane/digits"],
    )
    data = meta(text)
    index = data.pop("model-index")
    assert data == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["few-step", "distillation", "sid"],
        "base_model": "jane/teacher",
        "base_model_relation": "finetune",
        "datasets": ["jane/digits"],
        "metrics": ["fd", "recall"],
    }
    measured = [m for result in index[0]["results"] for m in result["metrics"]]
    assert [(m["name"], m["value"]) for m in measured] == [
        ("fd, 2,000 samples, 3 NFE, against Digits train", 1.5),
        ("recall, 2,000 samples, 3 NFE, against Digits train", 0.8),
    ]
    for said in (
        SNIPPET.strip(),
        "| student | 3 | fd@2000 | 1.5 | Digits train |",
        "| teacher | 35 | fd@2000 | 1.1 | Digits train |",
        "2,000 steps, 128,000 images, 61.5 seconds",
        "`alpha=1.2`",
        "`seed=3`",
        "| 1 | 80 | 1.09551 |",
        "Classifier-free guidance with scale 1.5",
        "largest difference 2e-06",
        "[jane/teacher](https://huggingface.co/jane/teacher)",
        "A picture takes 3 evaluations",
        "* picture: sample.png",
    ):
        assert said in text, said


def test_a_card_does_not_claim_what_it_does_not_know() -> None:
    text = model_card(generator(0), snippet=fewstep_snippet("jane/student"), extra={"checked": None})
    assert meta(text) == {
        "license": "other",
        "license_name": "not-stated",
        "library_name": "fewstep",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["few-step"],
    }
    assert "This export was not checked" in text and "state it before you share" in text
    assert "Measurements" not in text and "How it was made" not in text and "istilled" not in text


def test_a_text_generator_is_tagged_so_and_names_its_base() -> None:
    class Prompts:
        def draw(self, noise: object) -> dict[str, torch.Tensor]:
            return {}

        def check(self, cond: object) -> None: ...

        def encode(self, prompts: object) -> dict[str, torch.Tensor]:
            return {}

        def nulls(self, negative: str = "") -> dict[str, torch.Tensor]:
            return {}

    class Around:
        kind = "diffusers"
        source = "stabilityai/some-model"

    made = generator(0)
    made.conds, made.pipeline = Prompts(), Around()  # type: ignore[assignment]
    data = meta(model_card(made, snippet="image = 1", relation="adapter"))
    assert data["pipeline_tag"] == "text-to-image"
    assert (data["base_model"], data["base_model_relation"]) == ("stabilityai/some-model", "adapter")
    assert data["license_name"] == "that-of-the-teacher"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Score("fd", 1.0, 3, "x"), "score 'fd' lacks its number of samples: name it like 'fd@50000'"),
        (lambda: Score("fd@10", float("nan"), 3, "x"), "score fd@10 is nan, expected a finite number"),
        (lambda: Score("fd@10", 1.0, 0, "x"), "needs nfe >= 1"),
        (lambda: Score("fd@10", 1.0, 1, "x", of="mine"), "unknown owner of a score 'mine'"),  # type: ignore[arg-type]
        (lambda: model_card(generator(), snippet=" "), "a model card needs a snippet"),
        (lambda: model_card(generator(), snippet="x", relation="merge"), "unknown relation"),  # type: ignore[arg-type]
        (lambda: snippet_for("DiTPipeline", "a/b", {}, dtype="float8"), "unknown dtype 'float8'"),
        (lambda: snippet_for("DiTPipeline", "a/b", {}, base="c/d"), "a LoRA's snippet needs base and scheduler"),
        (lambda: snippet_for("DiTPipeline", "a/b", {"x": torch.ones(1)}), "argument 'x' of a snippet must be a plain"),
    ],
)
def test_bad_cards(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)


def test_snippets_of_every_family_are_python_that_names_everything() -> None:
    text = snippet_for(
        "StableDiffusionPipeline",
        "jane/student",
        {"prompt": 'a "red" fox', "num_inference_steps": 4, "guidance_scale": 1.0},
        dtype="bfloat16",
        seed=7,
    )
    assert 'StableDiffusionPipeline.from_pretrained("jane/student", torch_dtype=torch.bfloat16)' in text
    assert 'prompt="a \\"red\\" fox", num_inference_steps=4, guidance_scale=1.0' in text.replace("\n    ", " ")
    assert "manual_seed(7)" in text and "trust_remote_code" not in text
    classes = snippet_for("DiTPipeline", "jane/student", {"class_labels": [207]})
    assert "pipe(class_labels=[207], generator=generator).images[0]" in classes
    own = snippet_for("FewstepPipeline", "jane/student", {}, remote_code=True)
    assert 'DiffusionPipeline.from_pretrained("jane/student", trust_remote_code=True)' in own
    call = {"prompt": "a fox"}
    stock = snippet_for("StableDiffusionPipeline", "jane/lora", call, base="base/model", scheduler="LCMScheduler")
    assert 'from_pretrained("base/model")' in stock and 'load_lora_weights("jane/lora")' in stock
    assert 'LCMScheduler.from_pretrained("jane/lora", subfolder="scheduler")' in stock
    table = snippet_for("FluxPipeline", "jane/lora", call, base="base/model", scheduler="TableauScheduler")
    assert '"scheduling_fewstep.py", subfolder="scheduler", class_name="TableauScheduler"' in table
    for each in (text, classes, own, stock, table, fewstep_snippet("jane/student")):
        compile(each, "README.md", "exec")


def test_the_snippet_of_a_card_runs_as_it_stands(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from fewstep.export import TableauScheduler
    from fewstep.export.bundle import write_custom_pipeline

    made = generator()
    scheduler = TableauScheduler.from_tableau(made.sampler, path="edm", prediction_type="sample")
    folder = write_custom_pipeline(made.denoiser, scheduler, tmp_path / "export", classes=3)  # type: ignore[arg-type]
    call = {"class_labels": [1], "num_inference_steps": made.sampler.nfe}
    text = snippet_for("FewstepPipeline", "jane/student", call, remote_code=True)
    assert str(folder) not in text
    picture = run_snippet(text, folder, repo="jane/student")
    assert picture == folder / "picture.png"
    with Image.open(picture) as image:
        assert image.size == (8, 8) and len(image.getcolors() or []) > 1
    assert f"```python\n{text.strip()}\n```" in model_card(made, snippet=text)


PLAIN = "from PIL import Image\nimage = Image.new('L', (2, 2))\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (f"{PLAIN}import fewstep\n", {}, "ModuleNotFoundError: import of fewstep halted"),
        ("import nothing_of_this_name\n", {}, "No module named 'nothing_of_this_name'"),
        ("picture = 1\n", {}, "the snippet leaves no variable named image"),
        ("while True: pass\n", {"timeout": 1.0}, "did not finish within 1 s"),
        (PLAIN, {"others": {"a/base": "missing-folder"}}, "is no folder: a snippet is run on an exported model"),
    ],
)
def test_snippets_that_fail(text: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run_snippet(text, tmp_path, **options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_snippet_knows_no_token_and_finds_the_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("own", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "here.txt").write_text(name)
    text = (
        "import os\nfrom pathlib import Path\nfrom PIL import Image\n"
        'assert "HF_TOKEN" not in os.environ and os.environ["HF_HUB_OFFLINE"] == "1"\n'
        'assert [Path(n, "here.txt").read_text() for n in ("me/own", "you/base")] == ["own", "base"]\n'
        'image = Image.new("L", (2, 3))\n'
    )
    out = run_snippet(
        text, tmp_path / "own", repo="me/own", others={"you/base": tmp_path / "base"}, out=tmp_path / "p.png"
    )
    with Image.open(out) as image:
        assert image.size == (2, 3)
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["here.txt"]


@dataclass
class Repo:
    """What the server of the tests holds."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    private: Any = None
    branches: set[str] = field(default_factory=lambda: {"main"})


@dataclass
class Server:
    """A Hub with the routes that an upload and a download take."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


SHA = "0123456789abcdef0123456789abcdef01234567"


def handler_for(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refuse(self, status: int, code: str, said: str) -> None:
            self.answer({"error": said}, status, {"X-Error-Code": code, "X-Error-Message": said})

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            where, data = urlsplit(self.path), self.body()
            path, query = unquote(where.path), parse_qs(where.query)
            server.asked.append(f"POST {path}")
            if path == "/api/validate-yaml":
                text = json.loads(data)["content"]
                errors = [] if "license" in meta(text) or "sampler" in text else [{"message": "no licence"}]
                return self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
            if path == "/api/repos/create":
                return self.create(json.loads(data))
            if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                objects = json.loads(data)["objects"]
                href = f"{server.endpoint}/lfs/"
                actions = [{**o, "actions": {"upload": {"href": href + o["oid"]}}} for o in objects]
                return self.answer({"objects": actions}, headers={"Content-Type": "application/json"})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
            assert found, path
            repo = server.repos[found[1]]
            if found[2] == "branch":
                repo.branches.add(found[3])
                return self.answer({})
            if found[3] not in repo.branches:
                return self.refuse(404, "RevisionNotFound", "no such revision")
            if found[2] == "preupload":
                files = json.loads(data)["files"]
                modes = ["lfs" if f["path"].endswith(".safetensors") else "regular" for f in files]
                said = [
                    {"path": f["path"], "uploadMode": m, "shouldIgnore": False}
                    for f, m in zip(files, modes, strict=True)
                ]
                return self.answer({"files": said})
            return self.commit(repo, found[1], found[3], data, "create_pr" in query)

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "forbidden":
                return self.refuse(403, "", "You don't have the rights to create a model under this namespace")
            if name in server.repos:
                return self.answer({"error": "exists", "url": f"{server.endpoint}/{name}"}, 409)
            server.repos[name] = Repo(private=asked.get("visibility"))
            self.answer({"url": f"{server.endpoint}/{name}", "name": name})

        def commit(self, repo: Repo, name: str, revision: str, data: bytes, pull: bool) -> None:
            lines = [json.loads(line) for line in data.splitlines()]
            head = next(line["value"] for line in lines if line["key"] == "header")
            new = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    new[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    new[value["path"]] = server.lfs[value["oid"]]
            repo.commits.append({"summary": head["summary"], "revision": revision, "pull": pull, "files": sorted(new)})
            repo.files |= {} if pull else new
            said = {"commitUrl": f"{server.endpoint}/{name}/commit/{SHA}", "commitOid": SHA, "success": True}
            self.answer(said | ({"pullRequestUrl": f"{server.endpoint}/{name}/discussions/1"} if pull else {}))

        def do_PUT(self) -> None:
            data = self.body()
            oid = self.path.rsplit("/", 1)[1]
            assert hashlib.sha256(data).hexdigest() == oid
            server.lfs[oid] = data
            self.answer({}, headers={"ETag": f'"{oid}"'})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            server.asked.append(f"{self.command} {path}")
            if path == "/api/whoami-v2":
                known = self.headers.get("Authorization") == "Bearer hf_good"
                return self.answer({"name": "jane", "type": "user"}) if known else self.refuse(401, "", "Invalid token")
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                data = server.repos[found[1]].files[found[3]]
                etag = hashlib.sha256(data).hexdigest()
                return self.answer(data, headers={"X-Repo-Commit": SHA, "ETag": f'"{etag}"'})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/(.+)|/tree/.+)?", path)
            assert found, path
            if found[1] not in server.repos:
                return self.refuse(404, "RepoNotFound", "Repository not found")
            repo = server.repos[found[1]]
            if (found[2] or "").startswith("/tree/"):
                oid = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
                return self.answer(
                    [{"type": "file", "path": p, "oid": oid, "size": len(d)} for p, d in sorted(repo.files.items())]
                )
            if found[3] not in (None, SHA, *repo.branches):
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            info = {"id": found[1], "modelId": found[1], "sha": SHA, "private": False, "tags": [], "downloads": 0}
            self.answer(info | {"siblings": [{"rfilename": p} for p in sorted(repo.files)]})

        do_HEAD = do_GET

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(state))
    state.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_generator_goes_up_in_one_commit_and_comes_back_bit_for_bit(server: Server, tmp_path: Path) -> None:
    made = generator(**TRAINED)
    url = push_to_hub(made, "jane/student", private=True, token="hf_good", endpoint=server.endpoint, check=False)
    assert url == f"{server.endpoint}/jane/student"
    repo = server.repos["jane/student"]
    assert repo.private == "private"
    names = ["README.md", "fewstep.json", "sampler.json", "student.safetensors"]
    assert repo.commits == [{"summary": "Upload with fewstep", "revision": "main", "pull": False, "files": names}]
    assert meta(repo.files["README.md"].decode())["library_name"] == "fewstep"
    assert 'fewstep.load("jane/student")' in repo.files["README.md"].decode()
    folder = download("jane/student", cache=tmp_path, endpoint=server.endpoint)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == repo.files
    again = Generator.load(folder)
    assert again.fingerprint() == made.fingerprint()
    assert torch.equal(again.sample(2, seed=4), made.sample(2, seed=4))
    before = len(server.asked)
    assert download("jane/student", cache=tmp_path, endpoint=server.endpoint, local_files_only=True) == folder
    assert len(server.asked) == before


def test_the_card_of_an_upload_was_executed(server: Server) -> None:
    push_to_hub(generator(), "jane/checked", token="hf_good", endpoint=server.endpoint)
    files = server.repos["jane/checked"].files
    assert files["sample.png"].startswith(b"\x89PNG")


def test_a_run_folder_leaves_its_checkpoints_at_home(server: Server, tmp_path: Path) -> None:
    folder = generator().save(tmp_path / "run")
    for name in ("checkpoints/00000010/optim/a.safetensors", ".git/config", "x/__pycache__/a.pyc", "half.tmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not to be shared")
    card = '---\nlicense: mit\n---\npipe = X.from_pretrained("%s", torch_dtype=None)\n'
    (folder / "README.md").write_text(card % "run")
    push_to_hub(folder, "jane/run", token="hf_good", endpoint=server.endpoint, commit_message="First")
    repo = server.repos["jane/run"]
    assert set(repo.files) == {"README.md", "fewstep.json", "sampler.json", "student.safetensors"}
    assert repo.commits[0]["summary"] == "First"
    assert repo.files["README.md"].decode() == card % "jane/run"
    assert repo.files["student.safetensors"] == (folder / "student.safetensors").read_bytes()


def test_branches_and_pull_requests(server: Server, tmp_path: Path) -> None:
    sampler = generator().sampler
    push_sampler(sampler, "jane/table", token="hf_good", endpoint=server.endpoint)
    push_sampler(sampler, "jane/table", token="hf_good", endpoint=server.endpoint, revision="fast")
    url = push_sampler(sampler, "jane/table", token="hf_good", endpoint=server.endpoint, create_pr=True)
    assert url == f"{server.endpoint}/jane/table/discussions/1"
    commits = server.repos["jane/table"].commits
    assert [(c["revision"], c["pull"]) for c in commits] == [("main", False), ("fast", False), ("main", True)]
    assert all(c["files"] == ["README.md", "tableau.json"] for c in commits)
    found = load_sampler(download("jane/table", cache=tmp_path, endpoint=server.endpoint, revision="fast"))
    assert isinstance(found, fewstep.Tableau) and torch.equal(found.P, sampler.P)  # type: ignore[attr-defined]
    only = download("jane/table", cache=tmp_path / "other", endpoint=server.endpoint, allow=["*.json"])
    assert [p.name for p in only.iterdir()] == ["tableau.json"]


def test_a_card_that_the_hub_does_not_take(server: Server, tmp_path: Path) -> None:
    folder = generator().save(tmp_path / "run")
    with pytest.raises(InputError, match=r"the Hub would not write jane/run: .*no licence"):
        push_to_hub(folder, "jane/run", token="hf_good", endpoint=server.endpoint, card="---\ntags: [a]\n---\nText.\n")
    assert server.repos["jane/run"].files == {}


def pushes() -> list[tuple[str, dict[str, Any], str]]:
    return [
        ("no-owner", {}, "'no-owner' is no repository of the Hub: expected owner/name"),
        ("a/b/c", {}, "'a/b/c' is no repository of the Hub"),
        ("jane/bad--name", {}, "'jane/bad--name' is no repository of the Hub"),
        ("jane/with space", {}, "'jane/with space' is no repository of the Hub"),
        ("jane/x", {"token": "hf_bad"}, "the token was refused"),
        ("jane/x", {"create_pr": True, "revision": "v"}, "a pull request goes to the main branch"),
        ("jane/x", {"lora": True, "diffusers": True}, "choose lora or diffusers"),
        ("jane/x", {"strange": 1}, "a fewstep folder has no options: leave out strange"),
        ("forbidden/x", {"check": False}, "no permission to write forbidden/x: use a token with write access"),
        ("jane/x", {"endpoint": "http://127.0.0.1:9"}, "cannot sign in at http://127.0.0.1:9 jane/x"),
        ("jane/x", {"lora": True}, "a LoRA's card names the model it belongs to"),
    ]


@pytest.mark.parametrize("number", range(len(pushes())))
def test_bad_uploads_leave_nothing(number: int, server: Server) -> None:
    repo, options, message = pushes()[number]
    with pytest.raises(InputError) as caught:
        push_to_hub(generator(), repo, **{"token": "hf_good", "endpoint": server.endpoint, **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not server.repos


def test_no_token(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="no token to write to jane/x with: run `hf auth login`"):
        push_to_hub(generator(), "jane/x", endpoint=server.endpoint)
    assert server.asked == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is no folder: pass a generator, or the folder of an export"),
        (["notes.txt"], "holds nothing to share: expected one of fewstep.json"),
        (["fewstep.json"], "has no model card: write README.md"),
    ],
)
def test_folders_that_cannot_be_shared(files: list[str] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    with pytest.raises(InputError) as caught:
        push_to_hub(folder, "jane/x", token="hf_good", endpoint="http://127.0.0.1:9")
    assert message in str(caught.value)


def test_downloads_that_fail(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="jane/nothing does not exist on the Hub, or is private"):
        download("jane/nothing", cache=tmp_path, endpoint=server.endpoint)
    server.repos["jane/there"] = Repo({"fewstep.json": b"{}"})
    with pytest.raises(InputError, match="jane/there has no such revision"):
        download("jane/there", cache=tmp_path, endpoint=server.endpoint, revision="gone")
    with pytest.raises(InputError) as caught:
        download("jane/there", cache=tmp_path / "empty", endpoint="http://127.0.0.1:9")
    for said in ("cannot read jane/there", str(tmp_path / "empty"), "check the network and HF_HUB_OFFLINE"):
        assert said in str(caught.value)
    with pytest.raises(InputError, match="'there' is no repository of the Hub"):
        check_repo("there")
