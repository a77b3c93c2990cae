"""Where an export goes: the old folder stays until the new one is whole, and a failure leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.core.generator import Generator
from fewstep.core.state import read_json
from fewstep.errors import InputError

FACTS = "fewstep.json"
OURS = ("fewstep-export/", "fewstep-lora/")


def check_place(folder: str | Path, overwrite: bool, generator: Generator) -> Path:
    """The absolute place of an export, if it may go there.

    Raises:
        InputError: a file is there, or files that are no earlier export, or one without ``overwrite``; the folder is
            where this process works, or holds what the generator is made of.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{folder} is a file: export to a folder")
    here = Path.cwd().resolve()
    if target == here or target in here.parents:
        raise InputError(f"{folder} is the folder that this process works in: name one inside it")
    root = getattr(generator.pipeline, "root", None)
    if root is not None and (target == Path(root).resolve() or target in Path(root).resolve().parents):
        raise InputError(f"{folder} holds the pipeline that the generator is read from: choose another folder")
    if target.is_dir() and any(target.iterdir()):
        if not _is_export(target):
            raise InputError(
                f"{folder} already holds files and is no earlier export ({FACTS} of one is missing): choose another "
                "folder, --overwrite will not delete it"
            )
        if not overwrite:
            raise InputError(f"{folder} already holds an export: choose another folder, or --overwrite")
    return target


def _is_export(folder: Path) -> bool:
    try:
        return str(read_json(folder / FACTS).get("format")).startswith(OURS)
    except InputError:
        return False


@contextmanager
def taking_place(target: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of ``target`` when all is done, and is gone if anything fails.

    A killed process leaves at most hidden folders beside the target; the next export there clears them away, and puts
    back an old export that had just been moved aside.

    Raises:
        InputError: the place cannot be written.
    """
    work, aside = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old.tmp"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear(target)
        work.mkdir()
        yield work
        if target.exists():
            target.rename(aside)
        try:
            work.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}: choose another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def clear(target: Path) -> None:
    """Removes what killed processes of this machine left beside ``target``, and restores what they had moved aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.(old\.)?tmp")
    for left in target.parent.iterdir():
        found = pattern.fullmatch(left.name)
        if found is None or not left.is_dir() or _alive(int(found[1])):
            continue
        if found[2] and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process of this number runs; of our own nothing is under way when an export starts."""
    if process == os.getpid():
        return False
    with contextlib.suppress(PermissionError):
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True
