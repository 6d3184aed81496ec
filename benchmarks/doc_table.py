"""Puts a table into a page, between ``<!-- NAME: by `COMMAND` -->`` and ``<!-- end of NAME -->``."""

import re
from pathlib import Path

CLUSTER_PAGE = Path(__file__).resolve().parents[1] / "docs" / "cluster.md"


def put(name: str, text: str, page: Path = CLUSTER_PAGE) -> None:
    """Replaces what stands there.

    Raises:
        ValueError: the page has no such place, or more than one.
    """
    place = re.compile(rf"(<!-- {re.escape(name)}: by .*? -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    content, found = place.subn(lambda match: f"{match[1]}\n{text.strip()}\n\n{match[2]}", page.read_text())
    if found != 1:
        raise ValueError(f"{page}: has {found} places for {name}")
    page.write_text(content)
