"""What an iterate is worth, by hand."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.loop.stages import evaluation
from spin_ray.report.history import read_rows
from spin_ray.report.responses import length_auc, row_measures
from spin_ray.report.uncertainty import conversation_groups
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import GENERATION_SCHEMA, PROMPT_SCHEMA
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of, exchange, generation_rows, write_answers, write_prompts

TINY = Path(resolve("embedded:tiny-llama"))
MODEL, OPPONENT = ModelFolder(TINY, "d1", "iter_000", 0), ModelFolder(TINY, "d0", "sft", 0)
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=8)


@pytest.fixture
def run(tmp_path):
    """Four held-out prompts; the real response of prompt i is [10 + i, 2]."""
    run = RunDir(Storage(tmp_path))
    write_prompts(run.heldout, count=4, part_rows=3)
    return run


# Length


@pytest.mark.parametrize(
    ("real", "generated", "auc"),
    [
        ([3, 5], [1, 4], 3 / 4),  # 3 > 1, 3 < 4, 5 > 1, 5 > 4
        ([1, 2], [3, 4], 0.0),
        ([5], [1, 2, 3], 1.0),
        ([2, 2], [2], 0.5),  # ties count half
        ([1, 2], [2, 3], 1 / 8),  # only 2 = 2: half of one in four
    ],
)
def test_length_auc_is_the_chance_that_the_real_response_is_longer(real, generated, auc):
    assert length_auc(real, generated) == auc


@given(lengths, lengths)
def test_length_auc_is_the_mean_over_all_pairs_of_responses(real, generated):
    wins = [(left > right) + 0.5 * (left == right) for left in real for right in generated]
    assert length_auc(real, generated) == pytest.approx(sum(wins) / len(wins))


def text_measures(
    real: list[list[int]],
    answers: list[tuple[str, int, list[int]]],
    answer: list[str | None] | None = None,
    extractor: str = "none",
) -> dict[str, Any]:
    heldout = pa.Table.from_pylist(
        [
            {
                "prompt_id": f"p{i:03d}",
                "prompt_ids": [1],
                "real_ids": ids,
                "messages": exchange(i),
                "answer_text": (answer or [None] * 9)[i],
            }
            for i, ids in enumerate(real)
        ],
        PROMPT_SCHEMA,
    )
    config = config_of(data={"train": "d", "heldout": "h"}, evaluation={"answer_extractor": extractor})
    generated = pa.Table.from_pylist(generation_rows(answers), GENERATION_SCHEMA)
    groups, by_row = conversation_groups(heldout), row_measures(heldout, generated)
    texts = evaluation.text_measures(heldout, generated, by_row, groups)
    return texts | evaluation._accuracy(evaluation._grades(heldout, generated, config, TINY), groups)


def test_lengths_truncation_and_identity_are_shares_of_the_rows():
    """Lengths 2, 3, 2 against 2, 4, 1: 7/3 each; one of three was cut, one is the real response."""
    found = text_measures(
        [[5, 2], [5, 6, 2], [7, 2]], [("p000", 0, [5, 2]), ("p001", 0, [8, 8, 8, 2]), ("p002", 0, [7])]
    )
    errors = found.pop("standard_errors")
    assert found == {
        "real_length": pytest.approx(7 / 3), "generated_length": pytest.approx(7 / 3),
        "length_auc": 5 / 9,  # 2: ½ 0 1; 3: 1 0 1; 2: ½ 0 1
        "truncation_rate": pytest.approx(1 / 3), "identical_share": pytest.approx(1 / 3),
        "duplicate_share": 0.0, "real_duplicate_share": 0.0,
        "distinct_2": 3 / 4, "real_distinct_2": 1.0,  # 52, 88, 88, 82; 52, 56, 62, 72
    }  # fmt: skip
    assert errors["truncation_rate"] == pytest.approx((12 / 7 / 6 / 7) ** 0.5)  # 0, 0, 1 and two of each more
    assert errors["real_length"] == pytest.approx(
        1 / 3 * 4.302653 / 1.96
    )  # 2, 3, 2: variance 1/3 over three rows; t(2)
    assert errors.keys() == {"real_length", "generated_length", "truncation_rate", "identical_share"}


def test_answers_are_graded_where_the_data_has_them():
    """Right, wrong, without a number, without an answer, and with one that is no number."""
    tokenizer = load_tokenizer(str(TINY))
    texts = ["2 + 2 = 4", "2 + 3 = 6", "no idea", "1 = 1", "1 = 1"]
    answers = [(f"p{i:03d}", 0, [*tokenizer.encode(text, add_special_tokens=False), 2]) for i, text in enumerate(texts)]
    found = text_measures([[5, 2]] * 5, answers, ["4", "#### 5", "6.0", None, "B"], extractor="equals")
    assert found["answer_accuracy"] == pytest.approx(1 / 3)
    assert found["answers_graded"] == 3


def test_a_grader_of_texts_reads_the_answers_own_words():
    """Right, wrong."""
    tokenizer = load_tokenizer(str(TINY))
    ids = [[*tokenizer.encode(text, add_special_tokens=False), 2] for text in ("yes", "no")]
    config = config_of(data={"train": "d", "heldout": "h"}, evaluation={"grade": "exact"})
    heldout = pa.table({"prompt_id": ["p0", "p1"], "answer_text": ["yes", "yes"]})
    answers = pa.table({"token_ids": ids})
    assert evaluation._grades(heldout, answers, config, TINY) == {"p0": [1.0], "p1": [0.0]}


def test_pass_at_1_is_the_mean_over_all_samples_with_an_interval_over_rows(run):
    """Rows with 2, 1 and 0 right of 2 samples: 1, ½, 0, with 0, 0, 1, 1 the error √1.75 / 7, not that of six draws."""
    tokenizer = load_tokenizer(str(TINY))
    yes, no = ([*tokenizer.encode(text, add_special_tokens=False), 2] for text in ("yes", "no"))
    said = {"p000": (yes, yes, no), "p001": (no, yes, no), "p002": (no, no, yes)}
    answers = [(prompt, sample, ids) for prompt, three in said.items() for sample, ids in enumerate(three)]
    write_answers(run.heldout_samples(0), answers, 4)
    config = config_of(data={"train": "d", "heldout": "h"}, evaluation={"grade": "exact", "samples": 2})
    heldout, samples = evaluation.read_answers(run.heldout, run.heldout_samples(0), config.evaluation.samples)
    heldout = heldout.drop_columns("answer_text").append_column("answer_text", pa.array(["yes"] * heldout.num_rows))
    grades = evaluation._grades(heldout, samples, config, TINY)
    assert evaluation._accuracy(grades, conversation_groups(heldout)) == {
        "answer_accuracy": 0.5, "answers_graded": 3, "conversations_graded": 3, "samples_graded": 6,
        "standard_errors": {"answer_accuracy": pytest.approx(1.75**0.5 / 7)},
    }  # fmt: skip


def test_without_any_answer_in_the_data_there_is_no_accuracy():
    assert "answer_accuracy" not in text_measures([[5, 2]], [("p000", 0, [6, 2])], extractor="hashes")


# Rows


def test_the_first_sample_of_each_held_out_row_is_judged_beside_its_own_row(run):
    answers = [(f"p{i:03d}", sample, [50 + i, sample, 2]) for i in (0, 1, 3) for sample in (0, 1)]
    write_answers(run.heldout_samples(0), answers, 4)
    heldout, first = evaluation.read_answers(run.heldout, run.heldout_samples(0))
    assert heldout["prompt_id"].to_pylist() == first["prompt_id"].to_pylist() == ["p000", "p001", "p003"]
    assert first["token_ids"].to_pylist() == [[50, 0, 2], [51, 0, 2], [53, 0, 2]]


def test_pairs_to_score_are_named_by_row_and_by_whose_sample_it_is(run):
    write_answers(run.heldout_samples(0), [("p000", 0, [7, 2])], 1)
    rows = evaluation.pair_rows(*evaluation.read_answers(run.heldout, run.heldout_samples(0)), "self").to_pylist()
    assert rows == [
        {"pair_id": "p000/self", "prompt_id": "p000", "iteration": 0,
         "prompt_ids": [1, 0], "real_ids": [10, 2], "generated_ids": [7, 2]},
    ]  # fmt: skip


# The file


def test_changes_since_the_start_model_are_told_row_by_row(run):
    """Lengths 2, 1 and then 4, 3: both grew by 2, however different the rows are. One of two was cut, then both."""
    write_answers(run.heldout_samples(0), [("p000", 0, [7, 2]), ("p001", 0, [9])], 2)
    evaluate_start(run)
    write_answers(run.heldout_samples(1), [("p000", 0, [7, 7, 7, 7]), ("p001", 0, [9, 9, 9])], 2)
    config = config_of(data={"train": "d", "heldout": "h"})
    found = evaluation.run(run, config, 1, MODEL, None, OPPONENT)["changes"]
    assert found.pop("since") == "sft"
    assert found == {
        "generated_length": {"value": 2.0, "standard_error": 0.0},
        # 1, 0 and the added −1, 1: mean ¼, squares 2.75; by 4/2, as the mean without those is ½
        "truncation_rate": {"value": 0.5, "standard_error": pytest.approx((4 / 3 * 2.75) ** 0.5 / 4 * 2)},
    }
    rows = read_rows(run, 1).to_pylist()
    assert rows[0] == {
        "prompt_id": "p000", "conversation": 0, "answer_accuracy": None, "truncation_rate": 1.0, "generated_length": 4.0
    }  # fmt: skip


def evaluate_start(run: RunDir) -> dict[str, Any]:
    return evaluation.run(run, config_of(data={"train": "d", "heldout": "h"}), 0, OPPONENT, None, OPPONENT)


def test_the_start_model_has_no_opponent_and_is_judged_by_its_texts(run):
    write_answers(run.heldout_samples(0), [("p000", 0, [10, 2]), ("p001", 0, [9])], 2)
    found = evaluate_start(run)
    assert (found["iterate"], found["rows"], found["identical_share"]) == ("sft", 2, 0.5)
    assert "against_opponent" not in found
    assert run.storage.exists("sft/eval.json")


def test_results_that_lm_eval_writes_meanwhile_stay(run, monkeypatch):
    write_answers(run.heldout_samples(0), [("p000", 0, [10, 2]), ("p001", 0, [9])], 2)
    measures = evaluation.text_measures

    def beside(*tables):
        run.update_evaluation(0, lambda _: {"benchmarks": {"arc": 0.5}})
        return measures(*tables)

    monkeypatch.setattr(evaluation, "text_measures", beside)
    evaluate_start(run)
    assert run.evaluation(0)["benchmarks"] == {"arc": 0.5} and run.evaluation(0)["rows"] == 2


def test_results_of_a_model_that_was_trained_anew_are_dropped(run):
    write_answers(run.heldout_samples(0), [("p000", 0, [10, 2]), ("p001", 0, [9])], 2)
    run.update_evaluation(0, lambda _: {"made_from": {"model": "another"}, "benchmarks": {"arc": 0.5}})
    assert "benchmarks" not in evaluate_start(run)
    assert "benchmarks" not in run.evaluation(0)


def test_an_evaluation_is_redone_only_for_other_samples_or_another_model(run):
    write_answers(run.heldout_samples(0), [("p000", 0, [10, 2])], 1)
    first = evaluate_start(run)
    events = run.events()
    assert evaluate_start(run) == first
    assert run.events() == events
    run.storage.delete("sft/heldout_samples")
    write_answers(run.heldout_samples(0), [("p000", 0, [5, 2])], 1)
    assert evaluate_start(run)["identical_share"] == 0.0
