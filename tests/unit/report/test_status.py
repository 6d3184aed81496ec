"""A run in tables, and its texts as they are."""

import io
import json
import time
from typing import Any

import pytest
from rich.console import Console

from spin_ray import __main__ as cli
from spin_ray.errors import OtherRunError, RunDirError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.report.history import read_evaluations
from spin_ray.report.status import print_difference, print_status, print_summary, status_as_json, what_is_kept
from spin_ray.run_dir.events import stage_seconds
from spin_ray.run_dir.fence import LEASE
from spin_ray.run_dir.lease import Lease
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import GENERATION_SCHEMA, PROMPT_SCHEMA
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of, generation_rows, write_rows

TINY = resolve("embedded:tiny-llama")
TOKENIZER = load_tokenizer(TINY)
CONFIG = config_of(iterations=1)
EVALUATION = {
    "real_length": 12.34,
    "generated_length": 10.0,
    "truncation_rate": 0.25,
    "identical_share": 0.0,
    "answer_accuracy": 0.5,
    "against_opponent": {"loss": 0.69312, "margin": -0.1234, "accuracy": 0.75},
}
LEASE_FROM_ELSEWHERE = {"token": "t", "host": "head-7", "boot": "another", "pid": 12, "started": 1.0}


@pytest.fixture
def run(tmp_path):
    run = RunDir(Storage(tmp_path / "[old]" / "run"))
    run.begin(CONFIG, {"inputs": {}, "start_model": TINY, "versions": {}})
    return run


def printed(function: Any, run: RunDir) -> str:
    out = io.StringIO()
    function(run, Console(file=out, width=200))
    return out.getvalue()


def row_of(text: str, name: str) -> list[str]:
    """Cells of the row of a table that begins with ``name``."""
    line = next(line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def write_evaluation(run: RunDir, number: int, **values: Any) -> None:
    content = EVALUATION | {"iterate": iterate_name(number)} | values
    run.storage.replace(run.eval_path(number), json.dumps(content).encode())


def write_example(
    run: RunDir, prompt: str, human: str, answers: dict[int, list[str]], read: dict[int, str] | None = None
) -> None:
    """Held-out rows, every iterate's samples of them, and its answers for people to read (of the first two rows)."""
    messages = [{"role": "system", "content": ""}] if read else []
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": human}]
    rendered = ChatRenderer(TOKENIZER).render(messages)
    row = {"prompt_id": "p0", "prompt_ids": rendered.prompt_ids, "real_ids": rendered.real_ids}
    others = [row | {"prompt_id": f"p{i}", "messages": json.dumps(messages)} for i in range(3)]
    write_rows(run.heldout, PROMPT_SCHEMA, others, part_rows=3)
    for iterate, texts in answers.items():
        samples = [
            (f"p{i}", sample, [*TOKENIZER.encode(text, add_special_tokens=False), 2])
            for i in range(3)
            for sample, text in enumerate(texts)
        ]
        write_rows(run.heldout_samples(iterate), GENERATION_SCHEMA, generation_rows(samples), part_rows=99)
    for iterate, text in (read or {}).items():
        shown = [(f"p{i}", 0, [*TOKENIZER.encode(text, add_special_tokens=False), 2]) for i in range(2)]
        write_rows(run.examples(iterate), GENERATION_SCHEMA, generation_rows(shown), part_rows=99)


# Tables


def test_the_accuracy_of_answers_has_its_interval(run):
    write_evaluation(run, 0, conversations_graded=9, standard_errors={"answer_accuracy": 0.1})
    write_evaluation(run, 1)
    assert row_of(printed(print_status, run), "95 % interval")[1:] == ["0.304–0.696", "–"]


def test_iterates_are_side_by_side_with_their_measures(run):
    write_evaluation(run, 0, against_opponent={}, answer_accuracy=None)
    write_evaluation(run, 1)
    text = printed(print_summary, run)
    assert row_of(text, "iter_000") == ["iter_000", "0.6931", "-0.123", "0.75", "0.500", "12.3", "10.0", "0.25", "0.00"]
    assert row_of(text, "sft") == ["sft", "–", "–", "–", "–", "12.3", "10.0", "0.25", "0.00"]


def test_status_has_a_row_for_each_measure_and_names_what_is_wrong(run):
    write_evaluation(run, 0, against_opponent={}, identical_share=0.9)
    write_evaluation(run, 1)
    text = printed(print_status, run)
    assert row_of(text, "held-out loss") == ["held-out loss", "–", "0.6931"]
    assert "KL to the opponent" not in text
    assert "Warning sft: 90% of y′ equal y" in text


def test_evaluations_come_in_the_order_of_the_iterates_and_missing_ones_are_left_out(run):
    write_evaluation(run, 1)
    assert [found["iterate"] for found in read_evaluations(run, CONFIG)] == ["iter_000"]
    write_evaluation(run, 0)
    assert [found["iterate"] for found in read_evaluations(run, CONFIG)] == ["sft", "iter_000"]


def test_seconds_are_summed_over_attempts_and_sorted_by_folder(run):
    """Sampling for held-out and training prompts is one stage with two names."""
    for event, stage, seconds in [
        ("failure", "iter_000/training", 10.0),
        ("lost", "iter_000/training", 5.0),
        ("commit", "iter_000/training", 20.5),
        ("commit", "prompts", 1.0),
        ("commit", "sft/heldout_samples + iter_000/generations", 7.0),
        ("start", "iter_000/pairs", 99.0),
    ]:
        run.event(event, stage, seconds=seconds)
    assert stage_seconds(run.events()) == {
        "iter_000": {"training": 35.5},
        "run": {"prompts": 1.0},
        "sft": {"sampling": 7.0},
    }


# Status


def test_status_of_a_run_that_has_done_nothing(run):
    text = printed(print_status, run)
    assert "LATEST: nothing published yet; iterations wanted: 1" in text


def test_status_says_what_happened_last_and_what_is_published(run):
    run.publish(0)
    run.event("start", "iter_000/pairs")
    text = printed(print_status, run)
    assert "Last event: start iter_000/pairs" in text
    assert "LATEST: sft" in text


def test_following_goes_on_until_the_driver_ends(run, call, monkeypatch):
    """Also between two stages: the first look sees one, the second none, and then the driver gives its lease back."""
    run.event("start", "iter_000/pairs")
    run.storage.replace(LEASE, json.dumps(LEASE_FROM_ELSEWHERE | {"renewed": time.time()}).encode())
    waits = iter([lambda: run.event("commit", "iter_000/pairs", seconds=1.0), lambda: run.storage.delete(LEASE)])
    monkeypatch.setattr(cli.time, "sleep", lambda _: next(waits)())
    code, out, _ = call("status", run.storage.root, "--follow")
    assert code == 0
    assert out.count("Last event: start iter_000/pairs") == 1
    assert out.count("Last event: commit iter_000/pairs") == 2


def test_a_run_whose_driver_is_gone_does_not_run(run, call, monkeypatch):
    """A driver that was killed closes no stage. From another machine only the age of its lease tells."""
    run.event("start", "iter_000/training")
    run.storage.replace(LEASE, json.dumps(LEASE_FROM_ELSEWHERE | {"renewed": time.time()}).encode())
    assert status_as_json(run)["running"]
    run.storage.replace(LEASE, json.dumps(LEASE_FROM_ELSEWHERE | {"renewed": time.time() - 3600}).encode())
    assert not status_as_json(run)["running"]
    monkeypatch.setattr(cli.time, "sleep", lambda _: pytest.fail("follows a run that nobody drives"))
    code, out, _ = call("status", run.storage.root, "--follow")
    assert code == 0
    assert "Stopped during iter_000 training: process 12 on head-7 is gone" in out


def test_a_killed_evaluation_of_a_finished_run_does_not_keep_it_running(run, call, monkeypatch):
    """Nobody writes its end, so that following it would have none."""
    run.event("start", "sft/benchmarks")
    monkeypatch.setattr(cli.time, "sleep", lambda _: pytest.fail("follows a finished run"))
    code, out, _ = call("status", run.storage.root, "--follow")
    assert code == 0 and "Beside the run: sft benchmarks, begun 0 s ago, not ended" in out
    found = status_as_json(run)
    assert (found["running"], found["beside"]) == (False, ["sft/benchmarks"])


def test_a_training_is_shown_while_another_command_works_beside_it(run):
    with Lease(run.storage, timeout_s=60):
        run.event("start", "iter_000/training")
        run.event("start", "sft/benchmarks")
        assert "Running: iter_000 training for 0 s" in printed(print_status, run)
        run.event("failure", "sft/benchmarks", seconds=1.0)
        assert "Running: iter_000 training for 0 s" in printed(print_status, run)
        assert status_as_json(run)["running"]
    assert "Stopped during iter_000 training: no driver has the run" in printed(print_status, run)


@pytest.mark.parametrize("error", ["OSError: [/tmp/x] is gone", "[rank0]: killed", "see [bold]this[/]"])
def test_brackets_in_an_error_are_shown_as_they_are(run, error):
    """rich would take [/tmp/x] for the end of a style and fail, and leave [rank0] out."""
    run.event("failure", "iter_000/training", seconds=1.0, error=error)
    assert error in printed(print_status, run)


def test_status_of_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(RunDirError, match="is not a run"):
        printed(print_status, RunDir(Storage(tmp_path)))


# Summary


def test_the_summary_shows_examples_the_model_and_how_to_go_on(run):
    write_evaluation(run, 0)
    write_evaluation(run, 1)
    write_example(run, "How are you?", "fine", {0: ["so so"], 1: ["very well"]})
    run.publish(1)
    text = printed(print_summary, run)
    for line in ("user  How are you?", "human  fine", "sft  so so", "iter_000  very well"):
        assert text.count(line) == 3
    assert f"Model:  {run.storage.root}/iter_000/model (LATEST: iter_000)" in text
    assert f"Go on:  spin-ray status '{run.storage.root}'" in text
    for command in ("report", "serve", "eval"):
        assert f"\n        spin-ray {command} '{run.storage.root}'\n" in text


def test_what_a_stopped_run_keeps_is_said_once_it_has_begun(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["spin-ray", "run", "my recipe.yaml"])
    run.publish(1)
    assert what_is_kept(str(run.storage.root)) == (
        f"\n{run.storage.root} keeps the iterates up to iter_000, and every finished stage, shard of generation and "
        "training checkpoint; go on with: spin-ray run 'my recipe.yaml'\n"
    )
    assert what_is_kept(str(tmp_path / "not begun")) == ""


def test_a_status_as_json_has_what_is_printed(run):
    write_evaluation(run, 0)
    write_evaluation(run, 1)
    run.publish(1)
    found = json.loads(json.dumps(status_as_json(run)))
    assert (found["latest"], found["running"], found["progress"]) == ("iter_000", False, {})
    assert found["evaluations"] == [run.evaluation(0), run.evaluation(1)]
    for warning in found["warnings"]:
        assert warning["text"] in printed(print_status, run).replace("\n", " ")


def test_a_warning_of_a_stage_is_listed_once_with_its_folders(run):
    """Warnings of measures are events, too, and come from the measures."""
    for stage in ("iter_000/training", "iter_000/evaluation", "iter_001/training"):
        run.warn(stage, "the [padded] layout costs 2-4 times as much")
    run.warn("iter_000/training", "train workers failed (RuntimeError: lost); restart 1 of 3")
    run.warn("iter_000", "of a measure")
    text = printed(print_status, run)
    assert "Warning iter_000, iter_001: the [padded] layout costs 2-4 times as much\n" in text
    assert text.count("2-4 times") == 1 and "Warning iter_000: train workers failed (RuntimeError: lost)" in text
    assert [(it["iterate"], it["text"].split()[-1]) for it in status_as_json(run)["warnings"]] == [
        ("iter_000", "much"), ("iter_001", "much"), ("iter_000", "3"),
    ]  # fmt: skip
    assert text.count("of a measure") == 1, "as the last event"


def test_texts_of_examples_are_shown_as_they_are(run):
    write_evaluation(run, 0)
    write_example(run, "[bold]x[/bold] :cat:", "[/y] :dog:", {0: ["[z] :100:"], 1: ["w"]})
    text = printed(print_summary, run)
    for line in ("[bold]x[/bold] :cat:", "[/y] :dog:", "[z] :100:"):
        assert line in text


def test_of_several_samples_the_first_is_the_example(run):
    write_evaluation(run, 0)
    write_example(run, "q", "a", {0: ["first", "second"], 1: ["one", "two"]})
    text = printed(print_summary, run)
    assert (text.count("sft  first"), text.count("iter_000  one")) == (3, 3)
    assert "second" not in text


def test_answers_for_people_are_shown_with_their_temperature_cut_where_they_are_long_and_without_an_empty_system_line(
    tmp_path,
):
    run = RunDir(Storage(tmp_path / "run"))
    run.begin(
        config_of(
            iterations=1, data={"train": "d", "heldout": "h"}, evaluation={"examples": 2, "examples_temperature": 0.5}
        ),
        {"inputs": {}, "start_model": TINY, "versions": {}},
    )
    write_evaluation(run, 0)
    write_example(run, "q", "word " * 200, {0: ["measured"], 1: ["measured"]}, read={0: "read", 1: "later"})
    text = printed(print_summary, run)
    assert "at temperature 0.5 (the measures read others, at 1)" in text
    assert (text.count("sft  read"), text.count("iter_000  later"), text.count("…")) == (2, 2, 2)
    assert "measured" not in text.replace("the measures", "")
    assert "system" not in text


def test_without_held_out_rows_the_summary_has_no_examples(run):
    assert "human" not in printed(print_summary, run)


def test_on_a_terminal_a_changed_recipe_is_shown_line_by_line_in_colours(monkeypatch):
    """What was is red, what is now green, what is not set has no line; NO_COLOR leaves the signs."""
    error = OtherRunError("/runs/[a]", {"data": ("x", None), "heldout": (None, "h"), "seed": (0, 1)})
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        out = io.StringIO()
        print_difference(error, Console(file=out, force_terminal=True, width=60))
        lines = out.getvalue().splitlines()
        assert ("\x1b[31m- seed: 0\x1b[0m" in lines) == (not no_color)
        plain = [line.replace("\x1b[31m", "").replace("\x1b[32m", "").replace("\x1b[0m", "") for line in lines]
        assert plain[-4:] == ['- data: "x"', '+ heldout: "h"', "- seed: 0", "+ seed: 1"]
