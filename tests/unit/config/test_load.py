"""Reading of recipes: files, overrides, the words of errors, and anything at all as input."""

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.config.load import load_config, parse_config
from spin_ray.config.recipe import SpinConfig, flatten
from spin_ray.errors import ConfigError
from tests.support.fakes import MINIMAL
from tests.support.paths import RECIPES
from tests.support.settings import SECTIONS, leaves

PLAIN = {**MINIMAL, "train": {"learning_rate": 1e-6}}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    return path


# Files and overrides


def test_a_mapping_is_a_recipe_with_the_same_words_for_what_is_wrong():
    """SpinConfig itself raises pydantic's errors, which ``except UserError`` does not catch."""
    assert load_config(PLAIN, {"iterations": 1}) == parse_config(PLAIN | {"iterations": 1}, "")
    assert PLAIN.get("iterations") is None, "the mapping itself stays"
    with pytest.raises(ConfigError, match=r"^the recipe: iteration: unknown key \(did you mean iterations\?\)$"):
        load_config(PLAIN | {"iteration": 2})
    paths = {"model": MappingProxyType({"path": Path("m")}), "data": {"train": [{"path": Path("d")}]}}
    assert load_config(paths) == load_config({"model": {"path": "m"}, "data": {"train": [{"path": "d"}]}})
    with pytest.raises(ConfigError, match="a recipe is a file, a name or a mapping, not SpinConfig"):
        load_config(cast(Any, load_config(PLAIN)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("model: [", "is not YAML"),
        ("- a\n- b\n", "must hold sections (model, data, …), found list"),
        ("", "must hold sections (model, data, …), found nothing"),
        ("seed: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("[" * 350, "is not YAML"),
        ("train:\n  epochs: 1\n  epochs: 3\n", "is not YAML: the key epochs stands twice (line 3, column 3)"),
        (
            "a: 1\n---\nb: 2\n",
            "is not YAML: expected a single document in the stream but found another document (line 2",
        ),
        (
            "train:\n\tepochs: 1\n",
            "is not YAML: found character '\\t' that cannot start any token (line 2, column 1); indent",
        ),
        ("a: !!bool maybe", "is not YAML"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_a_recipe_that_is_no_mapping_is_one_line(tmp_path, content, reason):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}: {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_or_not_text_is_one_line(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, reason in {"none.yaml": "no such file", "binary.yaml": "cannot be read", ".": "cannot be read"}.items():
        with pytest.raises(ConfigError, match=reason):
            load_config(tmp_path / name)


def test_recipes_that_come_with_the_package_are_found_by_name_anywhere(tmp_path, monkeypatch):
    """A file of that name goes first; a name that is neither is told with those that are."""
    monkeypatch.chdir(tmp_path)
    assert load_config("smoke") == load_config(RECIPES / "smoke.yaml")
    (tmp_path / "smoke").mkdir()  # RUN, from `--out smoke`
    assert load_config("smoke") == load_config(RECIPES / "smoke.yaml")
    (tmp_path / "smoke").rmdir()
    (tmp_path / "smoke").write_text("{}")
    with pytest.raises(ConfigError, match="smoke: model"):
        load_config("smoke")
    with pytest.raises(ConfigError, match=r"smok: there is no such file; .* demo, .* smoke, .* zephyr_7b"):
        load_config("smok")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.learning_rate", "5e-7", 5e-7),  # YAML 1.1 reads this as text; a number is meant
        ("train.learning_rate", "[5e-7, 5e-7, 1e-7, 1e-7]", (5e-7, 5e-7, 1e-7, 1e-7)),
        ("objective.beta", "[0.1, 0.1, 0.1, 5.0]", (0.1, 0.1, 0.1, 5.0)),
        ("serving.models", "all", ("all",)),
        ("serving.models", "sft, latest", ("sft", "latest")),
        ("generation.sampling.max_tokens", "7", 7),
        ("model.path", "other", "other"),
        ("sft.epochs", "3", 3),
        ("evaluation.max_rows", "null", None),
        ("iterations", "9", 9),
    ],
)
def test_overrides_are_yaml_values_at_dotted_places(recipe, key, text, value):
    found: Any = load_config(recipe, {key: text})
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iterations", 9),
        ("train.learning_rate", 5e-7),
        ("objective.keep_identical", True),
        ("evaluation.max_rows", None),
        ("objective.beta", [0.1, 0.2, 0.2, 0.2]),
        ("model.chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_a_value_that_is_no_text_is_taken_as_it_is(recipe, key, value):
    found: Any = load_config(recipe, {key: value})
    for part in key.split("."):
        found = getattr(found, part)
    assert found == (tuple(value) if isinstance(value, list) else value)


def test_a_section_given_from_python_is_not_changed_by_other_overrides(recipe):
    section = {"epochs": 1}
    config = load_config(recipe, {"train": section, "train.learning_rate": 1e-6})
    assert (config.train.epochs, config.train.learning_rate, section) == (1, 1e-6, {"epochs": 1})


def test_a_section_comes_before_its_fields_whatever_was_said_first(recipe):
    first = load_config(
        recipe, {"train.lora.merge": "false", "train.lora": "{rank: 4, target_modules: 'q_proj,v_proj'}"}
    )
    assert first.train.lora is not None and not first.train.lora.merge
    assert (first.train.lora.rank, first.train.lora.target_modules) == (4, ("q_proj", "v_proj"))


def test_an_override_leaves_the_other_values_of_its_section(recipe):
    config = load_config(recipe, {"train.epochs": "1"})
    assert (config.train.epochs, config.train.learning_rate) == (1, 1e-6)


def test_an_override_may_name_a_section_that_the_recipe_left_empty(recipe):
    recipe.write_text(yaml.safe_dump(MINIMAL) + "sft:\n")
    assert load_config(recipe, {"sft.epochs": "2"}).sft.epochs == 2


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("train.learning_rat", "1", "train.learning_rat: unknown key"),
        ("model.path.x", "1", "--model.path.x: path is a value, not a section"),
        ("train.epochs", "[1", "--train.epochs=[1: is not YAML"),
        ("seed", "2024-13-45", "--seed=2024-13-45: is not YAML"),
        ("seed", "-1", "seed: input should be greater than or equal to 0"),
        ("train..epochs", "1", "unknown key"),
    ],
)
def test_a_bad_override_is_named(recipe, key, text, reason):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, {key: text})
    assert reason in str(caught.value)


# Names and import paths

NAMED = [
    ("algorithm", "'spin', 'continued_sft', 'dpo', 'sppo', 'self_reinforcement', 'seft', 'tspin' or 'sdft'"),
    ("objective.loss", "'logistic', 'hinge', 'exponential', 'correlation' or 'space'"),
    ("train.backend", "'fsdp2' or 'deepspeed'"),
    ("train.optimizer.name", "'rmsprop', 'adamw', 'adamw_8bit' or 'muon'"),
]


@pytest.mark.parametrize(("key", "names"), NAMED)
def test_an_unknown_name_is_told_the_known_ones(recipe, key, names):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, {key: "best"})
    assert str(caught.value) == (
        f"{recipe}: {key}: input should be {names}, or an import path such as my_pkg.mine:name (got 'best')"
    )


def test_a_dotted_name_is_told_the_path_that_it_was_meant_to_be(recipe):
    with pytest.raises(ConfigError, match=r"\(got 'torch.optim.NAdam'\) \(did you mean torch\.optim:NAdam\?\)$"):
        load_config(recipe, {"train.optimizer.name": "torch.optim.NAdam"})


@pytest.mark.parametrize("key", [key for key, _ in NAMED])
@pytest.mark.parametrize("path", ["mine:Mine", "my_pkg.mine:Mine", "_a.b2.c:_d"])
def test_an_import_path_stands_for_something_of_the_users_own(recipe, key, path):
    config = load_config(recipe, {key: path})
    assert flatten(config.model_dump(mode="json"))[key] == path
    assert config.identity()[key] == path


@pytest.mark.parametrize("key", [key for key, _ in NAMED])
@pytest.mark.parametrize("path", ["my pkg:Mine", "mine:", ":Mine", "a..b:C", "a:b:c", "a/b.py:C", "1a:B", "a:B\n"])
def test_an_import_path_of_the_wrong_form_is_told_the_right_one(recipe, key, path):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, {key: json.dumps(path)})
    reason = "must be an import path module:Name, e.g. my_package.mine:Name"
    assert str(caught.value) == f"{recipe}: {key}: {reason} (got {path!r})"


# Anything at all

names = [name for section in SECTIONS for name in section.model_fields]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(["auto", "5e-7", "linear", "embedded:x", 0, 1, -1, 2**70])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(names) | st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def config_or_error(content: dict[str, Any]) -> SpinConfig | str:
    try:
        return parse_config(content, source="fuzz")
    except ConfigError as error:
        return str(error)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(SpinConfig.model_fields)) | st.text(max_size=3), values, max_size=6))
def test_any_mapping_is_a_config_or_a_config_error(content):
    for recipe in (content, MINIMAL | content):
        found = config_or_error(recipe)
        assert isinstance(found, SpinConfig) or found.removeprefix("fuzz: ")


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(leaves()), scalars | st.lists(scalars, max_size=4), min_size=1, max_size=3))
def test_any_value_of_a_setting_is_accepted_or_its_setting_is_named(changes):
    content: dict[str, Any] = {}
    for key, value in (flatten(MINIMAL) | changes).items():
        *sections, field = key.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
    found = config_or_error(content)
    named = {part for key in changes for part in (key.split(".")[0], key.split(".")[-1])}
    assert isinstance(found, SpinConfig) or any(part in found for part in named)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abk0159-_:.[]{}&*!?|>'\"%@#, \n\t=~", max_size=40) | st.text(max_size=20))
def test_any_override_is_a_config_or_a_config_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    for key in ("seed", "generation.engine.extra", text):
        try:
            load_config(path, {key: text})
        except ConfigError:
            continue


def test_a_name_with_a_dollar_and_two_merged_anchors_are_what_they_say(tmp_path):
    """Only a whole part of a path can be meant as a variable, and `<<` may stand twice, as in PyYAML."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: /d/cash$A/x}\ndata: {train: a.jsonl}\ntrain:\n  <<: {workers: 2}\n  <<: {seed_x: 1}\n"
    )
    with pytest.raises(ConfigError, match=r"train\.seed_x: unknown key"):
        load_config(path)
    path.write_text("model: {path: /d/$data/x}\ndata: {train: a.jsonl}\n")
    with pytest.raises(ConfigError, match=r"model\.path: /d/\$data/x: recipes read no variables"):
        load_config(path)
