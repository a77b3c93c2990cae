"""To the Hugging Face Hub and back: one commit up, one snapshot down, and one clear line when it does not work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from fewstep.core.generator import CONFIG, Generator, local
from fewstep.core.sample import Sampler
from fewstep.core.state import write_text
from fewstep.core.stored import save_sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.export.card import Score, fewstep_snippet, model_card, run_snippet

CARD = "README.md"
# A run folder is also a generator folder: what resuming needs is nobody else's.
LEFT_OUT = ("checkpoints/*", "looks/*", "monitor.jsonl", "run.js", ".*", "*/.*", "*.tmp", "*__pycache__/*")
LORA = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# A folder with one of these holds something that can be opened again.
KNOWN = (CONFIG, "model_index.json", "tableau.json", "sampler.json", *LORA)


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise InputError("huggingface_hub is not installed: pip install 'fewstep[hf]'") from None
    return huggingface_hub


def check_repo(repo: str) -> str:
    """The name of a repository, if it is one.

    Raises:
        InputError: it is not of the form owner/name, or has characters that the Hub does not allow.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    wanted = "expected owner/name of letters, digits, '-', '_' and '.', such as 'jane/sid-cifar10'"
    if not isinstance(repo, str) or repo.count("/") != 1:
        raise InputError(f"{repo!r} is no repository of the Hub: {wanted}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no repository of the Hub: {wanted} ({str(error).split(':')[0]})") from None
    return repo


def push_to_hub(
    what: Generator | str | Path,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    lora: bool = False,
    diffusers: bool = False,
    card: str | None = None,
    base_model: str | None = None,
    base_license: str | None = None,
    metrics: Sequence[Score] = (),
    check: bool = True,
    endpoint: str | None = None,
    **options: Any,
) -> str:
    """Uploads a generator or an exported folder in one commit; returns the address of the repository or pull request.

    A generator is written as a fewstep folder, which ``fewstep.load(repo)`` opens; with ``diffusers`` as a diffusers
    folder (``options`` are those of ``Generator.to_diffusers``); with ``lora`` as LoRA files (those of
    :func:`fewstep.export.lora.save_lora`). A folder is uploaded as it is, without checkpoints and hidden files. Every
    repository has a model card: the folder's README.md, or ``card``, or the one made of the generator with
    ``base_model``, ``base_license`` and ``metrics`` (:func:`fewstep.export.card.model_card`), whose code is executed
    first unless ``check`` is False. In a folder's own card the folder's name becomes the repository's where it is
    opened.

    The repository is made if there is none, ``private`` or else as is usual for its owner. ``token`` is the one of
    ``hf auth login`` by default. ``revision`` is a branch, made if there is none; ``create_pr`` opens a pull request
    instead. ``endpoint`` is another server than the Hub.

    Raises:
        InputError: a bad name, no token or a refused one, no permission, no network, nothing to upload, or no card.
            Names and token are checked before anything is written.
    """
    check_repo(repo)
    if create_pr and revision is not None:
        raise InputError(f"a pull request goes to the main branch: leave out revision={revision!r} or create_pr")
    if lora and diffusers:
        raise InputError("a repository holds a LoRA or a whole pipeline: choose lora or diffusers")
    given = None if isinstance(what, Generator) else _checked_folder(what, card)
    if given is not None and (lora or diffusers or options):
        raise InputError(f"{given} is uploaded as it is: lora, diffusers and {sorted(options)} are for generators")
    api = _signed_in(token, endpoint, repo)
    make: dict[str, Any] = {
        "private": private,
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": commit_message,
    }
    if given is not None:
        return _upload(api, given, repo, _card_of(given, repo, card), **make)
    assert isinstance(what, Generator)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / repo.split("/")[1]
        if diffusers:
            what.to_diffusers(folder, **options)
        elif lora:
            _save_lora(what, folder, card, options)
        elif options:
            raise InputError(f"a fewstep folder has no options: leave out {', '.join(sorted(options))}")
        else:
            what.save(folder)
        if card is None and not (folder / CARD).is_file():
            text = fewstep_snippet(repo)
            if check:
                run_snippet(text, folder, repo=repo, with_fewstep=True, out=folder / "sample.png")
            facts: dict[str, Any] = {
                "base_model": base_model,
                "base_license": base_license,
                "metrics": metrics,
                "snippet": text,
            }
            write_text(folder / CARD, model_card(what, title=repo.split("/")[1], **facts))
        return _upload(api, folder, repo, _card_of(folder, repo, card), **make)


def _save_lora(generator: Generator, folder: Path, card: str | None, options: dict[str, Any]) -> None:
    from fewstep.export.lora import save_lora

    if card is None:
        raise InputError("a LoRA's card names the model it belongs to: pass card=model_card(..., relation='adapter')")
    save_lora(generator, folder, **options)


def push_sampler(
    sampler: Sampler,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads a tableau or another stored sampler; ``load_sampler(download(repo))`` opens it. See :func:`push_to_hub`.

    Raises:
        InputError: a sampler that cannot be stored, or what :func:`push_to_hub` says.
    """
    check_repo(repo)
    if create_pr and revision is not None:
        raise InputError(f"a pull request goes to the main branch: leave out revision={revision!r} or create_pr")
    api = _signed_in(token, endpoint, repo)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_sampler(sampler, folder)
        write_text(folder / CARD, _sampler_card(sampler, repo))
        text = (folder / CARD).read_text()
        make: dict[str, Any] = {
            "private": private,
            "revision": revision,
            "create_pr": create_pr,
            "commit_message": commit_message,
        }
        return _upload(api, folder, repo, text, **make)


def _sampler_card(sampler: Sampler, repo: str) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="fewstep", tags=["few-step", "sampler"])
    name = getattr(sampler, "name", type(sampler).__name__)
    grid = ""
    if isinstance(sampler, Tableau):
        levels = ", ".join(f"{s:.6g}" for s in sampler.levels.tolist())
        grid = f"\n\nLevels: {levels}."
    text = (
        f"# {repo.split('/')[1]}\n\nThe sampler `{name}`: {sampler.nfe} evaluations from sigma {sampler.start:.6g} to "
        f"{sampler.end:.6g}. It holds weights of a sampler and no network.{grid}\n\n```python\n"
        f"from fewstep.core.stored import load_sampler\nfrom fewstep.export.hub import download\n\n"
        f'sampler = load_sampler(download("{repo}"))\n```'
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _checked_folder(what: str | Path, card: str | None) -> Path:
    """A folder that can be uploaded."""
    folder = local(what)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: pass a generator, or the folder of an export")
    if not any((folder / name).is_file() for name in KNOWN):
        raise InputError(f"{folder} holds nothing to share: expected one of {', '.join(KNOWN)}")
    if card is None and not (folder / CARD).is_file():
        raise InputError(f"{folder} has no model card: write {CARD}, pass card=..., or push the generator itself")
    return folder


def _card_of(folder: Path, repo: str, card: str | None) -> str:
    """The card to upload: a folder's own opens the folder by name, and there it is called otherwise."""
    text = (folder / CARD).read_text() if card is None else card
    for function in ("from_pretrained", "load_lora_weights", "load"):
        for name in {folder.name, str(folder)}:
            text = text.replace(f'{function}("{name}"', f'{function}("{repo}"')
    return text


def _signed_in(token: str | None, endpoint: str | None, repo: str) -> Any:
    """The Hub's client for somebody whom the Hub knows."""
    hub = _hub()
    own = token or hub.get_token()
    if not own:
        raise InputError(f"no token to write to {repo} with: run `hf auth login`, set HF_TOKEN or pass token=...")
    api = hub.HfApi(endpoint=endpoint, token=own, library_name="fewstep")
    with _said(repo, f"sign in at {api.endpoint}"):
        api.whoami()
    return api


def _upload(
    api: Any,
    folder: Path,
    repo: str,
    card: str,
    *,
    private: bool,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
) -> str:
    """All files of a folder, and the card, as one commit."""
    hub = _hub()
    operations = [hub.CommitOperationAdd(CARD, card.encode())]
    operations += [hub.CommitOperationAdd(name, folder / name) for name in _files(folder) if name != CARD]
    with _said(repo, "write"):
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo,
            operations,
            commit_message=commit_message or "Upload with fewstep",
            revision=revision,
            create_pr=create_pr,
        )
    return str(done.pr_url if create_pr else made)


def _files(folder: Path) -> list[str]:
    """The files that are shared, by their names in the repository."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in LEFT_OUT)]


def download(
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow: Sequence[str] | None = None,
    cache: str | Path | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a repository's files on this machine, fetched where they are not there yet.

    ``allow`` are patterns of the files to fetch, such as ``("*.json", "unet/*")``; all by default. ``cache`` is the
    Hub's own cache by default. Without a network, what an earlier call fetched is used.

    Raises:
        InputError: a bad name, no such repository or revision or no right to read it, or neither a network nor a copy;
            the message names the repository, the cache that was tried and what to do.
    """
    check_repo(repo)
    hub = _hub()
    place = local(cache or hub.constants.HF_HUB_CACHE)
    with _said(repo, "read", place):
        found = hub.snapshot_download(
            repo,
            revision=revision,
            token=token,
            allow_patterns=None if allow is None else list(allow),
            cache_dir=place,
            endpoint=endpoint,
            local_files_only=local_files_only,
        )
    return Path(found)


@contextmanager
def _said(repo: str, doing: str, cache: Path | None = None) -> Iterator[None]:
    """Turns the errors of the Hub and of the network into one line that says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        _explain(error, repo, doing, cache)


def _explain(error: Exception, repo: str, doing: str, cache: Path | None) -> NoReturn:
    """Raises an InputError for what a user can mend, and the error itself for all else."""
    errors = _hub().errors
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        raise InputError(f"{repo} has no such revision: leave it out, or look up its branches on the Hub") from None
    if isinstance(error, errors.GatedRepoError):
        raise InputError(
            f"{repo} is gated: accept its terms on its page, then pass the token of that account"
        ) from None
    if status == 401 and doing != "read":
        raise InputError(f"the token was refused ({doing}): run `hf auth login` again or pass another one") from None
    if status == 403:
        raise InputError(
            f"no permission to {doing} {repo}: use a token with write access for {repo.split('/')[0]}, or another owner"
        ) from None
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        raise InputError(
            f"{repo} does not exist on the Hub, or is private: check the name, or pass a token that may {doing} it"
        ) from None
    if isinstance(error, errors.HfHubHTTPError | ValueError):
        said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise InputError(f"the Hub would not {doing} {repo}: {said}") from None
    offline = isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError)
    # The HTTP library beneath has changed over time; its errors of transport have one of these ancestors.
    transport = {"TransportError", "RequestException"} & {c.__name__ for c in type(error).__mro__}
    if offline or transport:
        tried = f"; no copy in {cache}" if cache is not None else ""
        raise InputError(
            f"cannot {doing} {repo}: the Hub cannot be reached{tried}; check the network and HF_HUB_OFFLINE, or pass a "
            "folder of this machine"
        ) from None
    raise error
