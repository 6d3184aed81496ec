"""How each algorithm makes the rows of an iteration, and which objective they feed; without Ray, engine or training."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from spin_ray.config.algorithms import AlgorithmName
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, DataError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import Turn
from spin_ray.loop.algorithms.seft import revision
from spin_ray.loop.algorithms.self_reinforcement import commonest
from spin_ray.loop.algorithms.sppo import preferences
from spin_ray.loop.algorithms.sppo.preferences import PREFERENCE_SCHEMA, win_table
from spin_ray.loop.algorithms.table import ALGORITHMS, check_algorithm
from spin_ray.loop.stages.generation.shards import Job
from spin_ray.loop.stages.training import stage as training
from spin_ray.report.grading import check_answers
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PROMPT_SCHEMA
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import (
    END_OF_TURN,
    config_of,
    rows_of,
    write_answers,
    write_prompts,
    write_rows,
)

THETA = ModelFolder(Path("m"), "digest of θ_t", "iter_000", 0)


@pytest.fixture
def run(tmp_path):
    return RunDir(Storage(tmp_path))


def config_for(algorithm: AlgorithmName, **sections: Any) -> SpinConfig:
    return config_of(algorithm=algorithm, **({"train": {"global_batch_pairs": 1}} | sections))


def turn_of(run: RunDir, config: SpinConfig, iteration: int = 0, **changes: Any) -> Turn:
    def play(model: ModelFolder, jobs: list[Any]) -> None:
        pytest.fail(f"{model.name} was asked to answer {jobs}")

    turn = Turn(
        run=run, config=config, start=None, iteration=iteration, opponent=THETA, initial=THETA, play=play,  # type: ignore[arg-type]
    )  # fmt: skip
    return replace(turn, **changes)


def make_pairs(run: RunDir, config: SpinConfig, iteration: int = 0, **changes: Any) -> list[dict[str, Any]]:
    ALGORITHMS[config.algorithm].make_pairs(turn_of(run, config, iteration, **changes))
    return rows_of(run.pairs(iteration))


# SPIN


def test_spin_learns_from_its_own_answers_with_the_values_of_the_iteration(run):
    config = config_for("spin", iterations=2, objective={"beta": [0.1, 5.0], "loss": "hinge", "sft_weight": 0.5})
    write_prompts(run.prompts, 2, 2)
    write_answers(run.generations(0), [("p000", 0, [50, END_OF_TURN])], 2)
    assert [row["pair_id"] for row in make_pairs(run, config)] == ["p000/000/0"]
    spin = ALGORITHMS["spin"]
    assert spin.plays(run) == run.prompts
    assert spin.objective(config, 1) == Objective(loss="hinge", beta=5.0, sft_weight=0.5)


# Baselines


def test_continued_sft_takes_the_prompts_that_spin_would_play_and_no_engine(run):
    config = config_for("continued_sft", data={"train": "d", "prompts_per_iteration": 3})
    write_prompts(run.prompts, 9, part_rows=4)
    sft = ALGORITHMS["continued_sft"]
    assert sft.plays(run) is None
    rows = [make_pairs(run, config, iteration) for iteration in range(3)]
    played = [[row["prompt_id"] for row in each] for each in rows]
    assert sorted(prompt for each in played for prompt in each) == [f"p{i:03d}" for i in range(9)]
    number = int(played[0][0][1:])
    assert rows[0][0] == {
        "pair_id": f"p{number:03d}/000/0", "prompt_id": f"p{number:03d}", "iteration": 0, "prompt_ids": [1, number],
        "real_ids": [10 + number, END_OF_TURN], "generated_ids": [],
    }  # fmt: skip
    assert sft.objective(config, 0) == Objective(loss=None)


def write_preferences(run: RunDir, rejected: list[list[int] | None]) -> None:
    rows = [
        {"prompt_id": f"p{i}", "prompt_ids": [1, i], "real_ids": [7, 2], "messages": "[]", "rejected_ids": ids}
        for i, ids in enumerate(rejected)
    ]
    write_rows(run.prompts, PROMPT_SCHEMA, rows, part_rows=2)


def test_dpo_sets_chosen_against_rejected_without_an_engine(run):
    write_preferences(run, [[8, 2], [9, 2], [7, 2]])
    assert ALGORITHMS["dpo"].plays(run) is None
    rows = make_pairs(run, config_for("dpo", objective={"beta": 0.1}))
    assert [(row["real_ids"], row["generated_ids"]) for row in rows] == [([7, 2], [8, 2]), ([7, 2], [9, 2])]
    assert run.pairs(0).manifest().counts["dropped_identical"] == 1


def test_equal_responses_stay_for_every_algorithm_whose_recipe_says_so(run):
    write_preferences(run, [[8, 2], [7, 2]])
    rows = make_pairs(run, config_for("dpo", objective={"keep_identical": True}))
    assert [(row["real_ids"], row["generated_ids"]) for row in rows] == [([7, 2], [8, 2]), ([7, 2], [7, 2])]


def test_dpo_refuses_rows_without_a_rejected_response(run):
    write_preferences(run, [[8, 2], None, [9, 2], None])
    with pytest.raises(
        DataError, match=r"d\.jsonl: 2 rows have no rejected response, first .*; algorithm dpo needs chosen"
    ):
        ALGORITHMS["dpo"].check_rows(run, config_for("dpo"))


# SPPO


JUDGED = SimpleNamespace(scorer=ModelFolder(Path("judge"), "digest of the judge", "scorer", 0))
SPPO = {"scorer": {"path": "judge"}, "generation": {"samples_per_prompt": 3}}


@pytest.fixture
def judged(run, monkeypatch):
    """Three samples of two prompts, judged; those of the second are all equal."""
    monkeypatch.setattr(preferences, "run", lambda *_: None)
    write_prompts(run.prompts, 2, 2)
    write_answers(
        run.generations(0), [("p000", i, [50 + i, 2]) for i in range(3)] + [("p001", i, [9]) for i in range(3)], 3
    )
    ids, wins = ["p000"] * 3 + ["p001"] * 3, [0.25, 0.75, 0.5, 0.5, 0.5, 0.5]
    rows = [{"prompt_id": p, "sample": i % 3, "win": w} for i, (p, w) in enumerate(zip(ids, wins, strict=True))]
    write_rows(run.preferences(0), PREFERENCE_SCHEMA, rows, part_rows=3)


def test_sppo_sets_the_best_sample_against_the_worst_with_their_win_probabilities(run, judged):
    config = config_for("sppo", objective={"beta": 0.001}, **SPPO)
    (row,) = make_pairs(run, config, start=JUDGED)
    assert (row["pair_id"], row["real_ids"], row["generated_ids"]) == ("p000/000/1", [51, 2], [50, 2])
    assert rows_of(run.wins(0)) == [{"pair_id": "p000/000/1", "real_win": 0.75, "generated_win": 0.25}]
    assert run.pairs(0).manifest().counts["dropped_identical"] == 1
    assert ALGORITHMS["sppo"].objective(config, 0) == Objective(loss="square", beta=0.001)


def test_wins_that_a_dead_driver_did_not_commit_are_made_again(run, judged):
    config = config_for("sppo", **SPPO)
    make_pairs(run, config, start=JUDGED)
    run.storage.delete("iter_000/wins/_MANIFEST.json")
    make_pairs(run, config, start=JUDGED)
    assert [row["real_win"] for row in rows_of(run.wins(0))] == [0.75]


class Longer:
    """Beats surely whatever is shorter."""

    cut = 0

    def wins(self, prompt: list[dict[str, str]], responses: list[str]) -> torch.Tensor:
        assert prompt == [{"role": "user", "content": "q"}], "people's response must not be shown to the judge"
        length = torch.tensor([len(response) for response in responses], dtype=torch.float64)
        return ((length[:, None] - length[None, :]).sign() + 1) / 2


def test_a_response_wins_by_its_mean_over_all_samples_of_the_prompt_itself_included() -> None:
    """Lengths 1, 3, 2: (½ + 0 + 0)/3, (1 + ½ + 1)/3, (1 + 0 + ½)/3."""
    answers = pa.table({"prompt_id": ["p"] * 3, "sample": [0, 1, 2]})
    messages = {"p": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}
    table = win_table(answers, ["x", "xxx", "xx"], messages, Longer())
    assert table["win"].to_pylist() == pytest.approx([1 / 6, 5 / 6, 1 / 2])


def test_sppo_may_grade_its_samples_by_the_answers_of_their_rows(run):
    """Grades 0, 1, 0 of p0 win with (1 + 1 − 1/3) / 2 = 5/6 at best; p1's samples are all wrong, p2 has no answer."""
    answers = [TOKENIZER.decode([50]), "none", None]
    rows = [{"prompt_id": f"p{i}", "prompt_ids": [1], "real_ids": [2], "messages": "[]", "answer_text": answers[i]}
            for i in range(3)]  # fmt: skip
    write_rows(run.prompts, PROMPT_SCHEMA, rows, part_rows=3)
    write_answers(run.generations(0), [(f"p{i}", j, [49 + j, 2]) for i in range(3) for j in range(3)], 3)
    config = config_for("sppo", scorer={"kind": "grade", "path": "exact"}, generation={"samples_per_prompt": 3})
    opponent = replace(THETA, path=Path(resolve("embedded:tiny-llama")))
    (row,) = make_pairs(run, config, start=SimpleNamespace(scorer=None), opponent=opponent)
    assert (row["pair_id"], row["real_ids"], row["generated_ids"]) == ("p0/000/1", [50, 2], [49, 2])
    (wins,) = rows_of(run.wins(0))
    assert (wins["real_win"], wins["generated_win"]) == pytest.approx((5 / 6, 1 / 3))
    assert run.pairs(0).manifest().counts["dropped_identical"] == 2


def test_rows_without_an_answer_to_grade_by_are_told_before_anything_is_generated(run):
    """q0 and q2 have answers, which are no letters."""
    write_questions(run, 3)
    shutil.copytree(run.questions.local_folder(), run.storage.root / run.prompts.path)
    for grade, told in (("multiple_choice", pytest.raises(DataError, match="no row has an answer")), ("exact", None)):
        by_grade = {"kind": "grade", "path": grade}
        for config in (
            config_for("sppo", scorer=by_grade),
            config_for("self_reinforcement", data={"train": "d", "questions": "q"}, self_filter={"grade": grade}),
        ):
            with told or nullcontext():
                check_answers(run, config)


# Self-reinforcement


def write_questions(run: RunDir, count: int) -> None:
    """The answer to q0 is token 6, q1 has none, and nobody gives that to q2."""
    answers = {0: TOKENIZER.decode([6]), 2: "none"}
    rows = [
        {"prompt_id": f"q{i}", "prompt_ids": [1, i], "real_ids": [], "messages": question(f"q {i}")}
        | {"answer_text": answers.get(i)}
        for i in range(count)
    ]
    write_rows(run.questions, PROMPT_SCHEMA, rows, part_rows=2)


def question(text: str) -> str:
    return json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": ""}])


def reinforce(
    run: RunDir, min_agreement: float | None, other_ends: tuple[int, ...] = (), **chosen: Any
) -> list[dict[str, Any]]:
    """θ_t answers q0 with 5, 6, 6 and q1 with 7, 8, 9, and is cut short at q2; the model before fine-tuning says 3."""
    config = config_for(
        "self_reinforcement", sft={}, data={"train": "d", "questions": "q"}, generation={"samples_per_prompt": 3},
        self_filter=chosen or (None if min_agreement is None else {"min_agreement": min_agreement}),
    )  # fmt: skip
    write_questions(run, 3)
    answers = [("q0", i, [token, 2]) for i, token in enumerate((5, 6, 6))]
    answers += [("q1", i, [token, 2]) for i, token in enumerate((7, 8, 9))] + [("q2", i, [4]) for i in range(3)]
    write_answers(run.generations(0), answers, 3)
    base = ModelFolder(Path("base"), "digest of the base", "start", 0)

    def play(model: ModelFolder, jobs: list[Job]) -> None:
        (job,) = jobs
        assert (model, job.model, job.samples) == (base, base, 1)
        write_answers(job.target, [(f"q{i}", sample, [3 + sample, 2]) for i in range(3) for sample in range(3)], 3)

    opponent = replace(THETA, path=Path(resolve("embedded:tiny-llama")))
    start = SimpleNamespace(model=base, end_of_turn_id=END_OF_TURN, other_ends=other_ends)
    return make_pairs(run, config, start=start, opponent=opponent, play=play)


def test_self_reinforcement_sets_the_agreed_answer_against_the_unfinetuned_models(run):
    (row,) = reinforce(run, min_agreement=0.5)
    assert (row["prompt_id"], row["real_ids"], row["generated_ids"]) == ("q0", [6, 2], [3, 2])
    counts = run.pairs(0).manifest().counts
    assert (counts["dropped_disagreed"], counts["dropped_no_answer"]) == (1, 1)


def test_self_reinforcement_may_learn_from_the_sample_with_the_best_grade(run):
    rows = reinforce(run, None, grade="exact", other_ends=(4,))
    assert [(row["prompt_id"], row["real_ids"]) for row in rows] == [("q0", [6, 2])]
    counts = run.pairs(0).manifest().counts
    assert (counts["dropped_no_answer"], counts["dropped_below_grade"]) == (1, 1)
    with pytest.raises(ConfigError, match=r"self_filter.min_agreement: self_filter.grade chooses in its place"):
        check_algorithm(config_for("self_reinforcement", sft={}, data={"train": "d", "questions": "q"},
                                   self_filter={"grade": "exact", "min_agreement": 0.5}))  # fmt: skip


def test_without_a_filter_every_question_is_learnt_from(run):
    assert [row["real_ids"] for row in reinforce(run, min_agreement=None)] == [[6, 2], [7, 2]]


def test_an_answer_that_another_end_token_ends_is_not_cut(run):
    rows = reinforce(run, min_agreement=None, other_ends=(4,))
    assert [row["real_ids"] for row in rows] == [[6, 2], [7, 2], [4]]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([7, 4, 7], (0, 2 / 3)), ([4, 7, 7], (1, 2 / 3)), ([None, None, 4], (2, 1 / 3)), ([None], (0, 0.0))],
)
def test_the_commonest_answer_and_its_share(answers, expected):
    assert commonest(answers) == expected


# SEFT


TOKENIZER = load_tokenizer(resolve("embedded:tiny-llama"))
RENDERER = ChatRenderer(TOKENIZER)


def tokens(text: str) -> list[int]:
    return [*TOKENIZER.encode(text, add_special_tokens=False), END_OF_TURN]


def evolve(run: RunDir, monkeypatch: Any, revisions: list[list[int]], cut: int = 0) -> list[dict[str, Any]]:
    """θ_0 answers the questions "q 0", "q 1", … with "six"; the reviser writes ``revisions``.

    Args:
        cut: number of further questions, whose answers are cut.
    """
    config = config_for(
        "seft", reviser={}, data={"train": "d", "questions": "q"}, model={"path": "m", "max_length": 512},
        generation={"sampling": {"max_tokens": 16}},
    )  # fmt: skip
    start = ModelFolder(Path(resolve("embedded:tiny-llama")), "digest of θ_0", "sft", 0)
    labelled = json.dumps([{"role": "user", "content": "2 + 4?"}, {"role": "assistant", "content": "it is 6"}])
    row = {"prompt_id": "p", "prompt_ids": [1], "real_ids": tokens("it is 6"), "messages": labelled}
    write_rows(run.prompts, PROMPT_SCHEMA, [row], part_rows=1)
    write_questions(run, len(revisions) + cut)
    said = [tokens("six")] * len(revisions) + [tokens("six")[:-1]] * cut
    write_answers(run.generations(0), [(f"q{i}", 0, ids) for i, ids in enumerate(said)], 9)

    def play(model: ModelFolder, jobs: list[Job]) -> None:
        (job,) = jobs
        if job.target.path == "reviser/answers":
            assert model == start and job.model.name == "reviser/sft", "iteration 0 would draw the same answers"
            write_answers(job.target, [("p", 0, tokens("it is 7"))], 1)
        else:
            assert (job.target.path, model.name, job.samples) == ("iter_000/revisions", "iter_000/reviser", 1)
            write_answers(job.target, [(f"q{i}/0", 0, ids) for i, ids in enumerate(revisions)], 9)

    def fine_tune(run_dir: RunDir, config: SpinConfig, how: Any, model: Any, rows: Artefact, target: Artefact) -> None:
        assert (how, model) == (config.reviser, start)
        target.commit({}, {"rows": rows.manifest().digest}, {})

    monkeypatch.setattr(training, "fine_tune", fine_tune)
    return make_pairs(run, config, start=SimpleNamespace(model=start), initial=start, opponent=start, play=play)


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=True)


def test_the_reviser_learns_from_an_answer_and_peoples_which_label_and_text_to_write(run, monkeypatch):
    evolve(run, monkeypatch, [tokens("[keep]")])
    (row,) = rows_of(run.artefact("reviser/rows"))
    asked = text_of(row["prompt_ids"])
    assert "2 + 4?" in asked and "it is 7" in asked
    assert text_of(row["real_ids"]) == "[minor]\nit is 6"


def test_seft_learns_kept_answers_and_revisions_and_counts_what_has_no_label(run, monkeypatch):
    rows = evolve(
        run, monkeypatch,
        [tokens("[keep]"), tokens("[minor]\nit is six"), tokens("it is six"), tokens("[major]\nsix")[:-1]],
    )  # fmt: skip
    assert [(row["prompt_id"], text_of(row["real_ids"]), row["generated_ids"]) for row in rows] == [
        ("q0/0/0", "six", []), ("q1/0/0", "it is six", []),
    ]  # fmt: skip
    assert rows[0]["prompt_ids"] == RENDERER.render(json.loads(question("q 0"))).prompt_ids
    assert rows[1]["real_ids"][-1] == END_OF_TURN
    counts = run.pairs(0).manifest().counts
    assert (counts["dropped_no_label"], counts["dropped_revision_cut"]) == (1, 1)


def test_too_few_revisions_are_told_with_every_reason(run, monkeypatch):
    revisions = [tokens("six"), tokens("seven"), tokens("[major]\nsix")[:-1]]
    said = "0 pairs are left after dropping 3 answer_cut, 2 no_label, 1 revision_cut, fewer than"
    with pytest.raises(DataError, match=said):
        evolve(run, monkeypatch, revisions, cut=3)


def test_an_answer_that_was_cut_is_not_revised(run, monkeypatch):
    write_answers(run.generations(1), [("q0", 0, [5, 6])], 9)
    write_questions(run, 1)
    target = run.artefact("iter_001/revision_prompts")
    revision.revision_prompts(run, config_for("seft", reviser={}), RENDERER, run.questions, run.generations(1), target)
    assert target.manifest().counts == {"dropped_answer_cut": 1}


def test_rows_that_are_there_are_not_made_again(run):
    write_preferences(run, [[8, 2]])
    for _ in range(2):
        make_pairs(run, config_for("dpo"))
    assert [event["event"] for event in run.events()] == ["start", "commit"]
