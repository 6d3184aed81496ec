"""Whole tiny runs that hold a part of their only rows out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spin_ray.config.load import override
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import DataError, OtherRunError
from spin_ray.inputs.held_out import part_of
from spin_ray.loop.launch import is_finished
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.fakes import rows_of
from tests.support.learner_cases import one_rank


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


def recipe(folder: Path, **data: Any) -> SpinConfig:
    """24 conversations of two turns in two files, of which half are held out, and a malformed row."""
    content = small_run.make_inputs(folder).model_dump(mode="json", exclude_unset=True)
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": roles[i % 2], "content": f"{number} + {i}"} for i in range(4)]} for number in range(24)
    ]
    for name, part in (("a", rows[:12]), ("b", rows[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with (folder / "b.jsonl").open("a") as file:
        file.write("{broken\n")
    content["model"]["max_length"] = 128
    content["data"] = {
        "train": [{"path": str(folder / f"{name}.jsonl")} for name in ("a", "b")],
        "heldout_fraction": 0.5, "turns": "all", "max_quarantine_fraction": 0.2, **data,
    }  # fmt: skip
    return SpinConfig.model_validate(content)


def ids_of(run: RunDir) -> tuple[set[str], set[str]]:
    trained, held_out = ({row["prompt_id"] for row in rows_of(it)} for it in (run.prompts, run.heldout))
    return trained, held_out


@pytest.mark.slow
def test_a_run_holds_whole_conversations_of_its_sources_out_and_never_trains_on_them(tmp_path, monkeypatch) -> None:
    small_run.in_this_process(monkeypatch)
    config = recipe(tmp_path)
    small_run.run(config, tmp_path / "run")
    run = RunDir(Storage(tmp_path / "run"))
    trained, held_out = ids_of(run)
    assert len(trained) + len(held_out) == 48 and not trained & held_out
    assert len(held_out) % 2 == 0 and 12 <= len(held_out) <= 36
    answered = {row["prompt_id"] for row in rows_of(run.generations(0))}
    assert answered == trained and run.evaluation(1)["rows"] == len(held_out)
    assert run.prompts.manifest().counts == {"malformed": 1} and not run.heldout.manifest().counts
    assert is_finished(run, config)
    small_run.run(config, tmp_path / "run")  # resumed: nothing is made again
    with pytest.raises(OtherRunError, match=r"data.heldout_fraction \(was 0.5, now 0.25\)"):
        small_run.run(override(config, {"data.heldout_fraction": 0.25}), tmp_path / "run")

    shuffled = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)[::-1]
    (tmp_path / "c.jsonl").write_text("".join(shuffled))
    alone = override(config, {"data.train": str(tmp_path / "c.jsonl"), "evaluation.max_rows": 4})
    small_run.run(alone, tmp_path / "alone")
    trained_alone, held_out_alone = ids_of(RunDir(Storage(tmp_path / "alone")))
    assert len(held_out_alone) == 4 and held_out_alone < held_out and trained_alone < trained


def test_a_fraction_that_holds_nothing_out_is_told(tmp_path, monkeypatch) -> None:
    small_run.in_this_process(monkeypatch)
    with pytest.raises(
        DataError, match=r"heldout_fraction: 0.0001 holds no conversation of .*a.jsonl, .*b.jsonl out .*raise it"
    ):
        small_run.run(recipe(tmp_path, heldout_fraction=0.0001), tmp_path / "run")


def of_one_file(folder: Path, rows: list[dict[str, Any]], **data: Any) -> SpinConfig:
    config = recipe(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return override(config, {"data.train": str(folder / "rows.jsonl"), "data.turns": "last"} | data)


def test_the_few_held_out_rows_are_not_judged_by_the_limit_of_a_source(tmp_path, monkeypatch) -> None:
    """Of 60 rows 8 are held out, and one of these is too long: 12.5 % of them, 1.7 % of the source."""
    small_run.in_this_process(monkeypatch)
    rows = [{"prompt": f"{number} + 1 = ?", "response": "1"} for number in range(60)]
    held_out = [row for row in rows if part_of([{"role": "user", "content": row["prompt"]}], 0.1) == "held out"]
    assert 2 <= len(held_out) <= 12
    held_out[0]["response"] = "1" * 200
    config = of_one_file(tmp_path, rows, **{"data.heldout_fraction": 0.1, "data.max_quarantine_fraction": 0.05})
    small_run.run(config, tmp_path / "run")
    run = RunDir(Storage(tmp_path / "run"))
    assert run.heldout.manifest().counts == {"too_long": 1} and run.heldout.manifest().rows == len(held_out) - 1
    assert run.prompts.manifest().rows == 60 - len(held_out)


def test_a_part_without_rows_is_told_with_the_cure(tmp_path, monkeypatch) -> None:
    small_run.in_this_process(monkeypatch)
    rows = [{"prompt": f"{number} + 1 = ?", "response": "1"} for number in range(60)]
    alone = [row for row in rows if part_of([{"role": "user", "content": row["prompt"]}], 0.5) == "held out"]
    with pytest.raises(DataError, match=r"rows.jsonl: data.heldout_fraction holds every conversation out; lower it"):
        small_run.run(of_one_file(tmp_path, alone * 3, **{"train.global_batch_pairs": 1}), tmp_path / "run")
    long = [row | {"response": "1" * 200} for row in rows]
    with pytest.raises(DataError, match=r"rows.jsonl: \d+ of \d+ rows cannot be used \(\d+ too_long\)"):
        small_run.run(of_one_file(tmp_path, long), tmp_path / "other")


def test_a_step_that_the_trained_part_cannot_fill_is_refused_at_the_start(tmp_path, monkeypatch) -> None:
    small_run.in_this_process(monkeypatch)
    rows = [{"prompt": f"{number} + 1 = ?", "response": "1"} for number in range(10)]
    with pytest.raises(DataError, match=r"at most 5 pairs, fewer than train.global_batch_pairs 8"):
        small_run.run(of_one_file(tmp_path, rows, **{"train.global_batch_pairs": 8}), tmp_path / "run")


def test_windows_of_a_held_out_conversation_that_are_trained_on_are_told(tmp_path, monkeypatch, caplog) -> None:
    """Three windows of each of 20 conversations; a digest of the first question holds out half of the windows."""
    small_run.in_this_process(monkeypatch)
    rows = [
        {"prompt": f"{number} + {window} = ?", "response": "1", "conversation_id": f"c{number}"}
        for number in range(20)
        for window in range(3)
    ]
    small_run.run(of_one_file(tmp_path, rows), tmp_path / "run")
    parts = [part_of([{"role": "user", "content": row["prompt"]}], 0.5) for row in rows]
    held_out = {row["conversation_id"] for row, part in zip(rows, parts, strict=True) if part == "held out"}
    divided = sum(
        row["conversation_id"] in held_out and part == "trained" for row, part in zip(rows, parts, strict=True)
    )
    assert 10 < divided < 40
    assert f"{divided} rows to train on are parts of held-out conversations (conversation_id)" in caplog.text

    caplog.clear()
    whole = [row | {"conversation_id": row["prompt"] if number % 2 else None} for number, row in enumerate(rows)]
    small_run.run(of_one_file(tmp_path, whole), tmp_path / "other")
    assert "parts of held-out conversations" not in caplog.text


def test_held_out_rows_that_are_kept_in_training_are_told(tmp_path, monkeypatch) -> None:
    small_run.in_this_process(monkeypatch)
    rows = [{"prompt": f"{number} + 1 = ?", "response": "1", "conversation_id": f"c{number}"} for number in range(20)]
    config = of_one_file(tmp_path, rows, **{"data.heldout_fraction": None, "data.keep_leaks": True})
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    small_run.run(override(config, {"data.heldout": str(tmp_path / "held.jsonl")}), tmp_path / "run")
    run = RunDir(Storage(tmp_path / "run"))
    [told] = [event["text"] for event in run.events() if event["event"] == "warning" and event["stage"] == "prompts"]
    assert run.prompts.manifest().rows == 20 and "rows.jsonl: 3 rows are held out, too, and are trained on" in told
