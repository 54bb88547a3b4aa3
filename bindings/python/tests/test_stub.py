"""The checked-in stub of the core has the functions that the core has, with their parameters."""

import ast
import pathlib
import re

import express_kv
from express_kv import _core


def of_stub(body, prefix=""):
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from of_stub(node.body, node.name + ".")
        elif isinstance(node, ast.FunctionDef):
            is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
            yield prefix + node.name, None if is_property else [a.arg for a in node.args.args]


def of_module(owner, prefix=""):
    for name, value in vars(owner).items():
        if isinstance(value, type):
            yield from of_module(value, name + ".")
        elif hasattr(value, "__nb_signature__"):
            text = re.sub(r"ndarray\[[^\]]*\]", "ndarray", value.__nb_signature__[0][0])
            inside = text[text.index("(") + 1 : text.rindex(")")]
            yield prefix + name, re.findall(r"(?:^|, )(\w+)(?=[:,]|$)", re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", inside)))
        elif isinstance(value, property):
            yield prefix + name, None


def test_stub():
    stub = pathlib.Path(express_kv.__file__).with_name("_core.pyi").read_text()
    assert dict(of_stub(ast.parse(stub).body)) == dict(of_module(_core))
