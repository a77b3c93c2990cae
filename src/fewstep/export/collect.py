"""Collects definitions of this library, with all that they need, into one Python file.

The definitions are collected from the sources themselves by their syntax trees, so that nothing is written twice: what
an exported file computes is what the library computes.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fewstep.errors import InputError

HOME = "fewstep"
# What writes files and reads features stays at home: a shipped denoiser is only called.
OMIT = {("fewstep.core.denoiser", "Precond"): frozenset({"describe", "features"})}
# Class decorators that enter a class into a table; the one class that is shipped is entered by hand.
REGISTRIES = frozenset({"network", "preconditioning"})
WIDTH = 120

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class Entity(NamedTuple):
    """A definition of this library (``origin`` its module) or, with ``outside``, a name imported from elsewhere."""

    origin: str
    name: str
    outside: bool = False
    alias: str = ""


class Source:
    """The top-level definitions and imports of one module, read from its text."""

    def __init__(self, module: str) -> None:
        spec = find_spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise InputError(f"{module} has no Python source to export: install fewstep from its wheel or repository")
        self.module, text = module, Path(spec.origin).read_text()
        self.package = spec.origin.endswith("__init__.py")
        self.lines = text.splitlines()
        self.tree = ast.parse(text)
        self.definitions: dict[str, Definition] = {}
        self.imports: dict[str, Entity] = {}
        self.unknown: set[str] = set()
        self.docs: dict[int, int] = {}
        before: ast.stmt | None = None
        for node in self.tree.body:
            self._take(node)
            if isinstance(before, ast.Assign | ast.AnnAssign) and _is_text(node):
                self.docs[before.lineno] = node.end_lineno or node.lineno
            before = node

    def _take(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for name in (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)):
                self.definitions[name.id] = node
        elif isinstance(node, ast.Import):
            for item in node.names:
                bound = item.asname or item.name.split(".")[0]
                self.imports[bound] = Entity(item.name, "", True, bound)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level and node.module != "__future__":
            ours = node.module.split(".")[0] == HOME
            for item in node.names:
                bound = item.asname or item.name
                alias = "" if ours else bound
                self.imports[bound] = Entity(node.module, item.name, not ours, alias)
        elif isinstance(node, ast.If):
            # Names that only type checkers see.
            self.unknown |= {
                (a.asname or a.name) for n in ast.walk(node) if isinstance(n, ast.ImportFrom) for a in n.names
            }


source_of: Callable[[str], Source] = cache(Source)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


class _Free(ast.NodeVisitor):
    """Finds the Name nodes of a definition that mean something of the module, not of a function inside it."""

    def __init__(self) -> None:
        self.found: list[ast.Name] = []
        # Names of a class body are seen by its own statements and not by its methods.
        self.scopes: list[tuple[bool, set[str]]] = []

    def _inside(self, of_class: bool, names: set[str], nodes: Iterable[ast.AST]) -> None:
        outer = self.scopes
        self.scopes = [s for s in outer if of_class or not s[0]] + [(of_class, names)]
        for node in nodes:
            self.visit(node)
        self.scopes = outer

    def visit_Name(self, node: ast.Name) -> None:
        """Keeps a name that no enclosing scope binds."""
        attribute = bool(self.scopes) and self.scopes[-1][0] and not isinstance(node.ctx, ast.Load)
        if not attribute and not any(node.id in names for _, names in self.scopes):
            self.found.append(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Decorators, defaults and annotations belong to the outside, the body does not."""
        for outside in (*node.decorator_list, node.args, *([node.returns] if node.returns else [])):
            self.visit(outside)
        self._inside(False, _arguments(node.args) | _bound(node.body), node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """As a function without statements."""
        self.visit(node.args)
        self._inside(False, _arguments(node.args), [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Decorators and bases belong to the outside."""
        for outside in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(outside)
        self.class_body(node.body)

    def class_body(self, body: Iterable[ast.stmt]) -> None:
        """A name of a class body means the module's until the body has bound it."""
        seen: set[str] = set()
        for statement in body:
            self._inside(True, seen, [statement])
            seen = seen | _bound([statement])

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        self.visit(node.generators[0].iter)
        targets = _bound([g.target for g in node.generators])
        values = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        later = [g.iter for g in node.generators[1:]] + [test for g in node.generators for test in g.ifs]
        self._inside(False, targets, [*values, *later])

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension


def _arguments(args: ast.arguments) -> set[str]:
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return {a.arg for a in every if a is not None}


def _bound(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that these statements bind in their own scope."""
    names: set[str] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            own = getattr(node, "name", None)
            names |= {own} if isinstance(own, str) else set()
            todo += ast.iter_child_nodes(node)
    return names


class Bundle:
    """Collects definitions with everything that they need; :meth:`text` is the file."""

    def __init__(self, omit: Mapping[tuple[str, str], frozenset[str]] = OMIT) -> None:
        self.omit = omit
        self.uses: dict[Entity, dict[str, Entity]] = {}

    def add(self, module: str, name: str) -> Entity:
        """Adds a top-level definition of a module and what it needs.

        Raises:
            InputError: there is no such definition, or it imports a part of the library in a way that cannot be copied.
        """
        source = source_of(module)
        if name in source.imports:
            found = source.imports[name]
            return found if found.outside else self.add(found.origin, found.name)
        if name not in source.definitions:
            raise InputError(f"{module} has no top-level definition {name!r}: a file cannot be made of it")
        node, entity = source.definitions[name], Entity(module, name)
        if entity in self.uses:
            return entity
        needs: dict[str, Entity] = {}
        self.uses[entity] = needs
        self._check_imports(module, node)
        for used in self._free(entity):
            if used.id in source.definitions or used.id in source.imports:
                needs[used.id] = self.add(module, used.id)
            elif not hasattr(builtins, used.id) and used.id not in source.unknown:
                raise InputError(f"{module} uses {used.id!r}, which it neither defines nor imports by name")
        return entity

    def _check_imports(self, module: str, node: Definition) -> None:
        for part in self._kept(node, module):
            for inner in ast.walk(part):
                names = [a.name for a in inner.names] if isinstance(inner, ast.Import) else []
                names += [inner.module or ""] if isinstance(inner, ast.ImportFrom) else []
                if any(n.split(".")[0] == HOME for n in names):
                    raise InputError(f"{module} imports {names[0]} inside a definition: import it by name at the top")

    def _kept(self, node: Definition, module: str) -> Iterator[ast.AST]:
        """The parts of a definition that are copied."""
        left_out = self.omit.get((module, getattr(node, "name", "")), frozenset())
        if not isinstance(node, ast.ClassDef):
            yield node
            return
        yield from (*node.bases, *node.keywords)
        yield from (d for d in node.decorator_list if not _registers(d))
        yield from (s for s in node.body if getattr(s, "name", None) not in left_out)

    def _free(self, entity: Entity) -> list[ast.Name]:
        node = source_of(entity.origin).definitions[entity.name]
        finder = _Free()
        if isinstance(node, ast.ClassDef):
            kept = list(self._kept(node, entity.origin))
            for part in (n for n in kept if n not in node.body):
                finder.visit(part)
            finder.class_body([s for s in node.body if s in kept])
        else:
            finder.visit(node)
        return finder.found

    def _order(self) -> list[str]:
        """The modules, each after those that its definitions use."""
        order: list[str] = []

        def visit(module: str) -> None:
            if module in order:
                return
            others = [n.origin for e, needs in self.uses.items() if e.origin == module for n in needs.values()]
            ours = {e.origin for e in self.uses} - {module}
            for other in [o for o in dict.fromkeys(others) if o in ours]:
                visit(other)
            order.append(module)

        for module in dict.fromkeys(e.origin for e in self.uses):
            visit(module)
        return order

    def text(self, heading: str, tail: str = "") -> str:
        """The file: ``heading`` as its docstring, imports, definitions in order of use, and ``tail``."""
        names = self.names()
        imports = _imports({e: n for e, n in names.items() if e.outside})
        parts = [f'"""{heading}"""\n\nfrom __future__ import annotations' + (f"\n\n{imports}" if imports else "")]
        for module in self._order():
            own = [e for e in names if e.origin == module and not e.outside]
            # Names that are assigned together are one definition.
            once = {source_of(module).definitions[e.name].lineno: e for e in own}
            pieces = [self._piece(e, names) for e in once.values()]
            parts += [f"# From {module.replace('.', '/')}.py\n\n{pieces[0]}", *pieces[1:]]
        return "\n\n\n".join([*parts, *([tail.strip()] if tail else [])]) + "\n"

    def names(self) -> dict[Entity, str]:
        """What everything is called in the file: imports first, then definitions in the order of the file."""
        order = self._order()
        line = {e: source_of(e.origin).definitions[e.name].lineno for e in self.uses}
        own = sorted(self.uses, key=lambda e: (order.index(e.origin), line[e]))
        outside = {n for needs in self.uses.values() for n in needs.values() if n.outside}
        return _names([*sorted(outside), *own])

    def _piece(self, entity: Entity, names: Mapping[Entity, str]) -> str:
        """The text of one definition with its comments, without what is left out, with its new names."""
        source = source_of(entity.origin)
        node = source.definitions[entity.name]
        needs = self.uses[entity]
        changed = {n: names[e] for n, e in needs.items() if names[e] != n}
        if names[entity] != entity.name:
            changed[entity.name] = names[entity]
        lines = {i: source.lines[i - 1].encode() for i in _span(source, node)}
        for used in sorted(self._free(entity), key=lambda n: (n.lineno, -n.col_offset)):
            if used.id in changed:
                _replace(lines, used.lineno, used.col_offset, used.id, changed[used.id], entity)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in changed:
            column = lines[node.lineno].index(node.name.encode(), node.col_offset + 3)
            _replace(lines, node.lineno, column, node.name, changed[node.name], entity)
        for i in _left_out(node, self.omit.get((entity.origin, entity.name), frozenset())):
            lines.pop(i, None)
        return _tidy([lines[i].decode() for i in sorted(lines)])


def _registers(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") in REGISTRIES


def _names(entities: Iterable[Entity]) -> dict[Entity, str]:
    """A name for each, its own where that is free, else with its module's."""
    names: dict[Entity, str] = {}
    for entity in entities:
        name = own = entity.alias or entity.name or entity.origin
        while name in names.values():
            name = f"{name}_{entity.origin.rsplit('.', 1)[-1]}" if name == own else f"{name}_"
        names[entity] = name
    return names


def _span(source: Source, node: Definition) -> range:
    """The lines of a definition: its decorators, the comments above it, and the text that documents a value."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    while first > 1 and source.lines[first - 2].startswith("#"):
        first -= 1
    return range(first, source.docs.get(node.lineno, node.end_lineno or node.lineno) + 1)


def _left_out(node: Definition, methods: frozenset[str]) -> Iterator[int]:
    for decorator in getattr(node, "decorator_list", []):
        if _registers(decorator):
            yield from range(decorator.lineno, (decorator.end_lineno or decorator.lineno) + 1)
    for inner in getattr(node, "body", []):
        if getattr(inner, "name", None) in methods:
            first = min([inner.lineno, *(d.lineno for d in inner.decorator_list)])
            yield from range(first, (inner.end_lineno or inner.lineno) + 1)


def _replace(lines: dict[int, bytes], line: int, column: int, old: str, new: str, where: Entity) -> None:
    text = lines[line]
    end = column + len(old.encode())
    if text[column:end] != old.encode():
        raise InputError(
            f"{where.origin} uses {old!r} inside a formatted string and another file does so too: rename it"
        )
    lines[line] = text[:column] + new.encode() + text[end:]


def _tidy(lines: list[str]) -> str:
    """No blank lines at the ends and at most one in a row."""
    kept: list[str] = []
    for text in lines:
        if text.strip() or (kept and kept[-1].strip()):
            kept.append(text)
    return "\n".join(kept).strip("\n")


def _imports(names: Mapping[Entity, str]) -> str:
    """The import statements, the standard library first."""
    plain, named = [], dict[str, list[str]]()
    for entity, name in names.items():
        if entity.name:
            named.setdefault(entity.origin, []).append(entity.name + (f" as {name}" if name != entity.name else ""))
        else:
            plain.append((entity.origin, f"import {entity.origin}" + (f" as {name}" if name != entity.origin else "")))
    lines = [*plain, *((m, _wrapped(f"from {m} import ", sorted(items))) for m, items in named.items())]
    groups = {True: list[str](), False: list[str]()}
    for module, text in sorted(lines, key=lambda item: (item[1].startswith("from"), item[0])):
        groups[module.split(".")[0] in sys.stdlib_module_names].append(text)
    return "\n\n".join("\n".join(group) for group in (groups[True], groups[False]) if group)


def _wrapped(head: str, items: list[str]) -> str:
    line = head + ", ".join(items)
    return line if len(line) <= WIDTH else head + "(\n    " + ",\n    ".join(items) + ",\n)"
