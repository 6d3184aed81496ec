"""Labels and texts of SEFT's revisions."""

import pytest

from spin_ray.loop.algorithms.seft import revision


@pytest.mark.parametrize(
    ("answer", "label"),
    [([1, 2, 3, 4], "[keep]"), ([1, 2, 3, 5], "[minor]"), ([1, 9, 8, 4], "[minor]"), ([1, 9, 8, 7], "[major]")],
)
def test_a_label_says_how_much_a_revision_changes(answer, label):
    """Similarity 2·common/(4 + 4): 1, 0.75, 0.5, 0.25; minor from 0.5."""
    assert revision.label_of(answer, [1, 2, 3, 4], 0.5) == label


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[keep]", ("[keep]", "")), ("[minor]\n x \n", ("[minor]", "x")), ("[major]\na\nb", ("[major]", "a\nb")),
        ("[minor]", None), ("[minor]\n\n[keep]", None), ("x", None), ("", None), ("[other]\nx", None),
    ],
)  # fmt: skip
def test_what_the_reviser_wrote_is_read_or_refused(text, found):
    assert revision.parse(text) == found
