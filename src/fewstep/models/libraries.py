"""Diffusers and transformers as optional guests: their classes by name, their logs kept back, their errors named."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from fewstep.errors import InputError


def library_class(library: str, name: str) -> Any:
    """A class of "diffusers" or "transformers" by name.

    Raises:
        InputError: the library is not installed, or this version has no such class.
    """
    try:
        module = import_module(library)
    except ModuleNotFoundError:
        raise InputError(f"{name} is a class of {library}, which is not installed: pip install 'fewstep[hf]'") from None
    found = getattr(module, name, None)
    if found is None:
        raise InputError(f"{library} {module.__version__} has no {name}: install a version that does")
    return found


def diffusers_class(name: str) -> Any:
    """A class of diffusers by name.

    Raises:
        InputError: diffusers is not installed, or this version has no such class.
    """
    return library_class("diffusers", name)


@contextlib.contextmanager
def opening(place: str | Path, class_name: str) -> Iterator[None]:
    """Turns what a library raises over a configuration or weights into an InputError that names their place.

    Only calls into the library belong inside: it raises whatever its own arithmetic does over a wrong value.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{place} cannot be opened as a {class_name}: {type(error).__name__}{': ' if said else ''}{said}"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back the libraries' progress bars, and warnings where the same is said in an InputError."""
    loggers = [import_module("diffusers.utils.logging")]
    if "transformers" in sys.modules:
        loggers.append(import_module("transformers.utils.logging"))
    before = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        # Above errors, because diffusers logs as errors what it then raises.
        logger.set_verbosity(logger.CRITICAL)
        logger.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # The name of the dtype's argument is changing, and only the old one is known to all versions.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level, bars in before:
            logger.set_verbosity(level)
            if bars:
                logger.enable_progress_bar()
