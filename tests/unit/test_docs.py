"""What the documentation says of the code is what the code says."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

import spin_ray
from docs.demo_output import README, copy, written
from docs.pages import gather
from spin_ray.inputs import forms
from spin_ray.report import probe, signs
from spin_ray.report.measures import as_markdown
from tests.support.made_up_run import made_up_run
from tests.support.paths import DOCS, ROOT


def test_the_table_of_measures_is_the_one_in_the_code():
    text = (DOCS / "reading-a-run.md").read_text(encoding="utf-8")
    table = text.partition('as_markdown())" -->\n')[2].partition("<!-- end of measures -->")[0]
    assert table == as_markdown()
    rules = text.partition('signs.as_markdown())" -->\n')[2].partition("<!-- end of warnings -->")[0]
    assert rules == signs.as_markdown()


def test_the_table_of_the_probe_is_the_one_in_the_code():
    text = (DOCS / "probe.md").read_text(encoding="utf-8")
    table = text.partition('probe.as_markdown())" -->\n')[2].partition("<!-- end of probe -->")[0]
    assert table == probe.as_markdown()


def test_the_table_of_forms_is_the_one_in_the_code():
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    table = text.partition('as_markdown())" -->\n')[2].partition("<!-- end of forms -->")[0]
    assert table == forms.as_markdown()


def test_every_public_name_is_listed_and_in_the_reference():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert {*spin_ray.__all__} == {*spin_ray._HOME} <= {*dir(spin_ray)}
    for name, home in spin_ray._HOME.items():
        assert getattr(spin_ray, name).__doc__
        assert f"::: spin_ray.{home}.{name}\n" in text, name


def test_the_first_page_is_short_and_every_link_leads_somewhere():
    """A link to a heading is looked for in its page, as GitHub spells headings."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    dead = []
    for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "benchmarks").glob("**/*.md")]:
        for target, _, heading in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())):
            if target.startswith(("http:", "https:")):
                continue
            found = page.parent / target if target else page
            if not found.exists() or (heading and f"#{heading}" not in headings_of(found)):
                dead.append(f"{page.relative_to(ROOT)}: {target}#{heading}")
    assert not dead


def test_the_end_of_the_demonstration_is_copied_from_a_run_that_nothing_interrupted(tmp_path: Path):
    run, text = made_up_run(tmp_path / "run"), README.read_text("utf-8")
    lines = written(run, "2 cores of X")
    assert "On 2 cores of X `make demo` took " in lines and max(map(len, lines.splitlines())) <= 140
    assert [line.split()[1] for line in lines.splitlines() if line.startswith("    │ ")] == [
        "sft",
        "iter_000",
        "iter_001",
    ]
    copied = copy(text, lines)
    assert lines in copied and "iter_001 │ 0.6353" not in copied
    assert copy(copied, "x\n") == copy(text, "x\n"), "what stands around the marks stays"
    run.event("start", "iter_001/training")
    with pytest.raises(SystemExit, match="a stage started twice"):
        written(run, "X")


def test_the_site_has_every_page_and_no_link_of_it_is_dead(tmp_path: Path):
    """Links to folders became text; the reference names what exists."""
    pages = [tmp_path / page.relative_to(ROOT) for page in gather(tmp_path)]
    links = [(page, target) for page in pages for target in re.findall(r"\]\(([^)\s#]+)", page.read_text())]
    assert not [(page, target) for page, target in links if ":" not in target and not (page.parent / target).is_file()]
    shown = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {tmp_path / name for name in shown} <= set(pages) and len(shown) > 15
    for name in re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE):
        assert resolve_name(name) is not None


def headings_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
