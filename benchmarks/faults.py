"""The faults of `benchmarks.mutation`: what is changed in a source, one place at a time, on its syntax tree."""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
from collections.abc import Callable, Iterator

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
ARITHMETIC |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
COMPARISON = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
TWINS = ("minimum maximum", "expm1 exp", "log1p log", "sum mean", "any all", "sin cos", "zeros_like ones_like")
TWINS = {a: b for pair in TWINS for a, b in (pair.split(), pair.split()[::-1])}
# Swaps that change nothing, and those that every call refuses: faults that no test can see, or any.
SYMMETRIC = {"minimum", "maximum", "multiply", "add", "zip", "promote_types", "result_type"}
TYPED = {"isinstance", "issubdtype", "hasattr", "getattr", "map", "batch_time", "range", "SDE", "State"}


def mutations(tree: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Yield (operator, node, what takes its place) for every fault that this driver knows, in the order of the text."""
    for node in _code(tree):
        yield from ((name, node, new) for name, new in _faults(node))


def _code(node):
    """Walk over what may be mutated."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
        return
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
        return
    yield node
    if isinstance(node, ast.Raise):
        return
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _code(child)


def _faults(node):
    def changed(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            yield "arithmetic", changed(op=ARITHMETIC[type(op)]())
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for other in COMPARISON[type(op)]:
                    yield "comparison", changed(ops=[*ops[:i], other(), *ops[i + 1 :]])
        case ast.BoolOp(op=op):
            yield "boolean", changed(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield "unary", operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            for other in (-value, 1.1 * value) if value else (1.0,):
                yield "constant", _number(other)
        case ast.If(test=test) | ast.IfExp(test=test) if not _has_opposite(test):
            yield "condition", changed(test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[first, *rest]):
            yield "condition", changed(ifs=[ast.UnaryOp(ast.Not(), first), *rest])
        case ast.Raise():
            yield "raise", ast.Pass()
        case ast.Slice(lower=lower, upper=upper):
            if upper is not None and not isinstance(upper, ast.Constant):
                yield "slice", changed(upper=ast.BinOp(upper, ast.Add(), ast.Constant(1)))
            if not isinstance(lower, ast.Constant):
                more = ast.Constant(1) if lower is None else ast.BinOp(lower, ast.Add(), ast.Constant(1))
                yield "slice", changed(lower=more)
        case ast.FunctionDef(args=ast.arguments(args=[first, *_]), body=[*_, ast.Return(value=value)]):
            same = (first.annotation is None and node.returns is None) or _same(first.annotation, node.returns)
            if same and first.arg != "self" and value is not None and ast.unparse(value) != first.arg:
                yield "return", changed(body=[*node.body[:-1], ast.Return(ast.Name(first.arg))])
        case ast.Call(func=func, args=args):
            name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
            if isinstance(func, ast.Attribute) and name in TWINS:
                twin = copy.copy(func)
                twin.attr = TWINS[name]
                yield "twin", changed(func=twin)
            starred = any(isinstance(arg, ast.Starred) for arg in args)
            alike = len(args) == 2 and not starred and not any(_typed(arg) for arg in args) and not _same(*args)
            if alike and name not in SYMMETRIC | TYPED:
                yield "swap", changed(args=args[::-1])
            if name == "where" and len(args) == 3:
                yield "swap", changed(args=[args[0], args[2], args[1]])


def _typed(argument):
    """Whether an argument is a function, a process, a dtype or a shape by its looks."""
    text = ast.unparse(argument)
    return isinstance(argument, ast.Lambda) or text == "process" or text.endswith((".dtype", ".shape", "jnp.uint32"))


def _has_opposite(test):
    """Whether the mutations of the test itself hold its negation."""
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and len(COMPARISON[type(test.ops[0])]) == 1
    return isinstance(test, ast.UnaryOp)


def _number(value):
    return ast.Constant(value) if value > 0 else ast.UnaryOp(ast.USub(), ast.Constant(-value))


def _same(one, other):
    return one is not None and other is not None and ast.unparse(one) == ast.unparse(other)


def mutants(path: str, source: str) -> dict[str, tuple[dict, Callable[[], str]]]:
    """Return every mutant of a file by its key: what it changes, and a function that makes its whole text.

    The key is made of the top-level statement and what is changed in it, so that it outlives changes elsewhere.
    """
    tree, found = ast.parse(source), {}
    uses = {node.name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} for node in tree.body if _named(node)}
    for statement in tree.body:
        text, inside = ast.unparse(statement), _reached(uses, statement.name if _named(statement) else "")
        signed = {id(node.operand) for node in ast.walk(statement) if isinstance(node, ast.UnaryOp)}
        for i, (operator, old, new) in enumerate(mutations(statement)):
            if id(old) in signed and isinstance(new, ast.UnaryOp):
                continue  # - -1 is the minus sign dropped
            key = hashlib.sha256(f"{path}\n{text}\n{i}".encode()).hexdigest()[:12]
            row = {"key": key, "file": path, "line": getattr(old, "lineno", statement.lineno), "inside": inside}
            row |= {"operator": operator, "before": _head(old), "after": _head(new)}
            found[key] = row, functools.partial(_mutated, tree, old, new)
    return found


def _named(node):
    return isinstance(node, (ast.FunctionDef, ast.ClassDef))


def _reached(uses, name):
    """The public names of a module through which tests reach a function of it."""
    found = {name}
    for _ in uses:
        found |= {user for user, used in uses.items() if used & found}
    return sorted(public for public in found if not public.startswith("_")) if name.startswith("_") else [name]


def _mutated(tree, old, new):
    try:
        return ast.unparse(ast.fix_missing_locations(_Replace(old, new).visit(tree)))
    finally:
        _Replace(new, old).visit(tree)


class _Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else super().generic_visit(node)


def _head(node):
    """The text of a node on one line; of a statement its first line, of a function its last."""
    lines = ast.unparse(node).splitlines()
    return lines[-1].strip() if isinstance(node, ast.FunctionDef) else lines[0][:200]
