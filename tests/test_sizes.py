"""Nothing is too long to be read at once: no function above 60 lines, no file above 500, few files from a call to its kernel."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

import absgd_fast as ab
from absgd_fast import _backend

ROOT = Path(__file__).resolve().parents[1]
FUNCTION, FILE, FILES_TO_THE_KERNEL = 60, 500, 8  # lines of a function without its docstring; lines of a file; files
MOST_EXCEPTIONS = 5

# What may be longer, and why: {"file": reason} or {"file: function": reason}. Whatever has become short enough is taken out.
EXCEPTIONS = {}

# The files that one loss on the CPU passes from ABLoss.forward to the kernel, in this order, and by which word of an earlier file
# a reader finds each: the word stands in both of them, or is the name of the file. What a file asks others for and comes
# back from (checks of arguments, the state's numbers) is not on the way.
WAY_OF_A_LOSS = {
    "absgd_fast/robust/loss.py": None,
    "absgd_fast/robust/paths.py": ("absgd_fast/robust/loss.py", "fused("),
    "absgd_fast/ops/schemas.py": ("absgd_fast/robust/paths.py", "robust_logit_loss"),
    "csrc/ops/cpu/weights.h": ("absgd_fast/ops/schemas.py", "robust_logit_loss"),
    "csrc/ops/cpu/losses.h": ("csrc/ops/cpu/weights.h", "losses.h"),
    "csrc/cpu/dispatch.cpp": ("csrc/ops/cpu/losses.h", "cpu_kernels()"),
    "csrc/cpu/losses.cpp": ("csrc/ops/cpu/losses.h", "logit_stats"),
    "csrc/cpu/along_classes.h": ("csrc/cpu/losses.cpp", "along_classes.h"),
}


# ---- how long is it ----------------------------------------------------------------------------------------------------


def python_functions(source):
    """(name, lines) of every function and method. Its docstring does not count; functions inside count with the outer one."""

    def look(body, prefix=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                words = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
                yield prefix + node.name, node.end_lineno - first + 1 - (words.end_lineno - words.lineno + 1 if words else 0)
            elif isinstance(node, ast.ClassDef):
                yield from look(node.body, f"{prefix}{node.name}.")
            else:  # what stands under an if, a try or a with
                for field in ("body", "orelse", "finalbody", "handlers"):
                    yield from look(getattr(node, field, []), prefix)

    yield from look(ast.parse(source).body)


COMMENT = r"//[^\n]*|/\*.*?\*/"
STRING = r'R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)"|"(?:\\.|[^"\\\n])*"'
CHARACTER = r"(?<!\w)'(?:\\.|[^'\\\n])+'"  # behind a digit ' only groups
WORDS = re.compile(f"{COMMENT}|{STRING}|{CHARACTER}", re.DOTALL)
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
TYPES = re.compile(r"\b(?:namespace|struct|class|union|enum|extern)\b")
RESULT = re.compile(r"(?:\s|const|noexcept|override)*(?:->.*)?", re.DOTALL)  # what may stand between the parameters and the body
NO_FUNCTIONS = {"if", "for", "while", "switch", "catch", "return", "requires"}


def blank(found):
    """The same lines with nothing on them."""
    return re.sub(r"[^\n]", " ", found[0])


def without_parentheses(text):
    """ "int f(int (*)(int)) const" -> "int f() const"."""
    before = None
    while before != text:
        before, text = text, re.sub(r"\([^()]*\)", "\0", text)
    return text.replace("\0", "()")


def function_of(head):
    """The name of the function that a brace behind `head`, the text since the statement before, opens; None for other braces.

    A function has a list of parameters, assigns nothing in front of it, and is no namespace and no type.
    """
    head = re.sub(r"\b__\w+__\s*\(\)", " ", without_parentheses(head))  # __launch_bounds__(), __attribute__()
    head = re.sub(r"template\s*<.*?>(?=\s*[\w:\[])", " ", head, flags=re.DOTALL)
    declared = re.search(r"(operator\s*[^\s\w(]+|[\w:~]+)\s*\(\)", head)
    if not declared or "=" in head[: declared.start()] or declared[1] in NO_FUNCTIONS:
        return None
    is_type = TYPES.search(head[: declared.start()]) and not RESULT.fullmatch(head[declared.end() :])
    return None if is_type else declared[1]


def cpp_functions(source):
    """(name, lines) of every macro, and of every function from the line of its opening brace to that of the closing one.

    Lambdas and functions of local types count with the function around them.
    """
    text = WORDS.sub(blank, source)
    macros = [(re.match(r"\s*#\s*define\s+(\w+)", found[0]), found[0].count("\n") + 1) for found in DIRECTIVE.finditer(text)]
    out = [(f"#define {name[1]}", lines) for name, lines in macros if name]
    text = DIRECTIVE.sub(blank, text)
    scopes, start = [], 0  # of each open brace: the name and first line of its function, or None
    for found in re.finditer(r"[{};]", text):
        at, line = found.start(), text.count("\n", 0, found.start()) + 1
        if found[0] == "{":
            name = None if any(scopes) else function_of(text[start:at])
            scopes.append((name, line) if name else None)
        elif found[0] == "}" and scopes and (scope := scopes.pop()):
            out.append((scope[0], line - scope[1] + 1))
        start = at + 1
    return out


def files():
    """{path: text} of the package and the native code."""
    found = [*(ROOT / "absgd_fast").rglob("*.py"), *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(found)}


def too_long(sources):
    """{"file" or "file: function": lines} of whatever is above its limit."""
    out = {}
    for name, source in sources.items():
        if (lines := source.count("\n")) > FILE:
            out[name] = lines
        for function, lines in python_functions(source) if name.endswith(".py") else cpp_functions(source):
            if lines > FUNCTION:
                out[f"{name}: {function}"] = max(lines, out.get(f"{name}: {function}", 0))
    return out


def test_nothing_is_too_long_to_be_read_at_once():
    found = {what: lines for what, lines in too_long(files()).items() if what not in EXCEPTIONS}
    assert not found, "\n" + "\n".join(f"{lines:5} lines: {what}" for what, lines in found.items())


def test_an_exception_is_needed_and_has_its_reason():
    unneeded = sorted(EXCEPTIONS.keys() - too_long(files()).keys())
    assert not unneeded, f"these are short enough by now: {', '.join(unneeded)}"
    assert len(EXCEPTIONS) <= MOST_EXCEPTIONS and all(len(reason.split()) > 4 for reason in EXCEPTIONS.values())


def test_functions_of_python_are_measured():
    source = '''
if True:
    @decorated
    def f():
        """Words
        that do not count."""
        def inside():
            pass
        return 1
class A:
    async def g(self): pass
'''
    assert list(python_functions(source)) == [("f", 5), ("A.g", 1)]


def test_functions_of_cpp_are_measured():
    source = r"""
#include <a.h>  // {
namespace x { namespace {
template <class T, int N = (2)> struct Pair : Base<T> {
  T first{}, second = {};
  Pair(T a) : first{a} {}
  int get() const noexcept {
    auto f = [&](int i) { return i; };
    return f(1'000);
  }
};
enum class Kind { One, Two };
constexpr int table[] = {1, 2};
const auto made = make([] { return 1; });
static auto sum(const char* text = "}{", char c = '{') -> int
{
  if (c == '\n') {
    return 1;
  }
  return 0;
}
struct Result run(Args args) {
  return {};
}
__global__ void __launch_bounds__(256, 2) kernel(int (*f)(int), Args<T> args) {
}
Pair operator+(Pair a, Pair b) { return a; }
#define TWICE(a) \
  do { a; a; } while (0)
}}
"""
    assert cpp_functions(source) == [
        ("#define TWICE", 2),
        ("Pair", 1),
        ("get", 4),
        ("sum", 6),
        ("run", 3),
        ("kernel", 2),
        ("operator+", 1),
    ]


def test_what_is_too_long_is_found():
    python = "def f():\n" + "    pass\n" * FUNCTION
    cpp = "void g() {\n" + "  h();\n" * (FUNCTION - 2) + "}\n"
    sources = {"a.py": python, "b.cpp": cpp, "c.h": cpp.replace("}", "\n}"), "d.py": "\n" * FILE, "e.py": "\n" * (FILE + 1)}
    assert too_long(sources) == {"a.py: f": FUNCTION + 1, "c.h: g": FUNCTION + 1, "e.py": FILE + 1}


# ---- how far is it to the kernel ---------------------------------------------------------------------------------------


def test_a_loss_passes_few_files():
    assert len(WAY_OF_A_LOSS) <= FILES_TO_THE_KERNEL


@pytest.mark.parametrize("name", list(WAY_OF_A_LOSS)[1:])
def test_an_earlier_file_names_this_one(name):
    """So that the list says what the code does."""
    earlier, word = WAY_OF_A_LOSS[name]
    order = list(WAY_OF_A_LOSS)
    assert order.index(earlier) < order.index(name)
    assert word in (ROOT / earlier).read_text(), f"{earlier} does not say {word!r}"
    assert word == Path(name).name or word in (ROOT / name).read_text(), f"{name} does not say {word!r}"


@pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
@pytest.mark.parametrize("eager", [False, True], ids=["dispatcher", "eager module"])
def test_a_loss_runs_in_these_files(eager, monkeypatch):
    """The package's files on the stack when the operator is called. The first call chooses a backend, so the second is used."""
    package, stacks = Path(ab.__file__).parent, []
    criterion, logits, target = ab.ABLoss(lam=0.5), torch.randn(128, 10, requires_grad=True), torch.zeros(128, dtype=torch.long)
    operators = criterion.operators_for(logits)
    if not eager:
        monkeypatch.setattr(operators, "eager", None)
    elif operators.eager is None:
        pytest.skip(f"no eager module: {_backend.why_not_eager()}")
    criterion(logits, target)
    operator = operators.eager.repeat if eager else operators.robust_logit_loss

    def profile(frame, event, argument):
        if event == "c_call" and argument == operator:
            stacks.append([])
            while frame is not None:
                stacks[-1].insert(0, Path(frame.f_code.co_filename))
                frame = frame.f_back

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        criterion(logits, target)
    finally:
        sys.setprofile(before)
    (stack,) = stacks
    passed = [f"absgd_fast/{path.relative_to(package).as_posix()}" for path in stack if package in path.parents]
    way = [name for name in WAY_OF_A_LOSS if name.endswith(".py") and "schemas" not in name]
    if eager:
        way[1:] = ["absgd_fast/robust/repeat.py"]
    assert list(dict.fromkeys(passed)) == way
