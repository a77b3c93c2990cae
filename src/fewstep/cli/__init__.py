"""The command line. ``fewstep COMMAND --help`` explains each; bad input is one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from fewstep import __version__
from fewstep.cli.base import from_json
from fewstep.core.state import read_json
from fewstep.errors import CollapseError, InputError, NonFiniteError, unknown

COMMANDS = (
    "demo",
    "train",
    "sample",
    "calibrate",
    "pairs",
    "distill",
    "collaborate",
    "evaluate",
    "compare",
    "trace",
    "compare-tableaux",
    "export",
    "export-sampler",
    "show",
    "serve",
    "methods",
)

# The libraries that write to stderr by themselves, and what sets how much.
_LIBRARIES = {
    "diffusers": "DIFFUSERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "transformers": "TRANSFORMERS_VERBOSITY",
}

USAGE = """fewstep: make a trained image generator fast and small, and prove that it is still good

  fewstep demo                     train, calibrate, distil, measure, and show it on a page
  fewstep train                    train a denoiser from pictures
  fewstep sample GENERATOR         make pictures
  fewstep calibrate GENERATOR      fit a sampler of few evaluations to a generator, without training
  fewstep pairs GENERATOR          noises and the pictures it makes of them, for methods that learn from such pairs
  fewstep distill METHOD           train a student of few steps
  fewstep collaborate S T          let the teacher refine the worst pictures of a student
  fewstep evaluate GENERATOR       score pictures against real ones
  fewstep compare A B ...          which generator to use at how many evaluations, on a page
  fewstep trace SCHEDULER -o FILE  a scheduler of diffusers as a tableau
  fewstep compare-tableaux A B     where two tableaux differ, row by row
  fewstep export GENERATOR         a folder that diffusers opens without fewstep, proved
  fewstep export-sampler SAMPLER   its levels as a list, for ComfyUI, diffusers and others
  fewstep show PATH                look at a tableau, a generator or a run; --geometry: its trajectories
  fewstep serve GENERATOR ...      compare generators on a local page, at the same seeds
  fewstep methods [METHOD]         what can be distilled, with defaults and sources

  fewstep COMMAND --help           flags, defaults and units
  fewstep COMMAND --recipe FILE    repeat a run from its recipe.json; further flags change it
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 0, 2 after bad input, 1 when training diverged, or 3 when its samples collapsed."""
    try:
        with _quiet():
            run(list(sys.argv[1:] if argv is None else argv))
    except (InputError, NonFiniteError, CollapseError) as error:
        sys.stderr.write(f"fewstep: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, InputError) else 3 if isinstance(error, CollapseError) else 1)
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"fewstep: {name}{error.strerror or error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("fewstep: stopped; a run with checkpoints goes on with --resume\n")
        sys.exit(130)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what libraries say beside their errors: bad input is one line, and remarks on it are not ours.

    The libraries' own environment variables and Python's ``-W`` bring it back.
    """
    before = {}
    for library, variable in _LIBRARIES.items():
        asked = variable in os.environ
        # Read when the library is imported; the level is for one that is there already.
        os.environ.setdefault(variable, "error")
        logger = logging.getLogger(library)
        if not asked and logger.level:
            before[logger] = logger.level
            logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.filterwarnings("ignore", module=r"(?!fewstep\b)")
                warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def run(argv: list[str]) -> None:
    """Parses and runs a command line.

    Raises:
        InputError: bad input of any kind.
    """
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if argv[0] == "--version":
        sys.stdout.write(f"fewstep {__version__}\n")
        return
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    recipe, rest = _recipe(command, rest)
    # Imported by name so that one command does not pay for the imports of all.
    module: Any = import_module(f"fewstep.cli.{command.replace('-', '_')}")
    if command in ("distill", "train"):
        kind, rest = module.command_for(rest, recipe)
    else:
        kind = getattr(module, "".join(part.capitalize() for part in command.split("-")))
    default = None if recipe is None else from_json(kind, recipe, "recipe arguments")
    parse(kind, command, rest, default).run()


def parse(kind: Any, command: str, argv: list[str], default: Any) -> Any:
    """The command's dataclass from its flags.

    Raises:
        InputError: what the parser said, on one line.
    """
    said = io.StringIO()
    given = {} if default is None else {"default": default}
    wants_help = "-h" in argv or "--help" in argv
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=f"fewstep {command}", args=argv, **given)
    except SystemExit as stop:
        if wants_help or not stop.code:
            raise
        raise InputError(_one_line(said.getvalue(), command)) from None


def _one_line(box: str, command: str) -> str:
    """The parser's framed message without its frame and its repeated help."""
    lines = [re.sub(r"[│╭╮╰╯─┌┐└┘|]+", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"^(Parsing error|Required options|Unrecognized options|Invalid \w+)\s+", r"", text)
    return f"{text.split('For full helptext')[0].strip()} (fewstep {command} --help)"


def _recipe(command: str, argv: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """Takes ``--recipe FILE`` out of the flags and reads the arguments that it holds."""
    if "--recipe" not in argv:
        return None, argv
    at = argv.index("--recipe")
    if at + 1 >= len(argv):
        raise InputError("--recipe needs a file: the recipe.json of an earlier run")
    body = read_json(Path(argv[at + 1]))
    if body.get("command") != command or not isinstance(body.get("arguments"), dict):
        raise InputError(f"{argv[at + 1]} is a recipe of {body.get('command')!r}, not of {command!r}")
    return body["arguments"], argv[:at] + argv[at + 2 :]
