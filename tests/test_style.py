"""The figures of the house style, counted on this tree, so that they stay met.

`python tests/test_style.py [ROOT ...]` prints them as a table with one column per tree.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
# What can go two ways. A chain of `and` or `or` counts once, as does each `for` of a comprehension.
BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.BoolOp,
    ast.comprehension,
)


@dataclass(frozen=True)
class Source:
    """One Python file of a tree, parsed when first asked."""

    root: Path
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the syntax tree; the first is the module."""
        return list(ast.walk(ast.parse(self.text)))

    def filled_lines(self) -> int:
        """Number of non-blank lines: what every share is a share of."""
        return sum(bool(line.strip()) for line in self.text.splitlines())

    def place(self, line: int, what: str = "") -> str:
        return f"{self.path.relative_to(self.root)}:{line} {what}".rstrip()


@dataclass(frozen=True)
class Figure:
    """What was counted, and where: on failure the places say what to change."""

    value: float
    places: list[str]


@dataclass(frozen=True)
class Tree:
    """The files of a checkout. The product is all Python outside of the tests."""

    root: Path

    def python(self, *folders: str) -> list[Source]:
        paths = [path for folder in folders for path in (self.root / folder).rglob("*.py")]
        return [Source(self.root, path) for path in sorted(paths)]

    @cached_property
    def train(self) -> Source:
        return Source(self.root, self.root / "train.py")

    @cached_property
    def product(self) -> list[Source]:
        return [self.train, *self.python("nanochat", "tasks", "runs")]

    @cached_property
    def every_python(self) -> list[Source]:
        return [*self.product, *self.python("tests")]

    @cached_property
    def shell(self) -> list[Path]:
        found = [
            path for ending in ("*.sh", "*.slurm") for path in self.root.glob(f"runs/{ending}")
        ]
        return sorted(found) + sorted((self.root / ".ci").glob("*"))

    @cached_property
    def product_lines(self) -> int:
        return sum(source.filled_lines() for source in self.product)


def figure_of(places: list[str]) -> Figure:
    return Figure(len(places), places)


def per_thousand(tree: Tree, places: list[str]) -> Figure:
    return Figure(1000 * len(places) / tree.product_lines, places)


def too_long(source: Source) -> list[str]:
    lines = enumerate(source.text.splitlines(), 1)
    return [source.place(number) for number, line in lines if len(line) > COLUMNS]


def long_lines(tree: Tree) -> Figure:
    shell = [Source(tree.root, path) for path in tree.shell]
    return figure_of([place for source in tree.every_python + shell for place in too_long(source)])


def long_lines_share(tree: Tree) -> Figure:
    places = [place for source in tree.product for place in too_long(source)]
    return Figure(100 * len(places) / tree.product_lines, places)


def is_remark(line: str) -> bool:
    """Whether the line is a comment with content, not a shebang nor a directive for a tool."""
    words = line.strip().lstrip("#")
    directives = ("!", " noqa", " ruff:", " fmt:", " type:")
    return words.strip(" -=") != "" and not words.startswith(directives)


def comments_share(tree: Tree) -> Figure:
    """Share of lines with only a comment. The tokenizer tells comments from text in strings."""
    count = 0
    for source in tree.product:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT and token.line.strip() == token.string:
                count += is_remark(token.string)
    return Figure(100 * count / tree.product_lines, [])


def conditional_expressions(tree: Tree) -> Figure:
    return per_thousand(tree, places_of(tree, ast.IfExp))


def lambdas(tree: Tree) -> Figure:
    return per_thousand(tree, places_of(tree, ast.Lambda))


def places_of(tree: Tree, kind: type[ast.AST]) -> list[str]:
    return [
        source.place(node.lineno)
        for source in tree.product
        for node in source.nodes
        if isinstance(node, kind)
    ]


def tuple_assignments(tree: Tree) -> Figure:
    """`a, b = 1, 2`: several assignments on one line. Unpacking a call's result is none."""
    places = [
        source.place(node.lineno)
        for source in tree.product
        for node in source.nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]
    return per_thousand(tree, places)


def span(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def longest_function(tree: Tree) -> Figure:
    """Length with docstring and blank lines. Blocks of flags may be as long as there are flags."""
    found = [
        (span(node), source.place(node.lineno, f"{node.name}: {span(node)} lines"))
        for source in tree.product
        for node in source.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("parse_args")
    ]
    found.sort(reverse=True)
    return Figure(found[0][0], [place for _, place in found])


def training_loop(tree: Tree) -> ast.While:
    """The longest `while True` of train.py."""
    endless = [
        node
        for node in tree.train.nodes
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant)
    ]
    return max(endless, key=span)


def loop_lines(tree: Tree) -> Figure:
    loop = training_loop(tree)
    return Figure(span(loop), [tree.train.place(loop.lineno)])


def in_loop(tree: Tree, *kinds: type[ast.AST]) -> Figure:
    found = [node for node in ast.walk(training_loop(tree)) if isinstance(node, kinds)]
    # a `for` of a comprehension has no position of its own
    places = [tree.train.place(getattr(node, "lineno", 0), type(node).__name__) for node in found]
    return figure_of(places)


def loop_branches(tree: Tree) -> Figure:
    return in_loop(tree, *BRANCHES)


def loop_continues(tree: Tree) -> Figure:
    return in_loop(tree, ast.Continue)


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def unannotated(function: ast.FunctionDef, method: bool) -> list[str]:
    """Names of the arguments without a type, and "return" if the result has none."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    if method and not any(ast.unparse(each) == "staticmethod" for each in function.decorator_list):
        named = named[1:]
    named += arguments.kwonlyargs
    named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    missing = [each.arg for each in named if not each.annotation and not each.arg.startswith("_")]
    return missing + ["return"] * (function.returns is None)


def has_typed_fields(node: ast.ClassDef) -> bool:
    marks = [ast.unparse(mark) for mark in node.decorator_list + node.bases]
    return any("dataclass" in mark or "NamedTuple" in mark for mark in marks)


def untyped(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[int, str]]:
    """Line and name of each public function, method and field in this body that lacks a type."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node.name):
            missing = unannotated(node, method=bool(prefix))
            if missing:
                yield node.lineno, f"{prefix}{node.name}: {', '.join(missing)}"
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from untyped(node.body, f"{prefix}{node.name}.")
            if has_typed_fields(node):
                for field in node.body:
                    if isinstance(field, ast.Assign):
                        yield field.lineno, f"{prefix}{node.name}: {ast.unparse(field)}"


def missing_annotations(tree: Tree) -> Figure:
    return figure_of(
        [
            source.place(line, name)
            for source in tree.product
            for line, name in untyped(source.nodes[0].body)
        ]
    )


def renamed_modules(tree: Tree) -> Figure:
    """Modules of this project that a file, a test included, imports under another name."""
    found = []
    for source in tree.every_python:
        for node in source.nodes:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for alias in node.names:
                module = alias.name
                if isinstance(node, ast.ImportFrom):
                    module = f"{node.module}.{alias.name}"
                if alias.asname and alias.asname != alias.name and is_module(tree.root, module):
                    found.append(source.place(node.lineno, f"{module} as {alias.asname}"))
    return figure_of(found)


def is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@dataclass(frozen=True)
class Goal:
    """A figure and its limit: a maximum, or one to stay below, or a minimum."""

    count: Callable[[Tree], Figure]
    limit: float
    below: bool = False
    at_least: bool = False

    def met(self, value: float) -> bool:
        if self.at_least:
            return value >= self.limit
        if self.below:
            return value < self.limit
        return value <= self.limit

    def __str__(self) -> str:
        if self.at_least:
            return f">= {self.limit}"
        if self.below:
            return f"< {self.limit}"
        return f"<= {self.limit}"


GOALS = {
    "lines over 100 columns, % of the product": Goal(long_lines_share, 0),
    "lines over 100 columns, Python and shell": Goal(long_lines, 0),
    "comment-only lines, %": Goal(comments_share, 6, at_least=True),
    "conditional expressions per 1,000 lines": Goal(conditional_expressions, 20, below=True),
    "lambdas per 1,000 lines": Goal(lambdas, 5, below=True),
    "tuple-to-tuple assignments per 1,000 lines": Goal(tuple_assignments, 8, below=True),
    "longest function, lines": Goal(longest_function, 80),
    "training loop, lines": Goal(loop_lines, 90),
    "training loop, branch nodes": Goal(loop_branches, 30),
    "training loop, continue": Goal(loop_continues, 0),
    "public names without type annotations": Goal(missing_annotations, 0),
    "own modules imported under another name": Goal(renamed_modules, 0),
}


@pytest.fixture(scope="module")
def tree():
    return Tree(ROOT)


@pytest.mark.parametrize("name", GOALS)
def test_goal_is_met(tree, name):
    goal = GOALS[name]
    figure = goal.count(tree)
    places = "\n".join(figure.places[:20])
    assert goal.met(figure.value), f"{name}: {figure.value:.4g}, goal {goal}\n{places}"


SAMPLE = '''
import nanochat.common as c
from nanochat import common as other, missing as fine

# a reason
#
# ruff: noqa
TEXT = """
# not a comment
"""


@dataclass
class Point:
    x: int
    y = 2

    def move(self, by, *_) -> None:
        pass


def f(a, b: int = 1, *rest, **more):
    a, b = b, a
    a, b = f()
    while True:
        if a and b and rest:
            continue
        return [lambda: 1 if x else 2 for x in more]


def parse_args(argv: list) -> None:
    pass


def _private(x):
    pass
'''


def test_counters_count(tmp_path):
    """One planted sample of each thing that is counted, next to what only looks like it."""
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "common.py").write_text("#" * 101 + "\n")
    (tmp_path / "train.py").write_text(SAMPLE)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.sh").write_text("x" * 100 + "\n" + "x" * 101 + "\n")
    tree = Tree(tmp_path)
    lines = tree.product_lines
    assert lines == 1 + sum(bool(line.strip()) for line in SAMPLE.splitlines())
    assert long_lines(tree).places == ["nanochat/common.py:1", "runs/a.sh:2"]
    assert comments_share(tree).value == pytest.approx(100 / lines)
    for counter in (conditional_expressions, lambdas, tuple_assignments):
        assert counter(tree).value == pytest.approx(1000 / lines)
    assert longest_function(tree).value == 7
    # while, if, the chain of `and`, the comprehension's for, the conditional expression
    assert loop_lines(tree).value == 4
    assert loop_branches(tree).value == 5
    assert loop_continues(tree).value == 1
    names = [place.split(" ", 1)[1] for place in missing_annotations(tree).places]
    assert names == ["Point.move: by", "Point: y = 2", "f: a, rest, more, return"]
    renamed = [place.split(" ", 1)[1] for place in renamed_modules(tree).places]
    assert renamed == ["nanochat.common as c", "nanochat.common as other"]


def print_table(roots: list[Path]) -> None:
    trees = [Tree(root.resolve()) for root in roots]
    columns = [str(root) for root in roots]
    print(f"{'':<44}{'goal':>8}", *(f"{column:>14}" for column in columns))
    for name, goal in GOALS.items():
        values = [goal.count(tree).value for tree in trees]
        shown = [f"{value:.4g}{' ' if goal.met(value) else '!'}" for value in values]
        print(f"{name:<44}{str(goal):>8}", *(f"{each:>14}" for each in shown))
    print("! goal missed")


if __name__ == "__main__":
    print_table([Path(argument) for argument in sys.argv[1:]] or [ROOT])
