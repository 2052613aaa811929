"""What a serialised program says in text that torch would evaluate: shape expressions, guards, op names, tree specs."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from torch.utils._sympy import functions as torch_sympy

CHARACTERS = re.compile(r"[\w \[\]()'.,<>=!+\-*/%&|~]*")  # no comments, escapes or second kind of quote: text is pasted
SYMPY = {
    *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling"),
    *("And", "Or", "Not", "Eq", "Ne", "Equality", "Unequality", "StrictGreaterThan", "GreaterThan", "StrictLessThan"),
    *("LessThan", "Gt", "Ge", "Lt", "Le", "Piecewise", "ExprCondPair", "Tuple"),
}
SHAPE_FUNCTIONS = SYMPY | {name for name in getattr(torch_sympy, "__all__", []) if name[:1].isupper()}
GUARD_FUNCTIONS = SHAPE_FUNCTIONS | {"min", "max", "abs", "int", "float", "bool"}
GUARD_ATTRIBUTES = {
    *("size", "shape", "stride", "storage_offset", "math", "floor", "ceil", "trunc", "sqrt", "inf", "pow"),
    *("sym_float", "sym_int", "sym_max", "sym_min"),
}
NODES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.List),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)

ARITHMETIC = (
    "add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|getitem|lshift|rshift"
)
TARGET = re.compile(
    r"torch\.ops\.(aten|prims|prim|tamis|torchvision|quantized_decomposed)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop|scan|map_impl)"
    rf"|_operator\.({ARITHMETIC})"
    r"|torch\.sym_\w+|torch\._sym_\w+|math\.(ceil|floor|trunc|sqrt|pow|log2)|torch\._C\._set_grad_enabled"
)
FILE_OPS = re.compile(r"torch\.ops\.aten\.(from_file|_print)\b.*")


def find_code(value: Any) -> str:
    """What in a serialised program (its parsed JSON) is more than tensor operations and arithmetic; "" if nothing."""
    if isinstance(value, list):
        return next(filter(None, map(find_code, value)), "")
    if not isinstance(value, dict):
        return ""
    return next(filter(None, (_find_in(key, item) for key, item in value.items())), "")


def _find_in(key: str, item: Any) -> str:
    if key == "expr_str" and not is_shape_expression(item):
        return f"the shape {_short(item)}"
    if key == "guards_code":
        return next((f"the guard {_short(guard)}" for guard in item if not is_guard(guard)), "")
    if key == "target" and isinstance(item, str) and (not TARGET.fullmatch(item) or FILE_OPS.fullmatch(item)):
        return f"a call of {_short(item)}"
    if key in ("in_spec", "out_spec") and isinstance(item, str) and not _is_plain_tree(item):
        return f"the structure {_short(item)}"
    return find_code(item)


def is_shape_expression(text: Any) -> bool:
    """Whether the text is sympy arithmetic on symbols and numbers, and nothing else."""
    return _is_arithmetic(text, SHAPE_FUNCTIONS, set())


def is_guard(text: Any) -> bool:
    """Whether the text compares sizes of inputs, such as `L['x'].size()[0] <= 512`."""
    return _is_arithmetic(text, GUARD_FUNCTIONS, GUARD_ATTRIBUTES)


def _is_arithmetic(text: Any, functions: set[str], attributes: set[str]) -> bool:
    if not isinstance(text, str) or not CHARACTERS.fullmatch(text):
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_allowed(node, functions, attributes) for node in ast.walk(tree))


def _is_allowed(node: ast.AST, functions: set[str], attributes: set[str]) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            # text inside calls is evaluated again by sympy, unless it is a symbol's name or a number
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            plain = name in ("Symbol", "Float") and all(re.fullmatch(r"[\w.+-]+", text) for text in texts)
            return name in functions and (not texts or plain)
        case ast.Call(func=ast.Attribute()):
            return bool(attributes)  # the attribute itself is looked at on its own
        case ast.Call():
            return False
        case ast.Attribute(attr=name):
            return name in attributes
        case ast.Subscript():
            return bool(attributes)
        case ast.Name(id=name):
            return not name.startswith("__")
    return isinstance(node, NODES)


def _is_plain_tree(text: str) -> bool:
    """Whether a tree spec needs no import by name: enums and default factories do."""
    if not text:
        return True
    try:
        return not _imports(json.loads(text))
    except ValueError:
        return False


def _imports(value: Any) -> bool:
    if isinstance(value, str) and value[:1] in ("[", "{"):  # contexts are JSON in JSON
        try:
            return _imports(json.loads(value))
        except ValueError:
            return False
    if isinstance(value, dict):
        named = "__enum__" in value or value.get("default_factory_module", "builtins") != "builtins"
        return named or any(_imports(v) for v in value.values())
    return isinstance(value, list) and any(map(_imports, value))


def _short(text: Any) -> str:
    shown = str(text)
    return repr(shown if len(shown) <= 80 else shown[:77] + "...")
