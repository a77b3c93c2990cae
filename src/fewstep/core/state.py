"""What a run leaves on disk: an owned folder, atomic files, checkpoints that survive a kill at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import InputError

RECIPE, LOG, CHECKPOINTS = "recipe.json", "log.jsonl", "checkpoints"


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new content, never a part.

    Raises:
        InputError: the place cannot be written (read-only, full, or not a folder).
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """:func:`write_text` for bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        _discard(temporary)
        raise InputError(
            f"cannot write {path}: {error.strerror or error}: free some space or choose another --out"
        ) from None


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors atomically; the tensors may share memory or be strided.

    Raises:
        InputError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    ready: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, value in tensors.items():
        plain = value.detach().cpu().contiguous()
        memory = plain.untyped_storage()
        # The format refuses tensors that share memory; a copy of every other would need twice the room.
        whole = memory.nbytes() == plain.nbytes and memory.data_ptr() not in held
        held.add(memory.data_ptr())
        ready[name] = plain if whole else plain.clone()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(ready, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        _discard(temporary)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path}: {reason}: free some space or choose another --out") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads safetensors.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: expected a safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): copy it again or use another") from None


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Fills a module strictly.

    Raises:
        InputError: names or shapes differ, that is, the file belongs to another architecture; the first few are named.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own.keys() & tensors.keys()
        if own[k].shape != tensors[k].shape
    ]
    if missing or extra or shapes:
        said = [f"missing {_few(missing)}"] * bool(missing) + [f"unknown {_few(extra)}"] * bool(extra)
        said += [f"shapes differ: {_few(sorted(shapes))}"] * bool(shapes)
        raise InputError(f"{source} holds another architecture: {'; '.join(said)}")
    module.load_state_dict(dict(tensors), strict=True)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: missing, unreadable or not an object.
    """
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(body, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(body).__name__}")
    return body


@dataclass(frozen=True)
class Run:
    """A run folder: ``recipe.json``, ``log.jsonl``, ``checkpoints/``, ``samples/`` and, at the end, the generator."""

    folder: Path
    keep: int = 2

    @classmethod
    def open(
        cls, folder: Path, recipe: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False, keep: int = 2
    ) -> Run:
        """Claims the folder for this recipe.

        Raises:
            InputError: it holds another run and neither ``resume`` nor ``overwrite`` was given, the recipe to resume
                differs (names the fields), or it cannot be written.
        """
        if keep < 1:
            raise InputError(f"a run keeps at least 1 checkpoint, got {keep}")
        run, body = cls(Path(folder), keep), json.loads(json.dumps(recipe))
        if run.folder.exists() and not run.folder.is_dir():
            raise InputError(f"{folder} is a file: --out must be a folder")
        # A kill before the recipe was there leaves at most a temporary file, which claims nothing.
        occupied = run.folder.is_dir() and any(p.suffix != ".tmp" for p in run.folder.iterdir())
        if occupied and resume and not overwrite:
            old, new = _flat(read_json(run.folder / RECIPE)), _flat(body)
            wrong = sorted(k for k in new.keys() | old.keys() if new.get(k) != old.get(k))
            if wrong:
                said = ", ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in wrong[:3])
                raise InputError(f"{folder} was made with another recipe: {said}: use the same or another --out")
        elif occupied and not overwrite:
            raise InputError(f"{folder} already holds files: choose another --out, or --resume, or --overwrite")
        elif occupied:
            if not (run.folder / RECIPE).is_file():
                raise InputError(f"{folder} is not a run folder (no {RECIPE}): --overwrite will not delete it")
            _remove(run.folder)
        write_text(run.folder / RECIPE, json.dumps(body, indent=2) + "\n")
        return run

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first; what a kill left half-written is not among them."""
        folder = self.folder / CHECKPOINTS
        return sorted(p for p in folder.glob("[0-9]*") if p.is_dir()) if folder.is_dir() else []

    def save(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Writes ``checkpoints/<step>`` whole or not at all, then forgets all but the newest ``keep``.

        Raises:
            InputError: the place cannot be written; older checkpoints are untouched.
        """
        final = self.folder / CHECKPOINTS / f"{step:08d}"
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        try:
            for name, tensors in groups.items():
                save_tensors(temporary / f"{name}.safetensors", tensors)
            write_text(temporary / "step.json", json.dumps({"step": step, **facts}, indent=2) + "\n")
            if final.exists():
                _remove(final)
            temporary.rename(final)
            _sync_folder(final.parent)
        except (InputError, OSError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot write {final}: {error.strerror or error}: free some space") from None
        for old in self.checkpoints()[: -self.keep]:
            _remove(old)
        for stale in final.parent.glob(".*.tmp"):
            _remove(stale)

    def latest(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
        """The facts and tensors of the newest checkpoint, or None before the first.

        Raises:
            InputError: a file of it is damaged.
        """
        found = self.checkpoints()
        if not found:
            return None
        files = sorted(found[-1].rglob("*.safetensors"))
        groups = {str(f.relative_to(found[-1]).with_suffix("")): load_tensors(f) for f in files}
        return read_json(found[-1] / "step.json"), groups

    def log(self, entry: Mapping[str, Any]) -> None:
        """Appends one line to the log."""
        path = self.folder / LOG
        try:
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}: free some space") from None

    def read_log(self) -> list[dict[str, Any]]:
        """All entries; a last line that a kill cut short is left out."""
        path = self.folder / LOG
        entries = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return entries

    def rewind_log(self, step: int) -> None:
        """Drops entries later than ``step``: they will be written again."""
        kept = [json.dumps(e) for e in self.read_log() if e.get("step", 0) <= step]
        if (self.folder / LOG).exists():
            write_text(self.folder / LOG, "".join(line + "\n" for line in kept))


def _flat(body: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    out: dict[str, Any] = {}
    for key, value in body.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return out


def _remove(folder: Path) -> None:
    """Renames first, so that a kill in between leaves no half-deleted folder under a name that counts."""
    grave = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    folder.rename(grave)
    shutil.rmtree(grave)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parameter_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state keyed by parameter *name*, such as ``"net.weight/exp_avg"``."""
    return {
        f"{name}/{key}": value
        for name, p in module.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


def load_parameter_state(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`parameter_state` took.

    Raises:
        InputError: a name that is no parameter of the module.
    """
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in parameters:
            raise InputError(f"the optimizer state names {name!r}, which the network does not have")
        p = parameters[name]
        # Adam keeps its step counter as it stands; the moments live where the weights do.
        optimizer.state[p][slot] = value.clone() if slot == "step" else value.to(p.device, p.dtype)
