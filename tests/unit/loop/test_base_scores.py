"""Scores under θ_0 for a geometric reference: which responses are scored, and that each is scored once in a run."""

import pyarrow as pa
import pytest

from spin_ray.errors import RunDirError
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.loop.stages import base_scores, pairs
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import REFERENCE_SCHEMA, TOKEN_IDS, pairs_of
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of, rows_of, write_answers, write_prompts, write_rows

CONFIG = config_of(objective={"reference_alpha": 0.5, "window": "all"}, train={"global_batch_pairs": 1})
BASE = ModelFolder(None, "digest of θ_0", "sft", 0)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two prompts; iteration 0 played the first only; its reference scores are −1 (y) and −2 (y′)."""
    run = RunDir(Storage(tmp_path))
    write_prompts(run.prompts, 2, 2)
    write_answers(run.generations(0), [("p000", 0, [50, 2])], 2)
    pairs.run(run, CONFIG, 0)
    write_rows(
        run.reference(0), REFERENCE_SCHEMA,
        [{"pair_id": "p000/000/0", "real_logp": -1.0, "generated_logp": -2.0}], part_rows=1,
    )  # fmt: skip
    return run


@pytest.fixture
def scored(monkeypatch):
    """Prompt and response that θ_0 was asked to score, by call; it gives −(10 + number of tokens)."""
    calls: list[list[tuple[int, list[int]]]] = []

    def score(run_dir, config, base, rows: pa.Table, stage, made_from):
        calls.append([(row["prompt_ids"][1], row["real_ids"]) for row in rows.to_pylist()])
        return {row["pair_id"]: -10.0 - len(row["real_ids"]) for row in rows.to_pylist()}

    monkeypatch.setattr(base_scores, "_score", score)
    return calls


def scores_of(run: RunDir, iteration: int) -> dict[str, tuple[float, float]]:
    rows = rows_of(run.base_scores(iteration))
    return {row["pair_id"]: (row["real_logp"], row["generated_logp"]) for row in rows}


def play(run: RunDir, iteration: int) -> None:
    write_answers(run.generations(iteration), [("p000", 0, [60 + iteration, 2]), ("p001", 0, [70 + iteration])], 2)
    pairs.run(run, CONFIG, iteration)
    base_scores.run(run, CONFIG, iteration, BASE)


def test_a_response_is_scored_once_in_a_run(run, scored):
    """y of p000 and its y′ of iteration 0 are known from iteration 0's reference; y of p001 is new in iteration 1."""
    play(run, 1)
    play(run, 2)
    assert scored == [[(0, [61, 2]), (1, [11, 2]), (1, [71])], [(0, [62, 2]), (1, [72])]]
    assert scores_of(run, 1) == {"p000/001/0": (-1, -12), "p001/001/0": (-12, -11), "p000/000/0": (-1, -2)}
    assert scores_of(run, 2) == scores_of(run, 1) | {"p000/002/0": (-1, -12), "p001/002/0": (-12, -11)}


def test_committed_scores_are_not_made_again(run, scored):
    play(run, 1)
    base_scores.run(run, CONFIG, 1, BASE)
    assert len(scored) == 1


def test_scores_of_another_base_are_refused(run, scored):
    play(run, 1)
    with pytest.raises(RunDirError, match="iter_001/base_scores: was made with other values of base_model"):
        base_scores.run(run, CONFIG, 1, ModelFolder(None, "another", "sft", 0))  # type: ignore[arg-type]


def test_responses_to_score_have_trees_of_their_own(run, scored):
    """Two y′ of one prompt must not share a tree: a tree has one y, and here every response stands in its place."""
    write_answers(run.generations(1), [("p000", 0, [61, 2]), ("p000", 1, [62])], 2)
    pairs.run(run, CONFIG, 1)
    table = pa.concat_tables(list(run.pairs(1).tables()))
    known = base_scores.known_scores(run.pairs(0).tables(), run.reference(0).tables())
    rows = base_scores.unknown_responses(table, known).to_pylist()
    assert [(row["real_ids"], row["generated_ids"]) for row in rows] == [([61, 2], []), ([62], [])]
    assert all(row["prompt_ids"] == [1, 0] for row in rows)
    assert len({row["prompt_id"] for row in rows}) == 2


def pairs_with(reals: dict[str, list[int]]) -> pa.Table:
    """Pairs of one prompt with y of their own."""
    count = len(reals)
    columns = [pa.array(ids, TOKEN_IDS) for ids in ([[1, 0]] * count, list(reals.values()), [[9, 2]] * count)]
    return pairs_of(list(reals), 0, ["a"] * count, *(pa.chunked_array([column]) for column in columns))


def test_each_y_of_a_prompt_has_a_score_of_its_own():
    """The first pair's counts where several have the same y; a y of a later iteration is no other's."""
    earlier = pairs_with({"a/000/0": [5], "a/000/1": [6], "a/000/2": [5]})
    scores = pa.table([["a/000/0", "a/000/1", "a/000/2"], [-1.0, -7.0, -1.5], [-2.0, -3.0, -4.0]], REFERENCE_SCHEMA)
    known = base_scores.known_scores([earlier], [scores])
    reals, generated = base_scores.names_of(earlier)
    assert [known[name] for name in reals] == [-1.0, -7.0, -1.0]
    assert [known[name] for name in generated] == [-2.0, -3.0, -4.0]
    later = base_scores.unknown_responses(pairs_with({"a/001/0": [6], "a/001/1": [8]}), known).to_pylist()
    assert [row["real_ids"] for row in later] == [[9, 2], [8], [9, 2]]
