"""No test hides another: a second function of the same name in a module or class replaces the first, which then never runs."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
MODULES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py") if "__pycache__" not in path.parts)


def defined(body):
    """(name, line, statement) of what these statements define, whatever branch of an if, try or with they stand in."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name, statement.lineno, statement
            continue
        # one of the branches defines the name, so what they have in common counts once
        branches = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
        branches += [handler.body for handler in getattr(statement, "handlers", [])]
        found = {name: (name, line, node) for branch in branches for name, line, node in defined(branch)}
        yield from found.values()


def twice(source):
    """Functions and classes defined twice in a module, and methods defined twice in a class of it, as "name (line n, line m)".

    A property and its setter, and overloads, share a name on purpose: they carry a decorator that names it or is one of typing's.
    """
    out = []

    def look(body, prefix):
        seen = {}
        for name, line, node in defined(body):
            continues = [ast.unparse(d) for d in node.decorator_list]
            if name in seen and not any(d.startswith(f"{name}.") for d in continues):
                out.append(f"{prefix}{name} (line {seen[name]}, line {line})")
            if not any(d.endswith("overload") for d in continues):
                seen[name] = line
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{name}.")

    look(ast.parse(source).body, "")
    return out


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_is_defined_twice(path):
    assert twice((TESTS / path).read_text()) == []


def test_there_is_something_to_check():
    assert {"test_gpu_losses.py", "test_losses.py", "conftest.py", "cuda_on_cpu/suite.py"} <= {
        path.as_posix() for path in MODULES
    }


HIDING = {
    "functions": ("def test_a(): pass\ndef test_b(): pass\ndef test_a(): pass\n", ["test_a (line 1, line 3)"]),
    "decorated": ("@over(x=[1])\ndef test_a(x): pass\n@gpu\ndef test_a(): pass\n", ["test_a (line 2, line 4)"]),
    "methods": ("class TestA:\n    def test_b(self): pass\n    def test_b(self): pass\n", ["TestA.test_b (line 2, line 3)"]),
    "classes": ("class A: pass\nclass A: pass\n", ["A (line 1, line 2)"]),
    "class and function": ("class A: pass\ndef A(): pass\n", ["A (line 1, line 2)"]),
    "before a branch": ("def f(): pass\nif x:\n    def f(): pass\n", ["f (line 1, line 3)"]),
    "asynchronous": ("async def f(): pass\ndef f(): pass\n", ["f (line 1, line 2)"]),
}


@pytest.mark.parametrize("source, found", HIDING.values(), ids=HIDING)
def test_what_hides_is_found(source, found):
    assert twice(source) == found


APART = {
    "two classes": "class A:\n    def f(self): pass\nclass B:\n    def f(self): pass\ndef f(): pass\n",
    "inner functions": "def a():\n    def f(): pass\ndef b():\n    def f(): pass\n",
    "branches": "try:\n    def f(): pass\nexcept ImportError:\n    def f(): pass\n",
    "property": "class A:\n    @property\n    def f(self): pass\n    @f.setter\n    def f(self, x): pass\n",
    "overloads": "@typing.overload\ndef f(x: int): ...\n@typing.overload\ndef f(x: str): ...\ndef f(x): pass\n",
}


@pytest.mark.parametrize("source", APART.values(), ids=APART)
def test_what_does_not_hide_is_left_alone(source):
    assert twice(source) == []
