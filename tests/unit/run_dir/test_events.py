"""events.jsonl: every event says its folder and its kind of stage."""

import json

import pytest

from spin_ray.run_dir.events import counted_in, read_json_lines, spans, stage_seconds
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage

PLACES = [
    ("prompts", "run", "prompts"),
    ("iter_000/training", "iter_000", "training"),
    ("sft/heldout_samples + iter_000/generations", "sft", "heldout_samples"),
    ("iter_000/generations", "iter_000", "generations"),
    ("reviser/training", "reviser", "training"),
    ("sft", "sft", ""),
    ("iter_012", "iter_012", ""),
]


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(Storage(tmp_path))


@pytest.mark.parametrize(("stage", "folder", "kind"), PLACES)
def test_an_event_is_written_with_its_folder_and_kind(run, stage, folder, kind):
    run.event("start", stage, rows=7)
    line = json.loads(run.storage.read("events.jsonl"))
    assert (line["event"], line["stage"], line["folder"], line["kind"], line["rows"]) == (
        "start", stage, folder, kind, 7,
    )  # fmt: skip
    assert run.events() == [line]
    assert counted_in(line) == {"rows": 7}


def test_a_line_of_a_log_ends_at_a_line_feed_alone(run):
    """The last line is not complete: its writer died."""
    run.storage.append("log.jsonl", '{"said": "one\u2028line\x85"}\r\n{"said": "two"}\n{"said": "th')
    assert read_json_lines(run.storage, "log.jsonl") == [{"said": "one\u2028line\x85"}, {"said": "two"}]


def test_a_log_of_two_drivers_is_one_story(run):
    """The first died in training, which the second ends. Sampling of both kinds of prompts is one stage."""
    with run.stage("sft/heldout_samples + iter_000/generations"):
        pass
    run.event("start", "iter_000/training")
    with run.stage("iter_000/training") as counted:
        counted["rows"] = 3
    found = [(span.folder, span.stage, span.outcome, span.counted.get("rows")) for span in spans(run.events())]
    assert found == [
        ("sft", "sampling", "commit", None),
        ("iter_000", "training", "lost", None),
        ("iter_000", "training", "commit", 3),
    ]
    assert stage_seconds(run.events()).keys() == {"sft", "iter_000"}
