"""What the report says, without a browser."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from spin_ray.report.examples import read_examples
from spin_ray.report.page import write_report
from spin_ray.report.page.charts import MOST_POINTS, Bar, Series, gantt, line_chart
from spin_ray.report.page.comparison import compare
from spin_ray.report.page.view import read_view
from spin_ray.report.redaction import hide, hide_in_text
from spin_ray.report.uncertainty import ROW_SCHEMA, common_means
from spin_ray.run_dir.events import fields_of, spans
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import GENERATION_SCHEMA
from spin_ray.run_dir.storage import Storage, table_to_bytes
from spin_ray.serving.arena.battles import Answer, Question
from spin_ray.serving.arena.votes import VoteStore
from tests.support.fakes import generation_rows, write_rows
from tests.support.made_up_run import TOKENIZER, made_up_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return made_up_run(tmp_path_factory.mktemp("runs") / "finished")


# What it says


def test_the_verdict_weighs_a_change_of_accuracy_against_chance(tmp_path):
    """Without measures by row. 0.25 → 0.45 with standard errors 0.02 each: ±1.96 · √2 · 0.02 = ±0.055."""
    run = made_up_run(tmp_path / "run")
    for iterate in range(3):
        run.storage.delete(run.heldout_rows_path(iterate))
    worth, caution = read_view(run).verdict()
    assert "45.0% of 3 held-out questions right, sft 25.0%: a change of +20.0% (± 5.5%), more than chance" in worth
    assert caution.startswith("No sign of collapse: responses went from 9.0 to 7.0 tokens (human: 5.0)")


def with_accuracies(folder: Path, *accuracies: float, rows: int = 200) -> RunDir:
    """Returns a run whose iterates answer the first ``accuracies`` of the rows right."""
    run = made_up_run(folder, iterations=len(accuracies) - 1, done=len(accuracies) - 1)
    for iterate, accuracy in enumerate(accuracies):
        evaluation = json.loads(run.storage.read(run.eval_path(iterate)))
        more = {"answer_accuracy": accuracy, "answers_graded": rows, "conversations_graded": rows}
        more |= {"standard_errors": {"answer_accuracy": 0.2}}
        run.storage.replace(run.eval_path(iterate), json.dumps(evaluation | more).encode())
        each = [
            {"prompt_id": f"p{number}", "conversation": number, "answer_accuracy": float(number < rows * accuracy),
             "truncation_rate": 0.0, "generated_length": 9.0 - iterate}
            for number in range(rows)
        ]  # fmt: skip
        content = table_to_bytes(pa.Table.from_pylist(each, ROW_SCHEMA))
        run.storage.replace(run.heldout_rows_path(iterate), content)
    return run


def test_a_newest_iterate_that_is_worse_than_the_one_before_it_is_not_recommended(tmp_path):
    """A fifth of 200 rows changed: ±1.96 · 0.4 / √200 = ±5.5 %, and a bit more with the added rows."""
    view = read_view(with_accuracies(tmp_path / "run", 0.25, 0.6, 0.4))
    worth, _ = view.verdict()
    assert "iter_000, the iterate before, answered 60.0%, a change of -20.0% (± 5.7%), more than chance." in worth
    assert worth.endswith("The best is iter_000: use iter_000, not iter_001.")
    assert [iterate for iterate, text in view.warnings if "60.0% at iter_000" in text] == ["iter_001"]


def test_an_earlier_iterate_that_is_better_than_the_newest_is_named_with_its_numbers(tmp_path):
    worth = read_view(with_accuracies(tmp_path / "run", 0.25, 0.6, 0.4, 0.4)).verdict()[0]
    assert "iter_001, the iterate before, answered 40.0%, a change of +0.0%" in worth
    assert "The best is iter_000 (60.0%, a change of -20.0% (± 5.7%), more than chance): use iter_000" in worth


def test_nothing_is_recommended_within_chance_or_beside_one_iterate(tmp_path):
    assert "The best is" not in read_view(with_accuracies(tmp_path / "run", 0.25, 0.41, 0.4)).verdict()[0]
    assert "iterate before" not in read_view(with_accuracies(tmp_path / "one", 0.6, 0.25)).verdict()[0]


def test_without_answers_to_grade_the_lengths_of_the_iterate_before_are_compared(tmp_path):
    run = with_accuracies(tmp_path / "run", 0.25, 0.6, 0.4)
    for iterate in range(3):
        evaluation = json.loads(run.storage.read(run.eval_path(iterate)))
        del evaluation["answer_accuracy"]
        run.storage.replace(run.eval_path(iterate), json.dumps(evaluation).encode())
    worth = read_view(run).verdict()[0]
    assert (
        "Responses of iter_000, the iterate before, have 8.0 tokens, a change of -1.0 (± 0.0), more than chance"
        in worth
    )


def test_a_warning_takes_the_place_of_the_all_clear(tmp_path):
    run = made_up_run(tmp_path / "run")
    evaluation = json.loads(run.storage.read(run.eval_path(2))) | {"identical_share": 0.8}
    run.storage.replace(run.eval_path(2), json.dumps(evaluation).encode())
    view = read_view(run)
    assert view.verdict()[1] == "Beware: see the warning on iter_001 below."
    [(iterate, text)] = view.warnings
    assert iterate == "iter_001" and text.startswith("80% of y′ equal y")


def test_a_warning_of_a_stage_stands_on_the_page_with_its_folders(tmp_path):
    run = made_up_run(tmp_path / "run")
    for stage in ("iter_000/training", "iter_001/training", "iter_001/training"):
        run.warn(stage, "slow <because> of it")
    assert read_view(run).stage_warnings == [("iter_000, iter_001", "slow <because> of it")]
    assert (
        "<li><strong>iter_000, iter_001</strong> slow &lt;because&gt; of it</li>"
        in write_report([run], tmp_path / "page.html").read_text()
    )


def test_nothing_is_said_of_a_change_when_only_sft_was_measured(tmp_path):
    caution = read_view(made_up_run(tmp_path / "run", iterations=2, done=0)).verdict()[1]
    assert caution.startswith("Its responses have 9.0 tokens (human: 5.0)")
    assert "collapse" not in caution


def test_the_names_and_the_settings_behind_the_numbers_are_told(tmp_path):
    """Three held-out rows of two conversations."""
    sampling = {"temperature": 0.7, "max_tokens": 1500}
    run = made_up_run(tmp_path / "run", generation={"sampling": sampling}, train={"learning_rate": [1e-6, 5e-7]})
    rows = [
        {"prompt_id": f"p{number}", "conversation": number // 2, "generated_length": 7.0, "truncation_rate": 0.0}
        for number in range(3)
    ]
    run.storage.replace(run.heldout_rows_path(2), table_to_bytes(pa.Table.from_pylist(rows, ROW_SCHEMA)))
    view = read_view(run)
    assert view.key().startswith(
        "sft is θ_0 and the base, iter_000 is θ_1, iter_001 is θ_2; the opponent of an iterate"
    )
    facts = dict(view.facts())
    assert facts["Held-out rows"] == "3 of 2 conversations"
    assert facts["Pairs and steps"] == "1 pair, 5 steps an iteration"
    assert (facts["β"], facts["Learning rate"]) == ("0.5", "1e-06, 5e-07")
    assert (facts["Temperature"], facts["max_tokens"]) == ("0.7", "1,500")


@pytest.mark.parametrize(
    ("last", "state", "reason"),
    [
        ([("failure", "iter_001/training", "OSError: x")], "failed", "iter_001/training: OSError: x"),
        (
            [("failure", "iter_001/training", "OSError: x"), ("commit", "sft/benchmarks", "")],
            "failed", "iter_001/training: OSError: x",
        ),
        ([("failure", "sft/benchmarks", "OSError: x")], "unfinished", ""),
        ([("failure", "iter_001/training", "KeyboardInterrupt: ")], "interrupted", "during iter_001/training"),
        ([("failure", "iter_001/training", "SystemExit: 15")], "interrupted", "during iter_001/training"),
        ([("failure", "sft/evaluation", "OSError: x"), ("start", "sft/evaluation", "")], "unfinished", ""),
    ],
)  # fmt: skip
def test_the_state_follows_the_events_of_the_run_alone(tmp_path, last, state, reason):
    run = made_up_run(tmp_path / "run", iterations=2, done=1)
    for event, stage, error in last:
        run.event(event, stage, seconds=1.0, **({"error": error} if error else {}))
    view = read_view(run)
    assert view.state == state and view.reason.startswith(reason) and bool(view.reason) is bool(reason)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert page.find(f"</strong> {reason}") < page.find('<p class="verdict">')
    assert dict(view.facts())["Last event"].startswith("20")


def test_a_stopped_run_gives_its_rule_s_reason_and_the_closest_iterate(tmp_path):
    run = made_up_run(tmp_path / "run", iterations=4, done=2)
    run.event("stop", "iter_001", reason="the held-out distance has not fallen", closest="iter_000")
    view = read_view(run)
    assert (view.state, view.reason) == ("stopped by its rule", "the held-out distance has not fallen")
    assert dict(view.facts())["Closest to human responses"] == "iter_000"


def test_the_verdict_of_the_probe_is_on_the_page(tmp_path):
    run = made_up_run(tmp_path / "run")
    run.storage.replace(
        "probe.json", json.dumps({"verdict": "spin", "sentences": ["Verdict: spin.", "Run it."]}).encode()
    )
    assert "Probe: Verdict: spin. Run it." in write_report([run], tmp_path / "page.html").read_text()


def test_what_a_judge_and_voters_said_is_a_table(tmp_path):
    """Of four votes iter_001 won two, one was a tie."""
    run = made_up_run(tmp_path / "run")
    said = {"one": "iter_001", "other": "sft", "wins": 9, "ties": 1, "losses": 0, "win_rate": 0.95}
    summary = said | {"standard_error": 0.05, "judge": "big-model", "draws": 10}
    run.storage.replace("judgements/iter_001-sft.json", json.dumps(summary).encode())
    run.storage.replace("judgements/broken.json", b"{}")
    votes = VoteStore(f"sqlite:///{tmp_path / 'run' / 'votes.sqlite'}")
    for verdict, digest in (("b", "trained anew since"), ("a", "d"), ("a", "d"), ("tie", "d"), ("b", "d")):
        battle = votes.start("iter-1", "sft", Question([{"role": "user", "content": "x"}], {"seed": 0}))
        votes.record(battle.id, "a", Answer("x", "stop", digest))
        votes.record(battle.id, "b", Answer("x", "stop", "d"))
        votes.vote(battle.id, verdict)
    votes.close()
    view = read_view(run)
    found = [(it.one, it.other, it.win_rate, it.number, it.by) for it in view.judged]
    assert found == [("iter_001", "sft", 0.95, 10, "big-model"), ("iter_001", "sft", 0.625, 4, "votes of the arena")]
    assert view.judged[0].interval == (pytest.approx(11.5 / 14 - 0.098), pytest.approx(11.5 / 14 + 0.098))
    assert view.unreadable == ["judgements/broken.json cannot be read ('wins')."]
    assert "0.72 to 0.92" in write_report([run], tmp_path / "page.html").read_text()


def test_no_row_is_called_usable_before_one_was_read(tmp_path):
    run = made_up_run(tmp_path / "run")
    empty = RunDir(Storage(tmp_path / "empty"))
    empty.begin(run.config(), {name: run.description()[name] for name in ("inputs", "start_model", "versions")})
    page = write_report([empty], tmp_path / "page.html").read_text()
    assert "No row has been read yet." in page and "Every row was usable." not in page


def test_a_run_that_goes_on_says_so_and_shows_what_is_there(tmp_path):
    view = read_view(made_up_run(tmp_path / "run", iterations=4, done=1))
    assert (view.state, view.iterates) == ("unfinished", ["sft", "iter_000"])


def test_a_run_without_anything_has_a_report(tmp_path):
    run = made_up_run(tmp_path / "run")
    empty = RunDir(Storage(tmp_path / "empty"))
    empty.begin(run.config(), {name: run.description()[name] for name in ("inputs", "start_model", "versions")})
    page = write_report([empty], tmp_path / "page.html").read_text()
    assert "Nothing has been evaluated yet. The run is unfinished." in page
    assert "No stage has started yet." in page


def test_counts_of_quarantine_and_drops(finished):
    view = read_view(finished)
    assert view.quarantine == [("prompts", "empty", 2, "no text"), ("prompts", "duplicate", 1, "of row 3")]
    assert view.pairs[0] == ("iter_000", {"rows": 1, "dropped_identical": 7, "dropped_empty": 0, "from_earlier": 0})


def test_every_reason_for_a_row_without_a_pair_is_a_column(tmp_path):
    """SEFT drops 97 without a label, and 412 cut answers and 3 too long ones before: those of the newest attempt."""
    run = made_up_run(tmp_path / "run")
    pairs, tables = run.pairs(0), list(run.pairs(0).tables())
    run.storage.delete(pairs.path)
    entry = pairs.write_part("part-00000.parquet", tables[0])
    dropped = {"dropped_identical": 0.0, "dropped_no_label": 97.0, "dropped_too_long": 1.0}
    pairs.commit({"part-00000.parquet": entry}, {}, {}, {"rows": 1.0, "from_earlier": 0.0} | dropped)
    for cut in (500, 412):
        run.event("commit", "iter_000/revision_prompts", seconds=1.0, dropped_answer_cut=cut, dropped_too_long=3)
    run.event("commit", "iter_000/pairs", seconds=1.0, **dropped)
    page = write_report([run], tmp_path / "page.html").read_text()
    table = page.partition("<h3>Pairs</h3>")[2].partition("</table>")[0]
    reasons = re.findall(r">([^<>]+) dropped<", table)
    assert reasons == ["y = y′", "empty", "no label", "too long", "answer cut"]
    assert [re.findall(r"n\">(\d+)<", row) for row in table.split("<tr>")[2:]] == [
        ["1", "0", "0", "97", "4", "412", "0"], ["1", "7", "0", "0", "0", "0", "0"],
    ]  # fmt: skip


def test_useful_work_is_weighed_by_time_over_the_attempts_that_measured_it(finished):
    """Three attempts at sampling; the last did not measure it."""
    log = finished.storage.read("events.jsonl").decode().splitlines()
    events = [json.loads(line) for line in log]
    sampling = [it for it in events if it["event"] == "commit" and it["stage"].endswith("heldout_samples")]
    for event, useful in zip(sampling, (0.5, 0.8), strict=False):
        event["useful"] = useful
    view = replace(read_view(finished), spans=spans(events))
    [total] = [total for total in view.stage_totals() if total.stage == "sampling"]
    seconds = [event["seconds"] for event in sampling]
    assert total.seconds == pytest.approx(sum(seconds))
    assert total.useful == pytest.approx((0.5 * seconds[0] + 0.8 * seconds[1]) / (seconds[0] + seconds[1]))


def test_tokens_a_second_are_those_of_the_attempts_that_ended_well(finished):
    """50 tokens in 10 s; a failed attempt took 90 s."""
    stage = fields_of("iter_000/training")
    events = [
        {"time": 0.0, "event": "start"} | stage,
        {"time": 90.0, "event": "failure", "seconds": 90.0} | stage,
        {"time": 100.0, "event": "commit", "seconds": 10.0, "tokens": 50.0} | stage,
    ]
    [total] = replace(read_view(finished), spans=spans(events)).stage_totals()
    assert (total.tokens, total.speed, total.seconds) == (50, 5.0, 100.0)


def test_sources_are_named_and_no_code_is_left_in_words(tmp_path):
    run = made_up_run(tmp_path / "run")
    recorded = run.description()
    recorded["config"]["data"]["train"] = [{"path": "a.jsonl", "weight": 3}, {"path": "s3://b/c.jsonl"}]
    run.storage.replace("run.json", json.dumps(recorded).encode())
    run.event("commit", "iter_001/training", seconds=10.0, tokens=12576.0)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "on a.jsonl, s3://b/c.jsonl," in page
    assert "12,576 tokens," in page and "12,576.0" not in page
    assert "<code>evaluation.samples</code>" in page and "`" not in page.partition("<script>")[0]


def test_the_recipe_holds_what_is_not_a_default(finished):
    recipe = read_view(finished).recipe
    assert "beta: 0.5" in recipe
    assert "learning_rate" not in recipe


def test_two_runs_show_what_differs(finished, tmp_path):
    other = made_up_run(tmp_path / "other", iterations=3)
    other.storage.delete(other.heldout_rows_path(2))
    page = write_report([finished, other], tmp_path / "page.html").read_text()
    differing = page.partition('id="differing"')[2].partition("</table>")[0]
    assert "<code>iterations</code>" in differing
    assert "<code>seed</code>" not in differing
    assert "finished: iter_001" in page
    assert "other: iter_001" in page
    # 0.45 ± 0.02 each, as if of different rows, since those of one run are missing.
    compared = page.partition('id="comparison-1">')[2].partition("</p>")[0]
    assert "iter_001 of other against iter_001 of finished: 45.0% of the held-out questions right" in compared
    assert "+0.0% (± 5.5%), no more than chance may give" in compared


def test_runs_that_answered_the_same_rows_are_weighed_row_by_row(tmp_path):
    """No row differs: the interval is of the added differences −1 and 1, √(5/4 · 2) / 5 a standard error, by 5/3."""
    runs = [made_up_run(tmp_path / name) for name in ("one", "other")]
    rows = [
        {"prompt_id": f"p{number}", "conversation": number, "answer_accuracy": number % 2, "truncation_rate": 0,
         "generated_length": 9}
        for number in range(3)
    ]  # fmt: skip
    for run in runs:
        content = table_to_bytes(pa.Table.from_pylist(rows, ROW_SCHEMA))
        run.storage.replace(run.heldout_rows_path(2), content)
    page = write_report(runs, tmp_path / "page.html").read_text()
    compared = page.partition('id="comparison-1">')[2].partition("</p>")[0]
    assert "+0.0% (± 103.3%), no more than chance may give" in compared


def compared_rows(tmp_path: Path, lengths: list[list[float]], **sections: Any) -> str:
    """Returns the comparison of two runs with responses of ``lengths`` to the prompts p0 and on."""
    runs = [made_up_run(tmp_path / "one"), made_up_run(tmp_path / "other", **sections)]
    for run, each in zip(runs, lengths, strict=True):
        evaluation = json.loads(run.storage.read(run.eval_path(2)))
        del evaluation["answer_accuracy"]
        more = {"rows": len(each), "generated_length": sum(each) / len(each)}
        run.storage.replace(run.eval_path(2), json.dumps(evaluation | more).encode())
        rows = [
            {"prompt_id": f"p{number}", "conversation": number, "truncation_rate": 0, "generated_length": length}
            for number, length in enumerate(each)
        ]
        content = table_to_bytes(pa.Table.from_pylist(rows, ROW_SCHEMA))
        run.storage.replace(run.heldout_rows_path(2), content)
    return compare(*(read_view(run) for run in runs), "one", "other")


def test_runs_that_answered_some_of_the_same_rows_are_weighed_by_those(tmp_path):
    said = compared_rows(tmp_path, [[4, 6, 8, 30, 30, 30], [4, 6, 8]])
    assert "responses to the 3 prompts that both answered of 6.0 tokens against 6.0, +0.0 (± 0.0), no more" in said
    assert "Beware" not in said and "human" not in said


def test_runs_that_answered_no_row_in_common_are_not_weighed():
    rows = [{"prompt_id": name, "conversation": 0, "generated_length": 5.0} for name in ("p0", "p1")]
    one, other = (pa.Table.from_pylist([row], ROW_SCHEMA) for row in rows)
    assert common_means("generated_length", one, other) is None


def test_a_comparison_names_what_was_sampled_or_graded_otherwise(tmp_path):
    said = compared_rows(tmp_path, [[4, 6], [4, 6]], generation={"sampling": {"temperature": 0.3, "max_tokens": 9}})
    assert "temperature 0.3 against 1.0" in said and "generation.sampling.max_tokens 9 against" in said


def test_runs_with_other_held_out_rows_are_not_weighed_against_each_other(finished, tmp_path):
    other = made_up_run(tmp_path / "other")
    description = other.description()
    description["inputs"]["heldout"] = "d" * 64
    other.storage.replace("run.json", json.dumps(description).encode())
    page = write_report([finished, other], tmp_path / "page.html").read_text()
    assert "have different held-out rows, so their numbers cannot be compared" in page


def test_nothing_of_this_machine_is_in_the_page(finished, tmp_path):
    """The page is passed on: no path of the run."""
    page = write_report([finished], tmp_path / "page.html").read_text()
    assert str(finished.storage.root.parent) not in page
    assert "spin-ray run recipe.yaml --out finished-again" in page


def test_bars_of_the_gantt_show_how_much_of_them_was_useful():
    """A stripe of 70 % of the bar, which is as wide as the chart."""
    svg = gantt([Bar("training", 0.0, 100.0, 0, "training", useful=0.7)])
    widths = {kind: float(width) for kind, width in re.findall(r'class="(bar s0|useful)"[^>]* width="([0-9.]+)"', svg)}
    assert widths["useful"] == pytest.approx(0.7 * widths["bar s0"], abs=0.1)


def test_texts_of_the_data_are_text(finished, tmp_path):
    page = write_report([finished], tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page


def test_benchmarks_are_shown_beside_each_other(tmp_path):
    """± is 1.96 · 0.01."""
    run = made_up_run(tmp_path / "run")
    metrics = {"acc": {"value": 0.3125, "standard_error": 0.01}}
    conditions = {"backend": "vllm", "dtype": "float32", "max_length": None, "chat": False, "limit": None}
    cut = {"text": "Truncating N tokens & more", "count": 12, "tasks": ["gsm8k"]}
    result = {"gsm8k": conditions | {"metrics": metrics, "shots": 5, "task_version": 3.0, "warnings": [cut]}}
    evaluation = json.loads(run.storage.read("iter_000/eval.json"))
    run.storage.replace("iter_000/eval.json", json.dumps(evaluation | {"benchmarks": result}).encode())
    page = write_report([run], tmp_path / "page.html").read_text()
    table = page.partition('id="benchmarks"')[2].partition("</table>")[0]
    assert "gsm8k, vllm, float32, 5 examples, version 3.0" in table
    assert '–</td><td class="n">0.3125<small>± 0.0196</small></td><td class="n">–' in table
    evaluation = json.loads(run.storage.read("iter_001/eval.json"))
    warnings = page.partition('id="benchmark-warnings"')[2].partition("</ul>")[0]
    assert "<li>iter_000, gsm8k: lm-eval warned 12 times: Truncating N tokens &amp; more</li>" in warnings
    trial = {"gsm8k": result["gsm8k"] | {"backend": "hf", "chat": True, "limit": 10}}
    run.storage.replace("iter_001/eval.json", json.dumps(evaluation | {"benchmarks": trial}).encode())
    page = write_report([run], tmp_path / "page.html").read_text()
    table = page.partition('id="benchmarks"')[2].partition("</table>")[0]
    assert "gsm8k, hf, float32, chat, first 10 rows, 5 examples, version 3.0" in table
    assert '–</td><td class="n">0.3125<small>± 0.0196</small></td><td class="n">–' in table


@pytest.mark.parametrize("iterates", [["iter_001"], ["sft", "iter_000", "iter_001"]])
def test_benchmarks_of_iterates_without_held_out_measures_are_shown(tmp_path, iterates):
    run = made_up_run(tmp_path / "run")
    conditions = {"backend": "hf", "dtype": "float32", "max_length": None, "chat": False, "limit": None}
    result = conditions | {"metrics": {"acc": {"value": 0.3125}}, "shots": 5, "task_version": 3.0, "warnings": []}
    for name in iterates:
        run.storage.replace(
            f"{name}/eval.json", json.dumps({"iterate": name, "benchmarks": {"gsm8k": result}}).encode()
        )
    page = write_report([run], tmp_path / "page.html").read_text()
    table = page.partition('id="benchmarks"')[2].partition("</table>")[0]
    assert re.findall(r">((?:sft|iter)\w*)<", table) == ["sft", "iter_000", "iter_001"]
    assert table.count("0.3125") == len(iterates)
    assert ("All measures as numbers" in page) == (len(iterates) == 1) and 'href="#iterates"' in page


# Examples


def test_examples_of_an_iterate_that_only_benchmarks_measured_have_no_margins(tmp_path):
    """Its scores are committed, but their β and opponent stand in the missing evaluation."""
    run = made_up_run(tmp_path / "run")
    run.storage.replace(run.eval_path(2), json.dumps({"iterate": "iter_001", "benchmarks": {}}).encode())
    assert [example.margins.keys() for example in read_view(run).examples] == [{"iter_000"}] * 3


def test_examples_come_in_the_order_of_margins_with_both_extremes(finished):
    """p0 has margin 2.0, p2 0.5, p1 −1.5."""
    found = read_examples(finished, finished.config(), limit=2, spread=True)
    assert [example.prompt_id for example in found] == ["p0", "p1"]
    assert found[0].margins == {"iter_000": pytest.approx(2.0), "iter_001": pytest.approx(2.0)}
    assert found[1].answers == {name: f"answer 1 of {name}" for name in ("sft", "iter_000", "iter_001")}


def test_answers_that_were_cut_are_marked(tmp_path):
    run = made_up_run(tmp_path / "run", done=1)
    without_an_end = TOKENIZER.encode("without an end", add_special_tokens=False)
    answers = [("p0", 0, without_an_end), ("p1", 0, [*without_an_end, 2])]
    write_rows(run.heldout_samples(2), GENERATION_SCHEMA, generation_rows(answers), part_rows=9)
    assert [example.cut for example in read_view(run).examples] == [{"iter_001"}, set(), set()]
    page = write_report([run], tmp_path / "page.html").read_text()
    assert page.count('<span class="m">cut</span>') == 1
    assert 'aria-label="Example 1: Do you like tea?"' in page
    assert page.count('<p dir="auto">') == 3 + 3 + 3 + 3 + 2
    assert "Far below 0" not in page and "<details><summary dir" not in page


def test_long_prompts_are_folded(finished, tmp_path, monkeypatch):
    [example, *_] = read_view(finished).examples
    long = replace(example, messages=[{"role": "user", "content": "word " * 400}])
    monkeypatch.setattr("spin_ray.report.page.view.read_examples", lambda *_, **__: [long])
    page = write_report([finished], tmp_path / "page.html").read_text()
    assert '<details><summary dir="auto"><b>user</b> word word' in page


# Stages in time


def test_an_attempt_whose_driver_died_is_lost_and_a_last_one_may_still_run():
    lines = [
        {"time": 0.0, "event": "start"},
        {"time": 50.0, "event": "start"},
        {"time": 60.0, "event": "failure", "seconds": 10.0},
        {"time": 70.0, "event": "start"},
    ]
    events = [line | fields_of("iter_000/training") for line in lines]
    found = [(span.outcome, span.start, span.end, span.is_end_known) for span in spans(events, seen=85.0)]
    assert found == [("lost", 0.0, 0.0, False), ("failure", 50.0, 60.0, True), ("running", 70.0, 85.0, False)]


def test_a_benchmark_beside_the_training_takes_no_more_than_the_wall_time(finished):
    """Training from 0 to 1000 s, a benchmark from 20 to 900, another from 1100 to 1200 and one without an end."""
    lines = [
        ("iter_000/training", {"time": 0.0, "event": "start"}),
        ("sft/benchmarks", {"time": 20.0, "event": "start"}),
        ("sft/benchmarks", {"time": 900.0, "event": "commit", "seconds": 880.0}),
        ("iter_000/training", {"time": 1000.0, "event": "commit", "seconds": 1000.0}),
        ("sft/benchmarks", {"time": 1100.0, "event": "start"}),
        ("iter_000/benchmarks", {"time": 1150.0, "event": "start"}),
        ("iter_000/benchmarks", {"time": 1200.0, "event": "commit", "seconds": 50.0}),
    ]
    view = replace(read_view(finished), spans=spans(line | fields_of(stage) for stage, line in lines))
    assert (view.busy_seconds, view.wall_seconds) == (1100.0, 1200.0)


@pytest.mark.slow
def test_the_length_of_an_attempt_is_said_as_far_as_it_is_known(tmp_path):
    """Of the first lost attempt nothing is known. The second lasted 700 s. The third was last seen after 90 s."""
    run = made_up_run(tmp_path / "run", iterations=3, done=2)
    start = run.events()[-1]["time"] + 10
    for line in (
        {"time": start, "event": "start"}, {"time": start + 1000, "event": "start"},
        {"time": start + 2000, "event": "lost", "seconds": 700.0}, {"time": start + 2000, "event": "start"},
    ):  # fmt: skip
        run.storage.append("events.jsonl", json.dumps(fields_of("iter_002/training") | line) + "\n")
    run.storage.replace("progress.json", json.dumps({"time": start + 2090, "line": ""}).encode())
    page = write_report([run], tmp_path / "page.html").read_text()
    lost = "lost when its driver died"
    for words in (f"of unknown length, {lost}", f"11 min 40 s, {lost}", "at least 1 min 30 s, still running"):
        assert f"iter_002 training: {words}" in page


# Charts


def test_a_chart_leaves_out_what_is_no_number_and_averages_what_is_too_much():
    points = [(float(x), 1.0) for x in range(10 * MOST_POINTS)] + [(5e4, float("nan"))]
    svg = line_chart("Loss", [Series("a", points, 0)], x_label="step")
    assert "nan" not in svg
    assert svg.count(" L") + 1 <= MOST_POINTS
    assert 'aria-label="Loss: a from 1 to 1"' in svg


def test_whiskers_at_one_iterate_do_not_lie_on_each_other():
    lines = [Series(name, [(0, 1), (1, 2)], n, [(0.5, 1.5), (1.5, 2.5)]) for n, name in enumerate("ab")]
    svg = line_chart("x", lines, x_label="iterate", x_names=["sft", "iter_000"])
    places = re.findall(r'class="whisker s\d" x1="([0-9.]+)"', svg)
    assert len(set(places)) == 4


def test_the_spoken_label_of_a_line_names_extremes_that_are_not_its_ends():
    def spoken(*ys: float) -> str:
        return re.findall('aria-label="x: (.*?)"', line_chart("x", [Series("a", list(enumerate(ys)), 0)], x_label="s"))[
            0
        ]

    assert spoken(1, 2) == "a from 1 to 2"
    assert spoken(1, 5, 2) == "a from 1 to 2, highest 5"
    assert spoken(1, 0, 5, 2) == "a from 1 to 2, lowest 0, highest 5"


def test_the_title_of_a_mark_is_escaped(finished):
    svg = line_chart("x", [Series("<b>&", [(0, 1), (1, 2)], 0)], x_label="step")
    assert "<title>&lt;b&gt;&amp;</title>" in svg
    assert gantt([]) == ""


def charts_of(page: str) -> dict[str, str]:
    """Returns the figures of a page by their titles."""
    return dict(re.findall(r"<figure><figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.DOTALL))


def test_what_is_measured_against_another_opponent_each_time_is_not_joined(finished, tmp_path):
    charts = charts_of(write_report([finished], tmp_path / "page.html").read_text())
    for title, joined in (
        ("Answer accuracy", 1), ("Held-out loss and loss on own samples", 0), ("Distance of the opponent", 0),
        ("KL to the base and KL to the opponent", 1),
    ):  # fmt: skip
        svg, _, said = charts[title].partition("</svg>")
        assert svg.count('class="line') == joined, title
        assert ("do not rank iterates by it" in said) is (title != "Answer accuracy")
        assert svg.count('class="dot') >= 2
    assert "Cut at max_tokens and y = y′" in charts, "duplicates were not measured"
    assert "closer opponent" in charts["Held-out loss and loss on own samples"]
    assert "closer opponent" in charts["Distance of the opponent"]


def test_a_chart_of_several_runs_has_the_title_of_the_one_measure_that_it_shows(finished, tmp_path):
    other = made_up_run(tmp_path / "other", iterations=3)
    charts = charts_of(write_report([finished, other], tmp_path / "page.html").read_text())
    assert {"Held-out loss", "Margin", "KL to the base", "Length of y′", "Cut at max_tokens"} <= charts.keys()


def test_of_more_lines_than_colours_the_first_and_the_last_are_drawn(tmp_path):
    charts = charts_of(write_report([made_up_run(tmp_path / "run", iterations=8, done=8)], tmp_path / "p").read_text())
    drawn = charts["Margin accuracy"]
    assert re.findall(r"</svg>(iter_\d+)</li>", drawn) == ["iter_000", *(f"iter_{n:03d}" for n in range(3, 8))]
    legend = drawn.partition('class="legend"')[2]
    assert re.findall(r'class="line (s\d)"', legend) == [f"s{colour}" for colour in range(6)]
    assert "Of 8 trainings the first and the last 5 are drawn." in drawn


def test_charts_of_training_say_what_a_point_is_and_show_the_drift_of_log_p(finished, tmp_path):
    run = made_up_run(tmp_path / "run")
    log = [
        json.loads(line) | {"real_logp_drift": -0.5}
        for line in run.storage.read("iter_001/train_log.jsonl").splitlines()
    ]
    run.storage.replace("iter_001/train_log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())
    charts = charts_of(write_report([run], tmp_path / "page.html").read_text())
    assert "Each point is one batch of 64 pairs. Clipped at 1." in charts["Gradient norm before clipping"]
    assert "In nats times beta." in charts["Margin"]
    drift = charts["Drift of log p(y)"]
    assert "nats per response" in drift and 'class="line s1"' in drift, "the colour of iter_001 in every chart"
    assert "Drift of log p(y)" not in charts_of(write_report([finished], tmp_path / "page.html").read_text())


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIAIOSFODNN7EXAMPLE:SECRETSECRET@bucket/x",
        "https://host/x?X-Amz-Signature=SECRETSECRET&y=1",
        "Authorization: Bearer SECRETSECRET.abc",
        "login failed: password=SECRETSECRET",
        "hf_SECRETSECRETabcdefghijk is not valid",
    ],
)
def test_credentials_in_texts_are_hidden(text):
    assert "SECRET" not in hide_in_text(text)


def test_credentials_are_hidden_by_name_and_counts_are_not():
    tree = {"hf_token": "abc", "max_tokens": 64, "tokenizer": "llama", "extra": {"api_key": "k", "dtype": "auto"}}
    assert hide(tree) == {
        "hf_token": "[hidden]", "max_tokens": 64, "tokenizer": "llama",
        "extra": {"api_key": "[hidden]", "dtype": "auto"},
    }  # fmt: skip


def test_no_secret_of_the_config_or_of_a_failure_is_in_the_page(tmp_path):
    engine = {"extra": {"store_api_key": "SECRETSECRET"}}
    run = made_up_run(tmp_path / "run", iterations=3, generation={"engine": engine})
    run.event("failure", "iter_002/training", seconds=1.0, error="OSError: s3://me:SECRETSECRET@bucket is gone")
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "SECRETSECRET" not in page
    assert "@bucket is gone" in page


# The command


def test_the_command_writes_into_the_run_folder(call, finished):
    code, out, _ = call("report", finished.storage.root)
    assert code == 0
    assert Path(out.strip()) == finished.storage.root / "report.html"


def test_a_report_of_a_folder_that_is_no_run_is_an_error(call, tmp_path):
    code, _, error = call("report", tmp_path)
    assert code == 2
    assert "is not a run" in error
