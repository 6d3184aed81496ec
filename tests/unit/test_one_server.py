"""Which files of tests/serving ask the one real server of that folder."""

import ast

from tests.conftest import ONE_SERVER
from tests.support.paths import ROOT


def test_files_whose_tests_ask_the_one_server_are_named() -> None:
    asking = set()
    for file in (ROOT / "tests/serving").glob("test_*.py"):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        if any(argument.arg == "served" for function in functions for argument in function.args.args):
            asking.add(str(file.relative_to(ROOT)))
    assert asking == ONE_SERVER
