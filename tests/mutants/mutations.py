"""Makes mutants of a source file, each a change of a few characters.

Contract: positions come from the syntax tree; the text around a change is kept. Messages, help texts, annotations,
decorators and docstrings are not changed. `sample` ranks mutants by a digest of the seed and the changed line, so an
edit elsewhere in the file, or a move of the file, keeps most of a sample.

Example:
    [str(mutant) for mutant in mutants_of("def f(a):\n    return a + 1\n")]
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

PAIRS = "<:<= <=:< >:>= >=:> ==:!= !=:== +:- -:+ *:/ /:* //:/ %:// **:* |:& &:| <<:>> >>:<< and:or or:and"
SWAPS = dict(pair.split(":") for pair in PAIRS.split())
SWAPS |= {"in": "not in", "not in": "in", "is": "is not", "is not": "is"}
_OPERATOR = re.compile("|".join(re.escape(each) for each in sorted(SWAPS, key=len, reverse=True)).encode())
TALK = {"print", "Console", "Table", "status", "add_column", "add_row", "add_argument"}  # calls that show text
LEFT_ALONE = {"annotation", "returns", "decorator_list", "exc"}

Change = tuple[int, int, str]
"""The first byte, the byte after the last, and the replacement."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A change in one place of a file."""

    file: str
    line: int
    before: str
    """The changed line or lines, blanks collapsed."""
    after: str
    source: str
    """The whole file with the change."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


def mutants_of(source: str, file: str = "") -> list[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    text, tree = source.encode(), ast.parse(source)
    found = (_mutant(file, text, change) for change in dict.fromkeys(sorted(_changes(text, tree), key=lambda c: c[0])))
    return [mutant for mutant in found if _differs(mutant.source, ast.dump(tree))]


def sample(mutants: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """The first `count` mutants by the digest of seed and change; equal changes get different digests."""
    seen: Counter[tuple[str, str]] = Counter()
    ranked = {}
    for mutant in mutants:
        seen[mutant.before, mutant.after] += 1
        key = f"{seed}|{mutant.before}|{mutant.after}|{seen[mutant.before, mutant.after]}"
        ranked[hashlib.sha256(key.encode()).hexdigest()] = mutant
    return [ranked[digest] for digest in sorted(ranked)[:count]]


def _differs(source: str, original: str) -> bool:
    try:
        return ast.dump(ast.parse(source)) != original
    except SyntaxError:
        return False


def _mutant(file: str, text: bytes, change: Change) -> Mutant:
    start, end, new = change
    changed = text[:start] + new.encode() + text[end:]
    first, last = text.rfind(b"\n", 0, start) + 1, text.find(b"\n", end)
    before, after = text[first:last], changed[first : last + len(changed) - len(text)]
    return Mutant(
        file=file,
        line=text.count(b"\n", 0, start) + 1,
        before=" ".join(before.decode().split()),
        after=" ".join(after.decode().split()),
        source=changed.decode(),
    )


def _changes(text: bytes, tree: ast.AST) -> Iterator[Change]:
    """The changes of a node and its children."""
    starts = [0, *(match.end() for match in re.finditer(b"\n", text))]

    def place(node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def swapped(*sides: ast.AST) -> Iterator[Change]:
        for left, right in pairwise(sides):
            if found := _OPERATOR.search(text, place(left)[1], place(right)[0]):
                yield (*found.span(), SWAPS[found.group().decode()])

    def replaced(node: ast.AST, *texts: str) -> Iterator[Change]:
        yield from ((*place(node), each) for each in texts)

    def of_node(node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.Compare():
                yield from swapped(node.left, *node.comparators)
            case ast.BoolOp():
                yield from swapped(*node.values)
            case ast.BinOp(left=left, right=right) | ast.AugAssign(target=left, value=right):
                if not (_is_text(left) or _is_text(right)):
                    yield from swapped(left, right)
            case ast.UnaryOp(op=ast.Not()):
                yield place(node)[0], place(node.operand)[0], ""
            case ast.Constant(value=bool(value)):
                yield from replaced(node, str(not value))
            case ast.Constant(value=int(value) | float(value)):
                yield from replaced(node, repr(value + 1), repr(value - 1))
            case ast.Return(value=value) if value is not None:
                yield from replaced(node, "return None")
            case ast.Return() | ast.Raise() | ast.Break() | ast.Continue():
                yield from replaced(node, "pass")
            case ast.If(test=test) | ast.IfExp(test=test):
                yield from replaced(test, "True", "False")
            case ast.While(test=test):
                yield from replaced(test, "False")
            case ast.comprehension(ifs=tests):
                for test in tests:
                    yield from replaced(test, "True", "False")

    def walk(node: ast.AST) -> Iterator[Change]:
        if _is_left_alone(node):
            return
        yield from of_node(node)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if name not in LEFT_ALONE and isinstance(child, ast.AST):
                    yield from walk(child)

    yield from walk(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_left_alone(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in TALK
    return False
