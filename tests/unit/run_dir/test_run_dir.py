"""A run on disk: what counts as committed, what is refused, and what a crash may leave."""

import json

import pyarrow as pa
import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, RunDirError
from spin_ray.run_dir.artefact import FileEntry
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.names import api_spelling, iterate_name, part_name, read_iterate
from spin_ray.run_dir.run_dir import RunDir, open_run
from spin_ray.run_dir.storage import ATTEMPTS, MANIFEST, Storage, folder_digest

CONFIG = SpinConfig.model_validate({"model": {"path": "m"}, "data": {"train": "d"}})
FACTS = {"inputs": {"model": "11", "data": "22", "heldout": None}, "start_model": "m", "versions": {}}


def with_values(**sections: object) -> SpinConfig:
    return SpinConfig.model_validate(CONFIG.model_dump(mode="json") | sections)


def table(*values: int) -> pa.Table:
    return pa.table({"id": pa.array(values, pa.int64())})


@pytest.fixture
def run(tmp_path):
    return RunDir(Storage(tmp_path / "run"))


@pytest.fixture
def pairs(run):
    """An artefact of two parts, committed."""
    artefact = run.pairs(0)
    entries = {part_name(number): artefact.write_part(part_name(number), table(number, number)) for number in (0, 1)}
    artefact.commit(entries, {"prompts": "aa"}, {"window": 2, "rows": (1, 2)}, counts={"dropped": 3})
    return artefact


def test_a_path_is_opened_by_another_name_that_the_error_has(run):
    run.begin(CONFIG, FACTS)
    with pytest.raises(TypeError, match=r"RunDir takes a Storage; open the run by open_run\('runs/my'\)"):
        RunDir("runs/my")  # type: ignore
    assert open_run(run.storage.root).config() == CONFIG


# Artefacts


def test_an_artefact_is_there_when_its_manifest_is(run):
    artefact = run.prompts
    entry = artefact.write_part("part-00000.parquet", table(1))
    assert not artefact.is_committed
    assert artefact.already_made({}, {}) is False
    with pytest.raises(RunDirError, match="prompts: is not committed"):
        list(artefact.tables())
    artefact.commit({"part-00000.parquet": entry}, {}, {})
    assert artefact.is_committed
    assert [part.num_rows for part in artefact.tables()] == [1]


def test_only_what_the_manifest_lists_is_read(run, pairs):
    """A part of an attempt that lost, and files that are still being written."""
    run.storage.create("iter_000/pairs/part-00009.parquet", b"not even Parquet")
    run.storage.create(f"{ATTEMPTS}/0123", b"half a fi")
    assert [part["id"].to_pylist() for part in pairs.tables()] == [[0, 0], [1, 1]]
    assert pairs.manifest().rows == 4


def test_parts_are_read_in_the_order_of_their_names(run):
    artefact = run.prompts
    entries = {
        name: artefact.write_part(name, table(number)) for number, name in ((2, part_name(2)), (0, part_name(0)))
    }
    artefact.commit(entries, {}, {})
    assert [part["id"].to_pylist() for part in artefact.tables()] == [[0], [2]]


def test_the_first_commit_of_a_part_wins(run):
    first = run.prompts.write_part("part-00000.parquet", table(1))
    second = run.prompts.write_part("part-00000.parquet", table(2, 3))
    assert second == first == run.prompts.part_entry("part-00000.parquet")
    assert run.prompts.read_part("part-00000.parquet", second)["id"].to_pylist() == [1]


def test_the_first_commit_of_an_artefact_wins_and_a_second_of_the_same_work_gets_it(run, pairs):
    again = pairs.commit({}, {"prompts": "aa"}, {"window": 2, "rows": (1, 2)})
    assert again == pairs.manifest()
    assert len(again.files) == 2
    with pytest.raises(RunDirError, match="was made with other values of prompts"):
        pairs.commit({}, {"prompts": "bb"}, {"window": 2, "rows": (1, 2)})


def test_manifest_comes_back_as_it_was_written(pairs):
    manifest = pairs.manifest()
    assert manifest.counts == {"dropped": 3}
    assert manifest.settings == {"window": 2, "rows": [1, 2]}
    assert type(manifest).from_bytes(manifest.to_bytes()).digest == manifest.digest


def test_digest_of_a_manifest_follows_everything_in_it(run):
    entry = FileEntry(sha256="aa", bytes=1, rows=1)
    digests = set()
    for number, (files, inputs, settings) in enumerate(
        [({}, {}, {}), ({"part-0": entry}, {}, {}), ({}, {"a": "1"}, {}), ({}, {}, {"a": 1})]
    ):
        digests.add(run.artefact(str(number)).commit(files, inputs, settings).digest)
    assert len(digests) == 4


def test_work_done_with_the_same_inputs_and_settings_is_already_made(pairs):
    assert pairs.already_made({"prompts": "aa"}, {"rows": (1, 2), "window": 2})


@pytest.mark.parametrize(
    ("inputs", "settings", "named"),
    [
        ({"prompts": "bb"}, {"window": 2, "rows": (1, 2)}, "prompts"),
        ({"prompts": "aa"}, {"window": 3, "rows": (1,)}, r"rows \(was \[1, 2\], now \[1\]\), window \(was 2, now 3\)"),
        ({"prompts": "aa", "extra": "cc"}, {"window": 2, "rows": (1, 2)}, "extra"),
        ({}, {"window": 2, "rows": (1, 2)}, "prompts"),
    ],
)
def test_work_done_with_others_is_an_error_that_names_what_differs(pairs, inputs, settings, named):
    with pytest.raises(RunDirError, match=f"iter_000/pairs: was made with other values of {named};"):
        pairs.already_made(inputs, settings)


def test_an_input_and_a_setting_of_one_name_are_two_things(run):
    """Generations have the opponent's digest among the inputs and its name among the settings."""
    run.prompts.commit({}, {"opponent": "digest"}, {"opponent": "sft"})
    with pytest.raises(RunDirError, match="opponent"):
        run.prompts.already_made({"opponent": "digest"}, {"opponent": "iter_000"})


def test_a_part_that_changed_is_an_error_that_names_it(run, pairs):
    path = run.storage.path("iter_000/pairs/part-00001.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunDirError, match=r"iter_000/pairs/part-00001\.parquet: differs from its digest"):
        list(pairs.tables())
    with pytest.raises(RunDirError, match=r"part-00001\.parquet: is missing or differs"):
        pairs.verify()


def test_a_part_that_is_gone_is_an_error_that_names_it(run, pairs):
    run.storage.delete("iter_000/pairs/part-00000.parquet")
    with pytest.raises(RunDirError, match=r"part-00000\.parquet: is missing though its manifest lists it"):
        list(pairs.tables())
    with pytest.raises(RunDirError, match=r"part-00000\.parquet: is missing or differs"):
        pairs.verify()


def test_whole_artefacts_verify(pairs):
    assert pairs.verify() == pairs.manifest()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}'])
def test_a_damaged_manifest_is_an_error_that_names_it(run, pairs, content):
    run.storage.replace(f"{pairs.path}/{MANIFEST}", content)
    with pytest.raises(RunDirError, match=f"iter_000/pairs/{MANIFEST}: is damaged"):
        pairs.manifest()


def test_digest_of_a_folder_follows_names_and_content():
    one, two = FileEntry(sha256="1", bytes=1), FileEntry(sha256="2", bytes=1)
    digests = {folder_digest(files) for files in ({"a": one, "b": two}, {"a": two, "b": one}, {"a": one, "c": two})}
    assert len(digests) == 3
    assert folder_digest({"b": two, "a": one}) == folder_digest({"a": one, "b": two})


# The run


def test_a_new_folder_becomes_a_run(run):
    run.begin(CONFIG, FACTS)
    assert run.config() == CONFIG
    assert run.description()["inputs"] == FACTS["inputs"]


def test_the_same_run_may_begin_again_and_leftovers_of_attempts_go(run):
    run.begin(CONFIG, FACTS)
    run.storage.create(f"{ATTEMPTS}/leftover", b"")
    run.begin(with_values(iterations=9, cluster={"address": "auto"}), FACTS)
    assert run.config().iterations == 9
    assert run.storage.entries(ATTEMPTS) == []


def test_another_run_is_refused_and_every_difference_named_with_both_values(run):
    run.begin(CONFIG, FACTS)
    make(run, f"iter_000/model/{MANIFEST}")
    before = run.storage.read("run.json")
    facts = FACTS | {"inputs": {"model": "33", "data": "22", "heldout": None}}
    with pytest.raises(RunDirError) as caught:
        run.begin(with_values(seed=5, objective={"loss": "hinge"}), facts)
    assert str(caught.value) == (
        f"{run.storage.root}: holds another run: model (was '11', now '33'); "
        "objective.loss (was 'logistic', now 'hinge'); seed (was 0, now 5); restore these or choose another --out"
    )
    assert run.storage.read("run.json") == before


def test_a_precision_that_is_named_must_be_the_one_that_the_run_began_with(run):
    run.begin(with_values(train={"precision": "bf16"}), FACTS)
    make(run, "sft/checkpoints/0/step-1/seal.json")
    with pytest.raises(RunDirError, match=r"train\.precision \(was 'bf16', now 'fp32'\)"):
        run.begin(with_values(train={"precision": "fp32"}), FACTS)


ROWS_MADE = ("heldout/part-00000.parquet", f"heldout/{MANIFEST}", "quarantine/heldout.parquet")
TUNED = ("sft/model/model.safetensors", "sft/train_log.jsonl")
OTHERS = {
    "data": {"data": {"train": "d", "columns": {"prompt": "q"}}},
    "shard_rows": {"generation": {"shard_rows": 8}},
    "sft": {"sft": {"epochs": 2}},
    "loss": {"objective": {"loss": "hinge"}},
    "window": {"objective": {"window": 3}},
    "temperature": {"generation": {"sampling": {"temperature": 0.7}}},
    "batch": {"train": {"global_batch_pairs": 8}},
    "pack": {"train": {"pack_length": 8192}},
}
OF_TRAINING = {"loss", "batch", "window"}
OF_ANSWERS = OF_TRAINING | {"temperature"}
NOT_OF_ROWS = OF_ANSWERS | {"sft", "pack"}


def make(run: RunDir, *names: str) -> None:
    for name in names:
        run.storage.create(name, b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "free", "rows_stay"),
    [
        ((), set(OTHERS), set()),
        (("heldout/part-00000.parquet", "quarantine/heldout.parquet", "events.jsonl"), set(OTHERS), set()),
        (ROWS_MADE, set(OTHERS), NOT_OF_ROWS),
        ((*ROWS_MADE, "probe.json", "probe/iter_000/pairs/part-00000.parquet"), set(OTHERS), NOT_OF_ROWS),
        ((*ROWS_MADE, "sft/checkpoints/0/step-1/seal.json"), OF_ANSWERS, OF_ANSWERS),
        ((*ROWS_MADE, *TUNED), OF_ANSWERS, OF_ANSWERS),
        ((*ROWS_MADE, *TUNED, "sft/heldout_samples/part-00000.parquet"), OF_TRAINING, OF_TRAINING),
        ((*ROWS_MADE, "iter_000/generations/part-00000.parquet"), OF_TRAINING, OF_TRAINING),
        ((*ROWS_MADE, "iter_000/pairs/part-00000.parquet", "mlruns/0/x"), OF_TRAINING, OF_TRAINING),
        ((*ROWS_MADE, f"iter_000/pairs/{MANIFEST}"), {"loss"}, {"loss"}),
        ((*ROWS_MADE, "iter_000/checkpoints/0/seal.json"), {"loss"}, {"loss"}),
        ((*ROWS_MADE, f"iter_000/pairs/{MANIFEST}", f"iter_000/model/{MANIFEST}"), set(), set()),
        ((*ROWS_MADE, "start/answers/part-00000.parquet", f"reviser/model/{MANIFEST}"), OF_TRAINING, OF_TRAINING),
        (("notes/mine.txt",), set(), set()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("other", OTHERS)
def test_a_run_is_bound_to_those_settings_that_something_was_made_with(run, made, free, rows_stay, other):
    run.begin(with_values(sft={}), FACTS)
    make(run, *made)
    changed = with_values(**{"sft": {}} | OTHERS[other])
    if other not in free:
        with pytest.raises(RunDirError, match="holds another run"):
            run.begin(changed, FACTS)
        assert run.config() == with_values(sft={})
    else:
        run.begin(changed, FACTS)
        assert run.config() == changed
        rows = {name for name in ROWS_MADE if run.storage.exists(name)}
        assert rows == (set(ROWS_MADE) & set(made) if other in rows_stay else set())
    assert all(run.storage.exists(name) for name in made if name not in ROWS_MADE)


@pytest.mark.parametrize(
    ("digest", "path", "same"), [("22", "elsewhere/d.jsonl", True), ("44", "elsewhere/d.jsonl", False)]
)
def test_data_and_models_may_move_as_long_as_their_bytes_are_the_same(run, digest, path, same):
    run.begin(CONFIG, FACTS)
    make(run, f"iter_000/model/{MANIFEST}")
    moved, facts = with_values(data={"train": path}), FACTS | {"inputs": FACTS["inputs"] | {"data": digest}}
    if same:
        run.begin(moved, facts)
        assert run.config() == moved
    else:
        with pytest.raises(RunDirError, match=r"data \(was '22', now '44'\); data\.train"):
            run.begin(moved, facts)


def test_a_mapping_that_was_empty_is_told_by_its_new_keys(run):
    run.begin(CONFIG, FACTS)
    make(run, f"iter_000/model/{MANIFEST}")
    with pytest.raises(RunDirError, match=r"another run: data\.columns\.prompt \(was None, now 'q'\); restore"):
        run.begin(with_values(data={"train": "d", "columns": {"prompt": "q"}}), FACTS)


def test_a_change_before_anything_was_made_with_it_is_told_with_both_values(run, caplog):
    run.begin(CONFIG, FACTS)
    make(run, *ROWS_MADE)
    with caplog.at_level("INFO"):
        run.begin(with_values(seed=5, objective={"loss": "hinge"}), FACTS)
    own = [record.getMessage() for record in caplog.records if record.name == "spin_ray.run_dir.bound"]
    assert own == [
        f"{run.storage.root}: changed before anything was learnt with it: objective.loss (was 'logistic', now "
        "'hinge'); seed (was 0, now 5); the rows are made again"
    ]


@pytest.mark.parametrize("name", ["thesis.tex", "photos/a.jpg", "leases.csv"])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_was(run, name):
    run.storage.create(name, b"mine")
    with pytest.raises(RunDirError, match=f"is not a run and not empty .holds {name.partition('/')[0]}."):
        run.begin(CONFIG, FACTS)
    assert not run.storage.exists("run.json")


def test_hidden_files_and_the_lease_do_not_make_a_folder_foreign(run):
    for name in (".DS_Store", "lease.json", ".lease.lock"):
        run.storage.create(name, b"{}")
    run.begin(CONFIG, FACTS)
    assert run.storage.exists("run.json")


def test_a_folder_that_is_no_run_says_so(run):
    with pytest.raises(RunDirError, match="is not a run"):
        run.description()


def test_a_damaged_description_is_an_error_that_names_it(run):
    run.storage.create("run.json", b'{"config": ')
    with pytest.raises(RunDirError, match=r"run\.json: is damaged"):
        run.begin(CONFIG, FACTS)


def test_a_run_of_another_version_is_an_error_that_names_the_unknown_keys(run):
    content = {"config": CONFIG.model_dump(mode="json") | {"reward": {}}, **FACTS}
    run.storage.create("run.json", json.dumps(content).encode())
    with pytest.raises(ConfigError, match=r"run\.json: reward: unknown key"):
        run.begin(CONFIG, FACTS)


def test_names_of_iterates_are_those_of_the_iteration_that_made_them(run):
    """θ_0 is the SFT model; iteration 0 turns it into θ_1."""
    assert [iterate_name(iterate) for iterate in (0, 1, 2)] == ["sft", "iter_000", "iter_001"]
    for iterate, spellings in {0: ("sft",), 2: ("iter_001", "iter_1", "iter-1", "iter-001", "1")}.items():
        assert {read_iterate(word) for word in spellings} == {iterate}
    assert [api_spelling(word) for word in ("iter_001", "1", "sft", "latest")] == ["iter-1", "iter-1", "sft", "latest"]
    assert {read_iterate(word) for word in ("", "iter", "iter_", "iter_-1", "-1", "2.0", "latest", "²", "٢")} == {None}
    assert run.model(0).path == "sft/model"
    assert run.model(1).path == "iter_000/model"
    assert run.pairs(0).path == "iter_000/pairs"
    assert run.heldout_samples(1).path == "iter_000/heldout_samples"
    assert run.eval_path(1) == "iter_000/eval.json"


@pytest.mark.parametrize("damaged", [b"", b'{"iterate": "sft"', b"[]"])
def test_an_evaluation_that_is_damaged_counts_as_none(run, damaged):
    assert run.evaluation(0) is None
    run.storage.replace(run.eval_path(0), b'{"iterate": "sft"}')
    assert run.evaluation(0) == {"iterate": "sft"}
    run.storage.replace(run.eval_path(0), damaged)
    assert run.evaluation(0) is None
    assert run.update_evaluation(0, lambda before: {"was": before}) == {"was": None} == run.evaluation(0)


# LATEST and the log


def test_latest_moves_to_the_published_iterate(run):
    assert run.latest() is None
    run.publish(0)
    assert run.latest() == "sft"
    run.publish(1)
    assert run.storage.read("LATEST") == b"iter_000\n"
    assert run.latest() == "iter_000"


def test_latest_never_moves_back(run):
    """A driver that resumes passes sft, iter_000, … again; whoever follows LATEST must not see it."""
    for iterate in (0, 1, 2, 0, 1):
        if iterate and not run.model(iterate).is_committed:
            run.model(iterate).commit({}, {}, {})
        run.publish(iterate)
    assert run.latest() == "iter_001"
    assert [event["stage"] for event in run.events()] == ["sft", "iter_000", "iter_001"]


def test_latest_moves_back_from_models_that_were_removed_to_the_newest_that_is_there(run, caplog):
    """The user removed θ_2 and θ_3, as an error said, and runs again; whoever follows LATEST is not sent on to θ_0."""
    for iterate in (1, 2, 3):
        run.model(iterate).commit({}, {}, {})
        run.publish(iterate)
    run.storage.delete("iter_001")
    run.storage.delete("iter_002")
    assert run.latest() == "iter_002"
    run.publish(0)
    assert run.latest() == "iter_000"
    assert caplog.messages == ["LATEST: iter_002 is not there any more; moved back to iter_000"]
    run.publish(1)
    run.model(2).commit({}, {}, {})
    run.publish(2)
    assert run.latest() == "iter_001"
    assert [event["stage"] for event in run.events()] == ["iter_000", "iter_001", "iter_002", "iter_000", "iter_001"]


def test_publishing_again_says_nothing_new(run):
    for _ in range(3):
        run.publish(0)
    assert [(event["event"], event["stage"]) for event in run.events()] == [("publish", "sft")]


def test_a_stage_logs_its_start_and_its_commit_with_what_it_counted(run):
    with run.stage("iter_000/pairs") as counted:
        counted["rows"] = 7
    start, commit = run.events()
    assert (start["event"], start["stage"]) == ("start", "iter_000/pairs")
    assert (commit["event"], commit["rows"]) == ("commit", 7)
    assert 0 <= commit["seconds"] < 1


@pytest.mark.parametrize("error", [ValueError("too\nbad"), KeyboardInterrupt()])
def test_a_stage_that_fails_logs_why_and_fails(run, error):
    with pytest.raises(type(error)), run.stage("prompts"):
        raise error
    failure = run.events()[-1]
    assert failure["event"] == "failure"
    assert failure["error"].startswith(type(error).__name__)


def test_a_line_of_the_log_that_a_crash_cut_short_is_left_out(run):
    run.event("start", "prompts")
    path = run.storage.path("events.jsonl")
    path.write_text(path.read_text() + '{"time": 12, "ev')
    assert [event["stage"] for event in run.events()] == ["prompts"]


def test_events_after_a_line_that_was_cut_short_are_read(run):
    run.event("start", "prompts")
    path = run.storage.path("events.jsonl")
    path.write_text(path.read_text() + '{"time": 12, "ev')
    run.event("start", "pairs")
    assert [event["stage"] for event in run.events()] == ["prompts", "pairs"]


def test_a_log_that_is_not_there_is_empty(run):
    assert read_json_lines(run.storage, "iter_000/train_log.jsonl") == []


def test_a_run_keeps_the_date_that_it_began_with(run):
    run.begin(CONFIG, FACTS)
    began = run.date()
    stored = json.loads(run.storage.read("run.json"))
    run.storage.replace("run.json", json.dumps(stored | {"date": "2024-07-26T23:59:00"}).encode())
    run.begin(CONFIG, FACTS)
    assert run.date().isoformat() == "2024-07-26T23:59:00" == run.description()["date"]
    assert stored["date"] == began.isoformat()
