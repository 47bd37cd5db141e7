"""Nothing in the packages runs what it reads: no pickles, no evaluation of text; one restricted reader of published weights."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedgc", "attacks", "defenses", "eval")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "torch.load", "np.load", "numpy.load", "torch.jit.load"}
READER = ROOT / "fedgc/pipeline/published.py"  # facenet-pytorch publishes its weights as a pickle


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_executes_what_it_reads(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert not MODULES & set(imported(tree))
    found = [(name, call) for name, call in called(tree) if name in CALLS]
    if file == READER:
        ((name, call),) = found
        assert name == "torch.load"
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"
    else:
        assert not [name for name, _ in found]
