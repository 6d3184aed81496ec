"""SFT rows -> prompts, below Ray: each row is used or in quarantine with a reason, and none gets lost."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Source
from spin_ray.errors import DataError
from spin_ray.inputs import sources
from spin_ray.inputs.conversations import Unusable
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.inputs.sources import split
from spin_ray.inputs.survey import Survey
from spin_ray.loop import driver
from spin_ray.loop.stages.prompts import stage as prompts
from spin_ray.loop.stages.prompts.quarantine import check_source
from spin_ray.loop.stages.prompts.selection import first_of_each
from spin_ray.loop.stages.prompts.slices import RenderedSlice, RenderSlice
from spin_ray.report import doctor
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import MANIFEST, Storage, table_from_bytes
from tests.support import small_run
from tests.support.fakes import config_of
from tests.support.fakes import rows_of as rows_of_artefact
from tests.support.tokenizer_kinds import transformers_date
from tests.unit.inputs.test_prompt_rows import chat, rows_of, task_of

REASONS = {"malformed", "empty", "too_long", "template", "duplicate"}
Row = dict[str, Any]


class Made:
    """Prompts, quarantine and counts of a data file, made as the stage makes them but for Ray."""

    def __init__(
        self,
        root: Path,
        lines: list[str | Row],
        max_rows: int | None = None,
        part_rows: int = 4,
        leaked: Any = None,
        **task: Any,
    ):
        data = root / "data.jsonl"
        root.mkdir(exist_ok=True)
        data.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        self.run = RunDir(Storage(root / "run"))
        render = RenderSlice(self.run.storage, "prompts", task_of(**task))
        slices = []
        for number, piece in enumerate(split([str(data)])):
            item = {"uri": piece.uri, "start": piece.start, "stop": piece.stop, "name": f".attempts/{number:06d}"}
            slices.append(RenderedSlice.of(render(item)))
        self.slices, artefact = slices, self.run.prompts
        firsts = first_of_each([each.ids for each in slices], [0] * len(slices), max_rows, leaked)
        self.entries, self.of_slices = prompts._finish(self.run.storage, slices, artefact, firsts, part_rows)
        self.reasons = sum(self.of_slices, Counter())

    @property
    def rows(self) -> list[Row]:
        tables = [self.run.prompts.read_part(name, entry) for name, entry in sorted(self.entries.items())]
        return [row for table in tables for row in table.to_pylist()]

    @property
    def quarantine(self) -> list[Row]:
        return table_from_bytes(self.run.storage.read("quarantine/prompts.parquet")).to_pylist()


# Whole files


def test_duplicates_go_to_quarantine_and_the_first_stays(tmp_path):
    rows = [{"messages": chat("a", "b")}, {"prompt": "a", "response": "b"}, {"messages": chat("a", "c")}]
    made = Made(tmp_path, rows)
    assert [json.loads(row["messages"])[1]["content"] for row in made.rows] == ["b", "c"]
    assert made.reasons == {"duplicate": 1}
    assert made.quarantine[0]["origin"] == f"{tmp_path}/data.jsonl:2"


def test_a_process_opens_the_tokenizer_once_for_all_slices(tmp_path):
    sent = ray.cloudpickle.dumps(RenderSlice(Storage(tmp_path), "prompts", task_of()))
    one, other = ray.cloudpickle.loads(sent), ray.cloudpickle.loads(sent)
    assert one._task.renderer is other._task.renderer


def test_duplicates_are_found_over_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE_BYTES", 50)
    made = Made(tmp_path, [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}] * 3)
    assert len(made.rows) == 2
    assert made.reasons == {"duplicate": 4}


def test_rows_keep_their_order_and_are_cut_into_parts(tmp_path, monkeypatch):
    """Ten rows from many slices, in parts of four: 4, 4, 2."""
    monkeypatch.setattr(sources, "SLICE_BYTES", 70)
    made = Made(tmp_path, [{"prompt": f"q{i}", "response": "r"} for i in range(10)])
    assert [json.loads(row["messages"])[0]["content"] for row in made.rows] == [f"q{i}" for i in range(10)]
    assert [entry.rows for _, entry in sorted(made.entries.items())] == [4, 4, 2]


def test_max_rows_takes_the_first_usable_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE_BYTES", 70)
    rows = ["{", *({"prompt": f"q{i}", "response": "r"} for i in (0, 0, 1, 2, 3, 4))]
    made = Made(tmp_path, rows, max_rows=3)
    assert [json.loads(row["messages"])[0]["content"] for row in made.rows] == ["q0", "q1", "q2"]
    assert made.reasons == {"malformed": 1, "duplicate": 1}


def test_rows_that_are_held_out_are_not_trained_on_and_do_not_count_as_bad(tmp_path, caplog):
    """q1 is held out: of five rows, two are leaks, one repeats q0, and two stay."""
    rows = [{"prompt": f"q{i}", "response": "r"} for i in (0, 1, 1, 0, 2)]
    held_out = Made(tmp_path / "h", rows[1:2]).slices[0].ids
    made = Made(tmp_path, rows, max_rows=2, leaked=held_out)
    assert [json.loads(row["messages"])[0]["content"] for row in made.rows] == ["q0", "q2"]
    assert made.reasons == {"leak": 2, "duplicate": 1}
    check(made, 0.34)
    assert "2 rows are held out, too" in caplog.text
    with pytest.raises(DataError, match=r"1 of 3 rows cannot be used \(1 duplicate\).*data\.jsonl:4: duplicate"):
        check(made, 0.33)
    with pytest.raises(DataError, match="all rows are held out, too"):
        check(Made(tmp_path, rows[1:2], leaked=held_out), 1.0)


def test_forms_and_unread_columns_are_found_over_all_slices_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SLICE_BYTES", 50)
    rows = [{"prompt": f"q{i}", "response": "r", "id": i, "system": None} for i in range(3)]
    made = Made(tmp_path, [*rows, {"messages": chat("a", "")}, {"messages": chat("a", "b"), "tag": "x"}])
    assert sum((each.ignored for each in made.slices), Counter()) == {"id": 3, "tag": 1}
    prompts._refuse_mixed_files(made.slices, [f"file{i}" for i in range(len(made.slices))])
    with pytest.raises(DataError, match=r"jsonl:1: is of the form prompt_response .*is of the form messages \("):
        prompts._refuse_mixed_files(made.slices, ["one"] * len(made.slices))


def test_quarantine_holds_the_row_as_it_came(tmp_path):
    lines = [
        '{"prompt": "a",  "response" :"b" , "id":0x1}',
        '{"messages": [], "kept": [1.50]}',
        '{"prompt": "\\ud800", "response": "b"}',
    ]
    made = Made(tmp_path, lines)
    assert [row["row"].decode() for row in made.quarantine] == lines
    assert [row["reason"] for row in made.quarantine] == ["malformed", "empty", "malformed"]
    assert {row["stage"] for row in made.quarantine} == {"prompts"}


def test_parts_of_an_attempt_that_was_never_committed_are_replaced(tmp_path):
    Made(tmp_path, [{"prompt": f"old{i}", "response": "r"} for i in range(9)])
    made = Made(tmp_path, [{"prompt": "new", "response": "r"}])
    assert made.run.prompts.part_names() == ["part-00000.parquet"]
    assert json.loads(made.rows[0]["messages"])[0]["content"] == "new"


# The error budget


def check(made: Made, fraction: float) -> None:
    [read] = prompts._by_source([Source(path="d.jsonl")], [0] * len(made.slices), made.slices, made.of_slices)
    check_source(read, made.run.prompts, fraction)


def test_too_many_bad_rows_are_an_error_that_says_which_and_why(tmp_path):
    good = [{"prompt": f"q{i}", "response": "r"} for i in range(6)]
    made = Made(tmp_path, [*good, "{", {"messages": []}, "[]", {"prompt": "q0", "response": "r"}])
    with pytest.raises(DataError) as caught:
        check(made, 0.39)
    assert str(caught.value) == (
        "d.jsonl: 4 of 10 rows cannot be used (2 malformed, 1 empty, 1 duplicate), more than "
        f"data.max_quarantine_fraction 0.39; first: {tmp_path}/data.jsonl:7: malformed: not a JSON object "
        "(Expecting property name enclosed in double quotes at character 2); "
        f"all are in {made.run.storage.root}/quarantine/prompts.parquet"
    )


def test_as_many_bad_rows_as_allowed_are_counted_in_the_log(tmp_path, caplog):
    """4 of 10, and 0.4 are allowed."""
    made = Made(tmp_path, [*({"prompt": f"q{i}", "response": "r"} for i in range(6)), "{", "{", "{", "{"])
    check(made, 0.4)
    assert "4 of 10 rows in quarantine (4 malformed)" in caplog.text


def test_rows_that_are_not_taken_count_as_rows_that_were_read(tmp_path, caplog):
    """One of 20 is bad, and two are taken."""
    made = Made(tmp_path, [*({"prompt": f"q{i}", "response": "r"} for i in range(19)), "{"], max_rows=2)
    check(made, 0.05)
    assert "1 of 20 rows in quarantine (1 malformed)" in caplog.text


def test_conversations_are_counted_as_conversations_and_not_by_their_turns(tmp_path):
    """Of five, one is malformed; each of the others makes three rows, of which one is the same in all: 3 of 12 rows
    repeat, which is one conversation's worth.
    """
    turns = [
        {"messages": [*chat("hi", "hello"), *chat(f"q{i}", "r"), *chat(f"p{i}", "r")]} for i in range(4)
    ]  # fmt: skip
    made = Made(tmp_path, [*turns, "{"], turns="all")
    assert made.reasons == {"malformed": 1, "duplicate": 3} and len(made.rows) == 9
    with pytest.raises(DataError, match=r"2 of 5 rows cannot be used \(3 duplicate, 1 malformed\)"):
        check(made, 0.39)
    check(made, 0.4)


def test_no_usable_row_is_an_error_whatever_is_allowed(tmp_path):
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        check(Made(tmp_path, ["{"]), 1.0)


def test_no_row_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"d\.jsonl: holds no rows"):
        check(Made(tmp_path, ["", "  "]), 1.0)


# Several sources

TINY = resolve("embedded:tiny-llama")


@dataclass(frozen=True)
class Files:
    """Files of rows ``q0``, ``q1``, …, each a source, and what a run and doctor say of them."""

    root: Path

    def source(self, name: str, *numbers: int, bad: int = 0, **measure: float) -> Row:
        lines = [json.dumps({"prompt": f"q{number}", "response": "r"}) for number in numbers]
        (self.root / f"{name}.jsonl").write_text("\n".join([*lines, *["{"] * bad]) + "\n")
        return {"path": str(self.root / f"{name}.jsonl")} | measure

    def config(self, train: Any, heldout: Any = None, fraction: float = 0.2, **sections: Any) -> SpinConfig:
        data = {"train": train, "heldout": heldout, "max_quarantine_fraction": fraction}
        return config_of(model={"path": TINY}, data=data, **sections)

    def start(self, config: SpinConfig) -> Any:
        model = SimpleNamespace(path=TINY)
        return SimpleNamespace(model=model, train=config.data.train, heldout=config.data.heldout, questions=None)

    def prepared(self, config: SpinConfig, folder: str = "run") -> RunDir:
        run = RunDir(Storage(self.root / folder))
        driver._prepare_prompts(run, config, self.start(config))
        return run

    def surveyed(self, config: SpinConfig) -> list[Survey]:
        found = doctor.look_at_data(config, self.start(config), every_row=True)
        doctor.check_surveys(config, self.start(config), found)
        return found


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    small_run.in_this_process(monkeypatch)
    return Files(tmp_path)


def said(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def numbers_of(artefact: Artefact) -> list[int]:
    return sorted(int(json.loads(row["messages"])[0]["content"][1:]) for row in rows_of_artefact(artefact))


def test_a_bad_source_is_refused_however_small_it_is_beside_the_others(files):
    """6 of 206 rows are bad, which are 6 of the second source's 10."""
    train = [files.source("chat", *range(196), weight=3), files.source("maths", 996, 997, 998, 999, bad=6, weight=1)]
    config = files.config(train)
    for call in (lambda: files.prepared(config), lambda: files.surveyed(config)):
        assert "maths.jsonl: 6 of 10 rows cannot be used (6 malformed), more than data.max_quar" in said(call)
    assert "maths.jsonl:5: malformed" in said(lambda: files.prepared(config))


def test_a_weighted_draw_that_wastes_the_other_sources_is_told(files, caplog):
    train = [files.source("chat", *range(40), weight=3), files.source("maths", 900, 901, weight=1)]
    assert len(numbers_of(files.prepared(files.config(train)).prompts)) == 8
    assert "maths.jsonl: its 2 usable rows limit the mixture at weight 1: only 6 of the 40 usable rows" in caplog.text


def test_rows_of_an_earlier_source_are_taken_from_that_one_and_are_no_fault(files, caplog):
    """All but one row of b are in a, one of them twice; doctor and the run count alike."""
    train = [files.source("a", *range(9)), files.source("b", *range(5), 9, 4)]
    config = files.config(train, fraction=0.5)
    run = files.prepared(config)
    assert numbers_of(run.prompts) == list(range(10))
    assert run.prompts.manifest().counts == {"overlap": 5, "duplicate": 1}
    assert "b.jsonl: 5 rows are in an earlier source, too" in caplog.text
    found = files.surveyed(config)[1]
    assert (found.overlapping, found.refused, found.drawable) == (5, {"duplicate": 1}, 1)
    strict = files.config(train, fraction=0.1)  # of b: one of two rows that are not in a
    for call in (lambda: files.prepared(strict, "other"), lambda: files.surveyed(strict)):
        assert "b.jsonl: 1 of 2 rows cannot be used (1 duplicate)" in said(call)


def test_a_source_whose_rows_are_all_in_an_earlier_one_gives_none(files):
    config = files.config([files.source("a", *range(9)), files.source("b", 3, 4)])
    for call in (lambda: files.prepared(config), lambda: files.surveyed(config)):
        assert "b.jsonl: has 0 usable rows" in said(call)


def test_rows_held_out_twice_are_leaks_for_doctor_too(files):
    config = files.config(files.source("a", 0, 0, 0, 1, 2)["path"], files.source("held", 0)["path"], fraction=0.0)
    assert files.prepared(config).prompts.manifest().counts == {"leak": 3}
    assert files.surveyed(config)[0].leaked == 3


# Held-out rows beyond those that are measured


@pytest.mark.parametrize("cut", ["max_rows", "rows", "weight"])
def test_rows_that_are_held_out_and_not_measured_are_not_trained_on_either(files, cut):
    """Two of four held-out rows are measured; a start that comes later leaves all four out, too."""
    more = {"evaluation": {"max_rows": 2}} if cut == "max_rows" else {}
    held = files.source("held", 0, 1, 2, 3)
    heldout = {
        "max_rows": held["path"],
        "rows": [held | {"rows": 2}],
        "weight": [held | {"weight": 2}, files.source("one", 99, weight=1)],
    }[cut]
    config = files.config(files.source("train", *range(8))["path"], heldout, **more)
    run = files.prepared(config)
    assert len(numbers_of(run.heldout)) == (3 if cut == "weight" else 2)
    assert numbers_of(run.prompts) == [4, 5, 6, 7]
    assert run.prompts.manifest().counts == {"leak": 4}
    run.storage.delete("prompts")
    assert numbers_of(files.prepared(config).prompts) == [4, 5, 6, 7]


def test_ids_of_an_attempt_that_was_never_committed_are_replaced(files):
    config = files.config(
        files.source("train", *range(8))["path"], files.source("held", 0, 1)["path"], evaluation={"max_rows": 1}
    )
    run = files.prepared(config)
    for name in ("prompts", f"heldout/{MANIFEST}"):
        run.storage.delete(name)
    files.source("held", 0, 2)
    assert numbers_of(files.prepared(config).prompts) == [1, 3, 4, 5, 6, 7]


def test_no_ids_are_kept_where_every_held_out_row_is_measured(files):
    config = files.config(files.source("train", 0, 1, 2)["path"], files.source("held", 0, 0, 3)["path"], fraction=0.5)
    run = files.prepared(config)
    assert not run.heldout_ids.is_committed and numbers_of(run.prompts) == [1, 2]


# Shards for all engines


def test_engines_without_a_shard_are_told_before_the_run_has_begun(files, caplog):
    """Eight answers in shards of 4 are two shards for four engines."""
    played = {"shard_rows": 4, "replicas": 4}
    config = files.config(files.source("train", *range(8))["path"], generation=played)
    run = files.prepared(config)
    driver._warn_of_idle_engines(run, config)
    assert "8 answers make 2 shards for 4 engines, so that 2 of these have nothing to do; set generation" in caplog.text
    assert "shard_rows to 2 or less" in caplog.text
    caplog.clear()
    driver._warn_of_idle_engines(run, files.config("d", generation=played | {"shard_rows": 2}))
    run.storage.create("run.json", json.dumps({"config": config.model_dump(mode="json")}).encode())
    run.storage.create("iter_000/generations/part-00000.parquet", b"")
    driver._warn_of_idle_engines(run, config)
    assert not caplog.text


# Anything at all

any_text = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    ["", " ", "\x00", "\ud800", "<|im_end|>", "\ue0000\ue001", "x" * 2000, "é" * 50]
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "tool"]) | any_json
messages = st.lists(st.fixed_dictionaries({}, optional={"role": roles, "content": any_text | any_json}), max_size=5)
good_chat = st.lists(any_text, min_size=2, max_size=6).map(lambda texts: chat(*texts))
any_row = (
    st.fixed_dictionaries({}, optional={"messages": messages | good_chat | any_json, "answer": any_json})
    | st.fixed_dictionaries({"messages": good_chat}, optional={"answer": any_json})
    | st.fixed_dictionaries({"prompt": any_text | any_json, "response": any_text | any_json})
    | any_json
)


@pytest.mark.slow
@settings(max_examples=35, deadline=None)
@given(st.lists(any_row, min_size=1, max_size=5), st.sampled_from(["last", "first", "all"]), st.none() | any_text)
@example([{"messages": chat("a", "b"), "answer": 10**400}], "last", None)
@example([{"messages": chat(*["q", "r"] * 2000)}], "last", None)
@example([{"messages": [[[[]]]]}, {"messages": chat("a" * 10**5, "b")}, {"messages": chat("a", "\x00")}], "all", "")
def test_any_row_is_used_or_in_quarantine_and_none_is_lost(tmp_path_factory, rows, turns, system):
    assume(len(rows) > 1 or not isinstance(rows[0], list))  # a file of one array is an array, and its places are bytes
    try:
        (system or "").encode()
    except UnicodeEncodeError:
        system = None  # YAML cannot hold a lone surrogate
    root = tmp_path_factory.mktemp("any")
    made = Made(root, [json.dumps(row) for row in rows], turns=turns, system=system)
    where = Counter(row["origin"] for row in made.quarantine if row["reason"] != "duplicate")
    assert {row["reason"] for row in made.quarantine} <= REASONS
    assert max(where.values(), default=1) == 1
    unique_good = {row["prompt_id"] for row in made.rows}
    assert len(unique_good) == len(made.rows)
    expected = set()
    for number, row in enumerate(rows, start=1):
        content = json.loads(json.dumps(row)) if isinstance(row, dict) else None
        try:
            expected |= {made_row["prompt_id"] for made_row in rows_of(content, task_of(turns=turns, system=system))}
            in_quarantine = 0
        except Unusable:
            in_quarantine = 1
        assert where[f"{root}/data.jsonl:{number}"] == in_quarantine
    assert unique_good == expected
    for row in made.rows:
        assert len(row["prompt_ids"]) + len(row["real_ids"]) <= 128
        assert row["real_ids"].count(2) == 1


def test_the_date_that_a_template_writes_makes_no_other_template():
    """Llama 3.2's template writes the day. A run goes on after midnight."""
    tokenizer = load_tokenizer(resolve("embedded:tiny-llama"))
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + tokenizer.chat_template
    renderer = ChatRenderer(tokenizer)
    question = [{"role": "user", "content": "?"}]
    first, prompt = prompts.template_digest(renderer), renderer.render_prompt(question)
    tomorrow = datetime.now() + timedelta(days=1)
    later = ChatRenderer(tokenizer, date=tomorrow)
    assert later.render_prompt(question) != prompt, "or the test shows nothing"
    assert prompts.template_digest(later) == first
    with transformers_date(tomorrow):
        assert renderer.render_prompt(question) == prompt, "a run has one date"
    tokenizer.chat_template = "Today: " + tokenizer.chat_template
    assert prompts.template_digest(ChatRenderer(tokenizer)) != first
