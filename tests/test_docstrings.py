"""The language of docstrings: verbs and nouns first, and references that resolve."""

import ast
import functools
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for folder in ("a2fpn", "train", "hub", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
CLAUSE = re.compile(r"(what|how|which|where|whether|who|whose|that|when|why)\b", re.IGNORECASE)
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(?:[^`<]*<)?[~!]?([\w.]+)>?`")
BRITISH = re.compile(r"colour|centre|licence|optimis|normalis|neighbour|labelled|grey", re.IGNORECASE)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Qualified names in a file with their docstrings."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{name}.{child.name}".lstrip("."), ast.get_docstring(child) or ""
                yield from visit(child, f"{name}.{child.name}".lstrip("."))
            else:
                yield from visit(child, name)

    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield "", ast.get_docstring(tree) or ""
    yield from visit(tree, "")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("folder", ["a2fpn", "train", "hub", "benchmarks"])
def test_the_first_line_is_a_verb_or_a_noun_phrase(folder: str) -> None:
    """A clause says what a thing is about, not what it is or does."""
    paths = [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]
    assert paths
    assert [(path.name, name, text) for path in paths for name, text in docstrings(path) if CLAUSE.match(text)] == []


def scopes(path: Path, name: str) -> list[str]:
    """Prefixes that a name in a docstring is looked up with: its class, its module, the package, none."""
    parts = name.split(".") if name[:1].isupper() else []
    classes = [f"{module_name(path)}.{'.'.join(parts[:count])}." for count in range(len(parts), 0, -1)]
    return [*classes, f"{module_name(path)}.", f"{module_name(path).rpartition('.')[0]}.".lstrip("."), ""]


@functools.cache
def module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@functools.cache
def exists(name: str) -> bool:
    """Return whether a dotted name can be imported; fields that a class annotates count."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        value: object = module(".".join(parts[:count]))
        if value is None:
            continue
        for part in parts[count:]:
            if part not in getattr(value, "__annotations__", {}) and not hasattr(value, part):
                return False
            value = getattr(value, part, None)
        return True
    return False


def test_every_reference_resolves() -> None:
    """Sphinx leaves one that does not as plain text."""
    references = {
        (str(path.relative_to(ROOT)), name, reference): any(exists(scope + reference) for scope in scopes(path, name))
        for path in FILES
        for name, text in docstrings(path)
        for reference in ROLE.findall(text)
    }
    assert [reference for reference, resolved in references.items() if not resolved] == []
    assert len(references) > 100


def test_names_are_spelled_as_in_torch() -> None:
    found = {
        token.string
        for path in FILES
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type == tokenize.NAME and BRITISH.search(token.string)
    }
    assert found == set()
