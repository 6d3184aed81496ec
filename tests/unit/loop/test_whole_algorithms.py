"""Whole tiny runs of algorithms with stages or rows of their own: real driver, stages and backend, made-up answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import DataError
from spin_ray.learner.backends.base import learning_rate_at
from spin_ray.loop import driver
from spin_ray.loop.algorithms.dpo import Dpo
from spin_ray.loop.algorithms.sdft import demonstrated
from spin_ray.loop.algorithms.table import check_algorithm
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.fakes import rows_of
from tests.support.learner_cases import logp_alone, one_rank
from tests.support.small_run import HELDOUT_ROWS, ROWS, committed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> tuple[RunDir, SpinConfig]:
    small_run.in_this_process(monkeypatch)
    content = small_run.make_inputs(tmp_path).model_dump(mode="json", exclude_unset=True)
    weights = tmp_path / "model/model.safetensors"  # ten times larger: each token then changes what comes after it
    save_file({name: 10 * weight for name, weight in load_file(weights).items()}, weights, metadata={"format": "pt"})
    for name, section in changes.items():
        content[name] = content.get(name, {}) | section if isinstance(section, dict) else section
    config = SpinConfig.model_validate(content)
    check_algorithm(config)
    small_run.run(config, tmp_path / "run")
    return RunDir(Storage(tmp_path / "run")), config


def model_of(tmp_path: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")


TEMPLATE = "Q: {prompt} A person said {response}, you say:"


def test_sdft_learns_from_its_own_answers_what_it_would_say_with_the_human_one_in_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's prompt, distributions and the loss of step 0 are transformers' own. The lengths are made equal to
    one step an epoch, so that step 0 has every row: its loss is the mean over all tokens of y'.
    """
    train = {"global_batch_pairs": 24, "epochs": 2, "schedule_epochs": 4, "pack_length": 512}
    sdft = {"demonstration": TEMPLATE, "top_k": 7}
    run, config = run_with(
        tmp_path, monkeypatch,
        {"algorithm": "sdft", "sdft": sdft, "train": train, "model": {"max_length": 256},
         "generation": {"samples_per_prompt": 2}, "data": {"max_quarantine_fraction": 0.5}},
    )  # fmt: skip
    model, tokenizer = model_of(tmp_path)
    prompts = {row["prompt_id"]: json.loads(row["messages"]) for row in rows_of(run.prompts)}
    teacher = {row["pair_id"]: row for row in rows_of(run.teacher(0))}
    learnt = {row["pair_id"]: row for row in rows_of(run.pairs(0))}
    shown = {row["pair_id"]: row for row in rows_of(run.teacher_rows(0))}
    assert len(learnt) == 2 * ROWS and learnt.keys() == teacher.keys() == shown.keys()
    assert run.heldout_samples(0).manifest().rows == HELDOUT_ROWS, "one each, as evaluation.samples says"
    total, tokens = 0.0, 0
    for pair_id, row in learnt.items():
        asked, answered = prompts[pair_id.partition("/")[0]]
        text = f"Q: {asked['content']} A person said {answered['content']}, you say:"
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert shown[pair_id]["prompt_ids"] == expected and row["generated_ids"] == []
        response = row["real_ids"]
        assert shown[pair_id]["real_ids"] == response
        policy, wise = (logps_at(model, prompt, response) for prompt in (row["prompt_ids"], expected))
        top = wise.topk(7)
        assert teacher[pair_id]["top_ids"] == top.indices.flatten().tolist()
        mine = policy.gather(-1, top.indices)
        coarse, against = (torch.cat([p.exp(), 1 - p.exp().sum(-1, keepdim=True)], -1) for p in (mine, top.values))
        total += (coarse * (coarse / against).log()).sum().item()
        tokens += len(response)
    log = read_json_lines(run.storage, "iter_000/train_log.jsonl")
    assert log[0]["loss"] == pytest.approx(total / tokens, rel=1e-3)
    assert len(log) == 2 and log[1]["loss"] < log[0]["loss"]
    planned = [
        learning_rate_at(step, peak=1e-3, total_steps=4, warmup_fraction=0.1, schedule="linear") for step in range(2)
    ]
    assert [line["lr"] for line in log] == pytest.approx(planned), "two of four planned epochs"
    assert run.latest() == "iter_000"

    before = committed(tmp_path / "run")
    for lost in ("model/_MANIFEST.json", "teacher/_MANIFEST.json"):  # as if the workers had died while they scored
        run.storage.delete(f"iter_000/{lost}")
    run.storage.delete("iter_000/model")
    small_run.run(config, tmp_path / "run")
    assert committed(tmp_path / "run") == before


def test_sdft_plays_prompts_of_some_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of twelve prompts, which are stored two a part."""
    run, _ = run_with(
        tmp_path, monkeypatch,
        {"algorithm": "sdft", "generation": {"shard_rows": 2}, "train": {"global_batch_pairs": 1, "pack_length": 512},
         "model": {"max_length": 256}, "data": {"max_quarantine_fraction": 0.5, "prompts_per_iteration": 3}},
    )  # fmt: skip
    assert len(run.prompts.part_names()) == ROWS // 2
    assert run.teacher_rows(0).manifest().rows == run.pairs(0).manifest().rows == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"algorithm": "sdft", "sdft": {"demonstration": "{prompt} {response} " + 999 * "so "}}, "sdft.demonstration"),
        ({"algorithm": "seft", "reviser": {}, "model": {"max_length": 40}}, "algorithm seft"),
    ],
    ids=["sdft", "seft"],
)
def test_prompts_that_leave_no_room_for_a_response_are_told_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    """They were found after all sampling, SEFT's after its reviser was trained."""
    with pytest.raises(DataError, match=rf"{told}: the prompts that it makes of \d+ short rows have \d+ tokens and"):
        run_with(tmp_path, monkeypatch, {"data": {"max_quarantine_fraction": 0.5}, **changes})
    assert not RunDir(Storage(tmp_path / "run")).generations(0).part_names()


def logps_at(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits.double().log_softmax(-1)[len(prompt) - 1 : -1]


def test_what_a_demonstration_shows_stays_as_it_is() -> None:
    """Braces in messages are no places; the user's last message is replaced, whatever comes after it."""
    talk = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "old"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "is {response} a place?"}, {"role": "assistant", "content": "no"},
    ]  # fmt: skip
    shown = demonstrated(talk, "no, {prompt} is", "{prompt}|{response}")
    assert shown == [*talk[:3], {"role": "user", "content": "is {response} a place?|no, {prompt} is"}]
    assert demonstrated(talk[:1] + talk[-1:], "no", "{prompt}{response}") is None


def test_t_spin_sets_each_answer_above_the_first_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 0 of iteration 1, all pairs in one step: the mean of ℓ(log p(y) − log p(y')) + 0.1 ℓ(log p(y') − log p(y_0))
    by transformers alone. Iteration 0 has the first term only.
    """
    run, _ = run_with(
        tmp_path, monkeypatch,
        {"algorithm": "tspin", "iterations": 2, "objective": {"beta": 1.0}, "train": {"global_batch_pairs": 12}},
    )  # fmt: skip
    first = {row["prompt_id"]: row["token_ids"] for row in rows_of(run.generations(0))}
    assert "initial_ids" not in rows_of(run.pairs(0))[0]
    rows = rows_of(run.pairs(1))
    assert [row["initial_ids"] for row in rows] == [first[row["prompt_id"]] for row in rows]
    assert any(row["initial_ids"] != row["generated_ids"] for row in rows)
    for iteration, folder in ((0, tmp_path / "model"), (1, tmp_path / "run/iter_000/model")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses = []
        for row in rows_of(run.pairs(iteration)):
            names = ["real_ids", "generated_ids", *(["initial_ids"] if iteration else [])]
            logps = [logp_alone(model, row["prompt_ids"], row[name]) for name in names]
            losses.append(functional.softplus(logps[1] - logps[0]))
            if iteration:
                losses[-1] = losses[-1] + 0.1 * functional.softplus(logps[2] - logps[1])
        log = read_json_lines(run.storage, f"iter_{iteration:03d}/train_log.jsonl")
        assert log[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        assert not run.reference(iteration).is_committed, "it has no reference"


def released(number: int, answer: str) -> dict[str, Any]:
    """A row as the authors of SPIN released theirs: two lists of messages with the same prompt."""
    asked = {"role": "user", "content": f"{number} + 1 = ?"}
    texts = {"real": str(number + 1), "generated": answer}
    return {name: [asked, {"role": "assistant", "content": text}] for name, text in texts.items()}


def test_spin_is_trained_on_the_pairs_that_its_authors_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is generated to train on; the ids are apply_chat_template's; the loss of step 0 is SPIN's."""
    path = tmp_path / "released.parquet"
    pq.write_table(pa.Table.from_pylist([released(number, f"it is {number}") for number in range(ROWS)]), path)
    run, _ = run_with(
        tmp_path, monkeypatch,
        {"algorithm": "dpo", "data": {"train": str(path)}, "objective": {"loss": "space"},
         "health": {"max_margin": 99}},
    )  # fmt: skip
    _, tokenizer = model_of(tmp_path)
    rows = rows_of(run.pairs(0))
    assert len(rows) == ROWS and not run.generations(0).is_committed
    asked = {row["prompt_id"]: json.loads(row["messages"])[0]["content"] for row in rows_of(run.prompts)}
    for row in rows:
        number = int(asked[row["prompt_id"]].split()[0])
        for ids, name in ((row["real_ids"], "real"), (row["generated_ids"], "generated")):
            whole = tokenizer.apply_chat_template(released(number, f"it is {number}")[name], return_dict=False)
            assert row["prompt_ids"] + ids == whole[: len(row["prompt_ids"] + ids)]
            assert ids[-1] == tokenizer.eos_token_id
    log = read_json_lines(run.storage, "iter_000/train_log.jsonl")
    assert (log[0]["margin"], log[0]["loss"]) == (0.0, pytest.approx(2 * 0.693147, abs=1e-5))
    evaluation = run.evaluation(1)
    assert evaluation is not None and evaluation["beta"] == 1.0
    assert 0 < evaluation["against_opponent"]["objective"] != evaluation["against_opponent"]["loss"]


class CopyOfDpo(Dpo):
    """An algorithm of whose rows ``config.algorithms`` knows nothing."""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": "dpo"}, "no_rejected: has no rejected response"),
        ({"algorithm": f"{__name__}:CopyOfDpo"}, "12 rows have no rejected response"),
        ({"algorithm": "sppo", "scorer": {"kind": "grade", "path": "multiple_choice"},
          "generation": {"samples_per_prompt": 2}}, "no row has an answer that scorer.path multiple_choice can grade"),
        ({"evaluation": {"grade": "multiple_choice"}}, "has an answer that evaluation.grade multiple_choice can"),
    ],
)  # fmt: skip
def test_rows_that_lack_what_the_algorithm_needs_end_the_run_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(driver, "check_on_workers", lambda *_: None)
    with pytest.raises(DataError, match=said):
        run_with(tmp_path, monkeypatch, changes)
    run = RunDir(Storage(tmp_path / "run"))
    assert not any(made.is_committed for made in (run.model(0), run.heldout_samples(0), run.generations(0)))


@pytest.mark.parametrize(
    ("place", "setting", "changes"),
    [
        ("heldout", "evaluation.grade", {"evaluation": {"grade": "regex"}}),
        ("train", "scorer.path", {"algorithm": "sppo", "scorer": {"kind": "grade", "path": "regex"},
                                  "generation": {"samples_per_prompt": 2}}),
        ("questions", "self_filter.grade", {"algorithm": "self_reinforcement", "sft": {},
                                            "self_filter": {"grade": "regex"}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bad", [3, 80])
def test_an_answer_that_is_no_pattern_ends_the_run_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, setting: str, changes: dict[str, Any], bad: int
) -> None:
    """Row 3 is among the first rows that the start reads, row 80 is not."""
    monkeypatch.setattr(driver, "check_on_workers", lambda *_: None)
    rows = [{"prompt": f"{n} + 3 = ?", "response": str(n + 3), "answer": f"{n}+"} for n in range(81)]
    rows[bad]["answer"] = "f("
    (tmp_path / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = rf"{bad + 1}: answer" if bad == 3 else rf"the row that asks '{bad} \+ 3 = \?': answer"
    with pytest.raises(DataError, match=rf"{said} 'f\(' is no pattern .*, and {setting} is regex; mend the pattern"):
        run_with(tmp_path, monkeypatch, changes | {"data": {place: str(tmp_path / "graded.jsonl")}})
    run = RunDir(Storage(tmp_path / "run"))
    assert not run.model(0).is_committed and not run.generations(0).is_committed
