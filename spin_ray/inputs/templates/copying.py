"""Proof from a chat template's syntax tree that it only copies the texts of messages.

A text may be stripped, and a decision may depend on its being empty. Any unknown syntax counts as a no.
"""

from enum import Enum
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Kind(Enum):
    CLEAN = "nothing"
    MESSAGES = "the conversation, or a part of it"
    MESSAGE = "one message"
    TEXT = "the text of one message"
    WRITTEN = "texts among other words, or stripped"


_CLEAN, _MESSAGES, _MESSAGE, _TEXT, _WRITTEN = _Kind
_Looks = type("_Looks", (Exception,), {"__doc__": "The template does more with a text than to copy it."})
_OF_A_LOOP = {"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"}
_ABOUT_THE_TYPE = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean"}
_PURE = (nodes.BinExpr, nodes.UnaryExpr, nodes.Literal, nodes.Pair, nodes.Keyword, nodes.Slice, nodes.Operand)
_FUNCTIONS = {"raise_exception", "namespace", "range", "dict"}


def copies_texts(template: str) -> bool:
    """Tells whether ``template`` certainly only copies each ``content``."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return _Reader().accepts(environment.parse(template))
    except (TemplateSyntaxError, _Looks):
        return False


class _Reader:
    def __init__(self) -> None:
        self._names = {"messages": _MESSAGES}

    def accepts(self, template: nodes.Template) -> bool:
        """Reads until no kind changes, as names may be set further down; raises _Looks for a no."""
        before: dict[str, _Kind] = {}
        while before != self._names:
            before = dict(self._names)
            self._read(template.body)
        return True

    def _read(self, statements: list[Any]) -> None:
        for statement in statements:
            match statement:
                case nodes.Output():
                    for written in statement.nodes:
                        self._among(written, _CLEAN, _TEXT, _WRITTEN)
                case nodes.If():
                    self._decide(statement.test)
                    self._read([*statement.body, *statement.elif_, *statement.else_])
                case nodes.For(recursive=False):
                    inner = {_CLEAN: _CLEAN, _MESSAGES: _MESSAGE}[self._among(statement.iter, _CLEAN, _MESSAGES)]
                    self._set(statement.target, inner)
                    if statement.test is not None:
                        self._decide(statement.test)
                    self._read([*statement.body, *statement.else_])
                case nodes.Assign():
                    self._set(statement.target, self._kind(statement.node))
                case nodes.Break() | nodes.Continue():
                    pass
                case _:
                    raise _Looks(type(statement).__name__)

    def _set(self, target: Any, kind: _Kind) -> None:
        if isinstance(target, nodes.Name) and target.name != "loop":
            self._names[target.name] = _either(self._names.get(target.name, _CLEAN), kind)
        elif kind is not _CLEAN:  # several names at once, or an attribute of a namespace
            raise _Looks("a text in a namespace")
        elif isinstance(target, nodes.Tuple):
            for each in target.items:
                self._set(each, kind)

    def _decide(self, test: Any) -> None:
        """Raises _Looks if ``test`` depends on more of a text than its being empty."""
        self._among(test, _CLEAN, _MESSAGES, _MESSAGE, _TEXT)

    def _among(self, expression: Any, *kinds: _Kind) -> _Kind:
        found = self._kind(expression)
        if found not in kinds:
            raise _Looks(found)
        return found

    def _kind(self, expression: Any) -> _Kind:
        match expression:
            case nodes.Name(name="loop" | "self" | "caller" | "varargs" | "kwargs"):
                raise _Looks("what these hold is not followed")
            case nodes.Name():
                return self._names.get(expression.name, _CLEAN)
            case nodes.Getattr(node=nodes.Name(name="loop")) if expression.attr in _OF_A_LOOP:
                return _CLEAN
            case nodes.Getattr():
                return self._member(self._kind(expression.node), nodes.Const(expression.attr))
            case nodes.Getitem():
                return self._member(self._kind(expression.node), expression.arg)
            case nodes.Add() | nodes.Concat():
                parts = (
                    expression.nodes if isinstance(expression, nodes.Concat) else [expression.left, expression.right]
                )
                clean = [self._among(part, _CLEAN, _TEXT, _WRITTEN) is _CLEAN for part in parts]
                return _CLEAN if all(clean) else _WRITTEN
            case nodes.And() | nodes.Or():
                self._decide(expression.left)
                return _either(self._kind(expression.left), self._kind(expression.right))
            case nodes.Not():
                self._decide(expression.node)
                return _CLEAN
            case nodes.CondExpr():
                self._decide(expression.test)
                other = self._kind(expression.expr2) if expression.expr2 is not None else _CLEAN
                return _either(self._kind(expression.expr1), other)
            case nodes.Compare(ops=[nodes.Operand(op="in" | "notin", expr=holder)]) if (
                isinstance(expression.expr, nodes.Const) and self._kind(holder) is _MESSAGE
            ):
                return _CLEAN  # which keys a message has
            case nodes.Compare():
                for each in (expression.expr, *(operand.expr for operand in expression.ops)):
                    self._among(each, _CLEAN)
                return _CLEAN
            case nodes.Filter() | nodes.Test() | nodes.Call():
                return self._result(expression)
            case _ if isinstance(expression, _PURE):
                for child in expression.iter_child_nodes():
                    self._among(child, _CLEAN)
                return _CLEAN
        raise _Looks(type(expression).__name__)

    def _member(self, holder: _Kind, key: Any) -> _Kind:
        if not isinstance(key, nodes.Slice):
            self._among(key, _CLEAN)
        match holder, key:
            case _Kind.CLEAN, _:
                return _CLEAN
            case _Kind.MESSAGES, nodes.Slice():
                return self._among(key, _CLEAN) and _MESSAGES
            case _Kind.MESSAGES, nodes.Const(value=int()) | nodes.Neg(node=nodes.Const(value=int())):
                return _MESSAGE
            case _Kind.MESSAGE, nodes.Const(value="content"):
                return _TEXT
            case _Kind.MESSAGE, nodes.Const(value=str()) if not hasattr(dict, key.value):
                return _CLEAN  # the role, or a key that no message here has
        raise _Looks("a part of a text")

    def _result(self, call: Any) -> _Kind:
        arguments = [*call.args, *call.kwargs, *filter(None, (call.dyn_args, call.dyn_kwargs))]
        match call:
            case nodes.Filter(name="trim", node=text) | nodes.Call(node=nodes.Getattr(node=text, attr="strip")) if (
                not arguments and text is not None and self._kind(text) is _TEXT
            ):
                return _WRITTEN
            case nodes.Filter(name="length" | "count") if call.node is not None and self._kind(call.node) is _MESSAGES:
                return _CLEAN
            case nodes.Filter(name="list") if call.node is not None and self._kind(call.node) is _MESSAGES:
                return _MESSAGES
            case nodes.Test() if call.name in _ABOUT_THE_TYPE:
                self._kind(call.node)
                return _CLEAN
            case nodes.Call(node=nodes.Name(name="raise_exception")):
                for argument in arguments:
                    self._kind(argument)
                return _CLEAN
            case nodes.Call(node=nodes.Name()) if call.node.name not in _FUNCTIONS:
                raise _Looks("a macro, or a function such as the time, is not followed")
            case nodes.Filter(node=None):
                raise _Looks("a filter over a block")
        for each in (call.node, *arguments):
            if not (isinstance(call, nodes.Call) and isinstance(each, nodes.Name) and each.name in _FUNCTIONS):
                self._among(each, _CLEAN)
        return _CLEAN


def _either(one: _Kind, other: _Kind) -> _Kind:
    if one is other or other is _CLEAN:
        return one
    if one is _CLEAN:
        return other
    if {one, other} == {_TEXT, _WRITTEN}:
        return _WRITTEN
    raise _Looks("a name that holds a text here and messages there")
