"""Which files of tests/serving need real engines."""

import ast

from tests.conftest import WITH_ENGINES
from tests.support.paths import ROOT


def test_files_whose_tests_need_real_engines_are_named() -> None:
    """Those that ask the one server of the folder, and those that start engines of their own (mark ``e2e``)."""
    found = set()
    for file in (ROOT / "tests/serving").glob("test_*.py"):
        code = ast.parse(file.read_text())
        asked = {each.arg for each in ast.walk(code) if isinstance(each, ast.arg)}
        marks = {each.attr for each in ast.walk(code) if isinstance(each, ast.Attribute)}
        if "served" in asked or "e2e" in marks:
            found.add(str(file.relative_to(ROOT)))
    assert found == WITH_ENGINES
