"""Rows drawn from several sources of training data."""

import json

import numpy as np
import pytest

from spin_ray.config.sections import DataConfig, Source, name_of, sources_of
from spin_ray.errors import ConfigError, DataError
from spin_ray.inputs.check import check_recipe
from spin_ray.inputs.mixture import draw, expected_shares, shares_of, warn_of_limit
from spin_ray.planning.plan import _heldout_rows
from spin_ray.report.doctor import look_at_data
from tests.support.fakes import config_of
from tests.unit.inputs.test_check import config_for

A, B, C = (Source(path=name) for name in "abc")


def weighted(source: Source, weight: float) -> Source:
    return source.model_copy(update={"weight": weight})


@pytest.mark.parametrize(
    ("sources", "usable", "shares"),
    [
        ([A], [7], [7]),
        ([A, B.model_copy(update={"rows": 3})], [7, 9], [7, 3]),
        ([weighted(A, 3), weighted(B, 1)], [90, 50], [90, 30]),
        ([weighted(A, 0.3), weighted(B, 0.1), C], [90, 10, 5], [30, 10, 5]),
        ([weighted(A, 1000), weighted(B, 1)], [9, 9], [9, 1]),
    ],
    ids=["all of one", "a number", "the first is scarce", "the second is scarce", "never none"],
)
def test_what_each_source_gives(sources, usable, shares):
    assert shares_of(sources, usable) == shares


@pytest.mark.parametrize("source", [A, Source(path="a", rows=3), Source(path="a", weight=1)])
def test_a_source_that_cannot_give_its_rows_is_named(source):
    with pytest.raises(DataError, match=r"a: has 0 usable rows, data\.train asks for"):
        shares_of([source, B], [0, 5])


def test_an_estimate_never_refuses_a_source():
    sources = [A.model_copy(update={"rows": 5}), weighted(B, 2), weighted(C, 1)]
    assert expected_shares(sources, [3, 10, 0]) == [5, 2, 1]


def test_a_source_that_leaves_most_rows_of_the_others_unused_is_named():
    """50 rows at weight 1 let the other give 150 of its 100,000. Half of its rows, or no second weight, is no waste."""
    sources = [weighted(A, 3), weighted(B, 1)]
    assert warn_of_limit(sources, [100_000, 50]) == (
        "b: its 50 usable rows limit the mixture at weight 1: only 150 of the 100,000 usable rows of the other sources "
        "with a weight are drawn; lower its weight, give it more rows, or leave the weights out to take every row"
    )
    assert warn_of_limit(sources, [300, 50]) is None
    assert warn_of_limit([A, weighted(B, 1)], [100_000, 50]) is None
    assert warn_of_limit([A, B.model_copy(update={"rows": 5})], [100_000, 50]) is None


def test_the_seed_alone_decides_which_rows_are_drawn():
    """Slices 0 and 1 are a's, slice 2 is b's; unusable rows are never drawn, and no row is drawn twice."""

    def drawn(seed: int) -> list[list[bool]]:
        masks = [np.array([True, False, True] * 20), np.ones(40, bool), np.ones(30, bool)]
        sources = [Source(path="a", rows=25), Source(path="b", rows=7)]
        assert draw(masks, sources, [0, 0, 1], seed) == [25, 7]
        assert sum(int(mask.sum()) for mask in masks[:2]) == 25 and masks[2].sum() == 7
        assert not masks[0][1::3].any()
        return [mask.tolist() for mask in masks]

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_path_is_one_source_and_its_identity_is_the_text():
    assert sources_of("d") == (Source(path="d"),) and name_of("d") == "d"
    assert config_of(data={"train": "d"}).identity()["data.train"] == "d"
    several = config_of(data={"train": [{"path": "d", "rows": 5}, {"path": "e"}]})
    assert name_of(several.data.train) == "d, e"
    assert several.identity()["data.train"][0] == {"path": "d", "weight": None, "rows": 5}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"path": "d", "weight": 1, "rows": 1}]}, "d has both weight and rows"),
        ({"train": [{"path": "d"}], "max_rows": 5}, "data.max_rows: data.train is a list of sources"),
        ({"train": [{"path": "d"}, {"path": "s3://id:key@b/d"}]}, "data.train: holds credentials"),
        ({"train": []}, "at least 1 item"),
        ({"train": "d", "questions": [{"path": "s3://id:key@b/d"}]}, "data.questions: holds credentials"),
        ({"train": "d", "questions": [{"path": "q"}], "max_rows": 5}, "data.questions is a list of sources"),
    ],
)
def test_sources_that_make_no_sense_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        config_of(data=data)


def test_every_source_is_checked_before_anything_runs(tmp_path):
    for name, row in (("a", {"prompt": "q", "response": "r"}), ("b", {"instruction": "q", "output": "r"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    sources = [{"path": "embedded:arithmetic-train", "weight": 2}, {"path": str(tmp_path / "b.jsonl"), "weight": 1}]
    start = check_recipe(config_for(data={"train": sources}))
    assert [source.path.rpartition("/")[2] for source in sources_of(start.train)][1] == "b.jsonl"
    with pytest.raises(DataError, match=r"none\.jsonl: no such data"):
        check_recipe(config_for(data={"train": [*sources, {"path": str(tmp_path / "none.jsonl")}]}))
    two = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl")}]
    with pytest.raises(DataError, match=r"a\.jsonl, .*b\.jsonl: an iteration has at most 2 pairs"):
        check_recipe(config_for(data={"train": two}, train={"global_batch_pairs": 4}))
    weighted = [each | {"weight": 1} for each in (sources[0], two[1])]
    with pytest.raises(DataError, match="an iteration has at most 2 pairs by their weights, fewer than"):
        check_recipe(config_for(data={"train": weighted}, train={"global_batch_pairs": 4}))
    check_recipe(config_for(data={"train": weighted}, train={"global_batch_pairs": 2}))


def test_held_out_rows_may_come_from_several_sources_too(tmp_path):
    for name in "abc":
        row = {"prompt": "q", "response": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "p"}))
    a, b, c = ({"path": str(tmp_path / f"{name}.jsonl")} for name in "abc")
    config = config_for(data={"train": [a, c], "heldout": [a | {"rows": 1}, b], "questions": [c]})
    start = check_recipe(config)
    one = check_recipe(config_for(data={"train": [a, c], "heldout": b["path"], "questions": c["path"]}))
    assert start.questions_digest == one.questions_digest and start.heldout_digest != one.heldout_digest
    assert [found.leaked for found in look_at_data(config, start, every_row=True)] == [2, 0, 0, 0, 0]
    assert _heldout_rows(config) == 3
    with pytest.raises(DataError, match=r"none\.jsonl: no such data"):
        check_recipe(config_for(data={"train": [a], "heldout": [b, {"path": str(tmp_path / "none.jsonl")}]}))
    with pytest.raises(ValueError, match=r"evaluation\.max_rows: data\.heldout is a list of sources"):
        config_of(data={"train": "d", "heldout": [b]}, evaluation={"max_rows": 3})


def test_a_column_that_no_row_has_is_named_at_the_start():
    with pytest.raises(ConfigError, match=r"data\.columns\.system: none of the first rows has a column 'preamble'"):
        check_recipe(config_for(data={"columns": {"system": "preamble"}}))


def test_a_misspelt_column_is_named_at_the_start():
    with pytest.raises(ConfigError, match=r"data\.columns\.promt: no form has such a column; did you mean prompt\?"):
        check_recipe(config_for(data={"columns": {"promt": "q"}}))
    assert DataConfig(train="d", columns={"tools": "functions"}).columns
