"""Errors a user can mend, and the one helper that phrases the commonest of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A bad value from outside: its message names the value, what was expected and the fix, on one line.

    The command line prints the message and exits with 2; nothing has been written when it is raised.
    """


class NonFiniteError(RuntimeError):
    """Training produced too many non-finite losses in a row; the message names role, step and loss."""


class CollapseError(RuntimeError):
    """The samples of a run lost their variety, or stopped being pictures; the message says what, where and the fix.

    The command line prints the message and exits with 3. What the run had saved before is still there.
    """


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a table, with the nearest names first."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return InputError(f"unknown {what} {name!r}: {hint}choose one of {', '.join(names)}")
