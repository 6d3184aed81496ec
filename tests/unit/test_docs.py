"""What the documentation says of the code is what the code says."""

from spin_ray.report.measures import as_markdown
from tests.support.paths import DOCS


def test_the_table_of_measures_is_the_one_in_the_code():
    text = (DOCS / "reading-a-run.md").read_text(encoding="utf-8")
    table = text.partition('as_markdown())" -->\n')[2].partition("<!-- end of measures -->")[0]
    assert table == as_markdown()
