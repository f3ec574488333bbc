"""What the adapter uses of TensorRT and cuda-python, read out of its source, so that no list of it can go stale.

A use counts where it is reached: one inside ``if hasattr(trt.X, "name")`` only in versions that have it.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """That ``owner`` has (or has not) ``name``."""

    owner: str
    name: str
    has: bool


@dataclass(frozen=True)
class Use:
    """One use of ``owner.name``; ``owner`` is ``""`` for the module itself.

    Attributes:
        arguments: how many it is called with, ``None`` where it is not called.
        keywords: names of those that are given by name.
        guards: what must hold for it to be reached.
        line: of the source.
    """

    owner: str
    name: str
    arguments: int | None
    keywords: tuple[str, ...]
    guards: tuple[Guard, ...]
    line: int


class Finder(ast.NodeVisitor):
    """Collects uses.

    Args:
        variables: class by name of the variable or attribute that holds one of its objects; ``""`` for the module.
    """

    def __init__(self, variables):
        self.variables = variables
        self.guards = []
        self.uses = []
        self.calls = {}

    def owner(self, node):
        """The class whose attribute this would be, ``None`` where it is none of the library's."""
        last = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        if last in self.variables:
            return self.variables[last]
        if isinstance(node, ast.Attribute) and self.owner(node.value) == "":
            return node.attr
        return None

    def visit_Call(self, node):
        self.calls[id(node.func)] = node
        self.generic_visit(node)

    def visit_Attribute(self, node):
        owner = self.owner(node.value)
        if owner is not None and not node.attr.startswith("__"):
            call = self.calls.get(id(node))
            starred = call is not None and any(isinstance(each, ast.Starred) for each in call.args)
            self.uses.append(
                Use(
                    owner=owner,
                    name=node.attr,
                    arguments=None if call is None or starred else len(call.args),
                    keywords=() if call is None else tuple(each.arg for each in call.keywords if each.arg),
                    guards=tuple(self.guards),
                    line=node.lineno,
                )
            )
        self.generic_visit(node)

    def visit_ClassDef(self, node):
        for base in node.bases:
            if isinstance(base, ast.Attribute) and self.owner(base.value) == "":
                for each in node.body:
                    if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
                        inherited = Use(base.attr, each.name, None, (), tuple(self.guards), each.lineno)
                        self.uses.append(inherited)
        self.generic_visit(node)

    def asked(self, test):
        """Guards that hold when a condition is true, and those when it is false."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yes, no = self.asked(test.operand)
            return no, yes
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return [guard for each in test.values for guard in self.asked(each)[0]], []
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "hasattr":
            of, name = test.args
            owner = self.owner(of)
            if owner is None and isinstance(of, ast.Attribute) and self.owner(of.value) == "":
                owner = of.attr
            if owner is not None:
                return [Guard(owner, name.value, True)], [Guard(owner, name.value, False)]
        return [], []

    def under(self, guards, nodes):
        self.guards += guards
        for node in nodes:
            self.visit(node)
        del self.guards[len(self.guards) - len(guards) :]

    def visit_BoolOp(self, node):
        if not isinstance(node.op, ast.And):
            self.generic_visit(node)
            return
        known = []
        for each in node.values:
            self.under(known, [each])
            known = [*known, *self.asked(each)[0]]

    def visit_IfExp(self, node):
        yes, no = self.asked(node.test)
        self.under([], [node.test])
        self.under(yes, [node.body])
        self.under(no, [node.orelse])

    def block(self, statements):
        """Statements in order; what follows one that leaves is under its opposite."""
        later = []
        for statement in statements:
            if not isinstance(statement, ast.If):
                self.under(later, [statement])
                continue
            yes, no = self.asked(statement.test)
            self.under(later, [statement.test])
            self.guards += later
            for guards, body in ((yes, statement.body), (no, statement.orelse)):
                self.guards += guards
                self.block(body)
                del self.guards[len(self.guards) - len(guards) :]
            del self.guards[len(self.guards) - len(later) :]
            if isinstance(statement.body[-1], ast.Return | ast.Raise | ast.Continue) and not statement.orelse:
                later = [*later, *no]

    def visit_FunctionDef(self, node):
        for each in (*node.args.defaults, *node.decorator_list):
            self.visit(each)
        self.block(node.body)

    def visit_If(self, node):
        self.block([node])

    def generic_visit(self, node):
        for name, value in ast.iter_fields(node):
            if name in ("body", "orelse", "finalbody") and isinstance(value, list):
                self.block(value)
            elif isinstance(value, list):
                for each in value:
                    if isinstance(each, ast.AST):
                        self.visit(each)
            elif isinstance(value, ast.AST):
                self.visit(value)


def find_uses(source, variables):
    """Uses in a source, in order."""
    finder = Finder(variables)
    finder.visit(ast.parse(source))
    return finder.uses


def signatures(text):
    """What docstrings of compiled functions say: for each overload, (names, how many of them must be given)."""
    found = []
    for line in (text or "").splitlines():
        match = re.match(r"^(?:\d+\. )?\w+\((.*)\)(?: -> .*)?$", line.strip())
        if match is None:
            continue
        names, needed = [], 0
        for part in _parts(match[1]):
            name, _, default = part.partition("=")
            words = re.split(r"[:\s]+", name.strip())
            name = words[0] if ":" in part.partition("=")[0] or len(words) == 1 else words[-1]
            if name in ("self", ""):
                continue
            names.append(name)
            needed += not default
        found.append((tuple(names), needed))
    return found


def _parts(text):
    """Split at commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for at, sign in enumerate(text):
        depth += (sign in "([{<") - (sign in ")]}")
        depth -= sign == ">" and text[at - 1] != "-"
        if sign == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]] if text.strip() else []
