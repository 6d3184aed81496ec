"""Gathers the pages of the documentation site in build/pages, laid out as in the repository, for `make docs-site`.

Links keep working: files that a page links to come along, and a link to a folder becomes plain text.
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/*.md", "benchmarks/**/*.md")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def gather(out: Path) -> list[Path]:
    """Writes the pages and what they link to; returns the pages."""
    shutil.rmtree(out, ignore_errors=True)
    pages = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
    for page in pages:
        target = out / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_LINK.sub(lambda link, page=page: _kept(link, page, out), page.read_text("utf-8")), "utf-8")
    return pages


def _kept(link: re.Match[str], page: Path, out: Path) -> str:
    """Returns the link as it is, or its text if it leads to a folder; copies the file that it leads to."""
    _, text, target, _ = link.groups()
    found = (page.parent / target).resolve()
    if ":" in target or not found.is_relative_to(ROOT):
        return link[0]
    if found.is_dir():
        return text
    copied = out / found.relative_to(ROOT)
    if found.suffix != ".md" and found.is_file():
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, copied)
    return link[0]


if __name__ == "__main__":
    print(f"{len(gather(ROOT / 'build' / 'pages'))} pages")
