"""Which iterate a name stands for."""

import pytest

from spin_ray.run_dir.names import api_name, iterate_number, read_iterate
from spin_ray.serving.names import ModelStarts, Names, UnknownModel


@pytest.fixture
def names() -> Names:
    names = Names()
    names.serve_now(["iter-10", "sft", "iter-2"], newest="iter-10")
    return names


def test_iterates_are_listed_by_age_not_by_spelling(names: Names) -> None:
    assert names.iterates == ("sft", "iter-2", "iter-10")


def test_latest_is_the_newest_that_serves_and_moves_with_it(names: Names) -> None:
    assert names.resolve("latest") == "iter-10"
    names.serve_now(["sft", "iter-11"], newest="iter-11")
    assert names.resolve("latest") == names.newest() == "iter-11"


def test_an_unknown_name_says_which_are_known(names: Names) -> None:
    with pytest.raises(UnknownModel, match=r"'iter-3'.*sft, iter-2, iter-10, latest"):
        names.resolve("iter-3")


def test_before_anything_serves_a_name_starts_unless_no_iterate_can_have_it() -> None:
    names = Names()
    for name in ("latest", "sft", "iter-3"):
        with pytest.raises(ModelStarts):
            names.resolve(name)
    with pytest.raises(UnknownModel, match="'gpt-4' does not exist") as unknown:
        names.resolve("gpt-4")
    assert not isinstance(unknown.value, ModelStarts)


def test_what_starts_is_no_unknown_model(names: Names) -> None:
    names.serve_now(["sft"], newest="sft", starting=["iter-0"], settled=False)
    with pytest.raises(ModelStarts, match="'iter-0' starts"):
        names.resolve("0")
    names.serve_now(["sft"], newest=None, starting=["iter-0"], settled=False)
    with pytest.raises(ModelStarts, match="'latest' starts"):
        names.resolve("latest")
    for settled, name in ((False, "iter-1"), (True, "latest")):
        names.serve_now(["sft"], newest=None, settled=settled)
        with pytest.raises(UnknownModel) as unknown:
            names.resolve(name)
        assert not isinstance(unknown.value, ModelStarts)


def test_numbers_and_names_are_inverse() -> None:
    assert [iterate_number(api_name(number)) for number in range(13)] == list(range(13))


@pytest.mark.parametrize(
    ("spelt", "iterate"),
    [("sft", 0), ("0", 1), ("iter-0", 1), ("iter_000", 1), ("1", 2), ("iter-1", 2), ("iter_001", 2), ("iter_1", 2)],
)
def test_every_spelling_of_an_iterate_is_read(spelt: str, iterate: int) -> None:
    assert read_iterate(spelt) == iterate


@pytest.mark.parametrize("name", ["", "iter", "iter-", "-1", "iter--1", "SFT", "latest", "1.0", "iter 1", "²"])
def test_other_names_are_none(name: str) -> None:
    assert read_iterate(name) is None


def test_a_request_may_spell_its_model_in_any_way_and_one_is_told(names: Names) -> None:
    assert {names.resolve(spelt) for spelt in ("iter-2", "iter_002", "2")} == {"iter-2"}
