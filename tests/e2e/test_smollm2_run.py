"""What a run leaves on disk, checked against independent tools: sha256, transformers, vLLM."""

import hashlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import GENERATION_SCHEMA, PAIR_SCHEMA, PROMPT_SCHEMA, REFERENCE_SCHEMA
from spin_ray.run_dir.storage import Storage, table_from_bytes
from tests.support.paths import ROOT
from tests.support.program import spin_ray

pytestmark = pytest.mark.e2e

BF16_NATS_PER_TOKEN = 0.05
"""Tolerance of a bf16 score against fp32, per response token (docs/how-it-works.md, "What is exact")."""


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_layout_is_the_documented_one(smollm2_run: Path) -> None:
    run = RunDir(Storage(smollm2_run))
    for artefact, schema in [
        (run.prompts, PROMPT_SCHEMA), (run.heldout, PROMPT_SCHEMA), (run.generations(0), GENERATION_SCHEMA),
        (run.heldout_samples(2), GENERATION_SCHEMA), (run.pairs(1), PAIR_SCHEMA), (run.reference(1), REFERENCE_SCHEMA),
    ]:  # fmt: skip
        for table in artefact.tables():
            assert table.schema.equals(schema), artefact.path
    assert {"config", "inputs", "start_model", "versions"} <= json.loads((smollm2_run / "run.json").read_text()).keys()
    assert (smollm2_run / "LATEST").read_text() == "iter_001\n"
    assert not list((smollm2_run / "iter_001").glob("checkpoints"))


def test_every_manifest_agrees_with_sha256(smollm2_run: Path) -> None:
    manifests = list(smollm2_run.rglob("_MANIFEST.json"))
    assert len(manifests) >= 12
    for path in manifests:
        for name, entry in json.loads(path.read_text())["files"].items():
            data = (path.parent / name).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["bytes"]), (
                path.parent / name
            )


def test_step_0_of_each_iteration_is_ln_2(smollm2_run: Path) -> None:
    """Policy = reference, same kernels and packs: every margin is exactly 0, in bf16 too."""
    for iteration in ("iter_000", "iter_001"):
        first = read_log(smollm2_run / iteration / "train_log.jsonl")[0]
        assert first["step"] == 0
        assert first["margin"] == 0.0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_reference_scores_agree_with_plain_transformers(smollm2_run: Path) -> None:
    """Random rows of reference/, recomputed in fp32, one unpacked sequence at a time, by the model that played."""
    from transformers import AutoModelForCausalLM

    run = RunDir(Storage(smollm2_run))
    model = AutoModelForCausalLM.from_pretrained(smollm2_run / "iter_000" / "model", dtype=torch.float32).eval()
    pairs = {row["pair_id"]: row for table in run.pairs(1).tables() for row in table.to_pylist()}
    scores = [row for table in run.reference(1).tables() for row in table.to_pylist()]
    assert len(scores) == len(pairs) == 16
    for score in random.Random(0).sample(scores, 10):
        pair = pairs[score["pair_id"]]
        for side in ("real", "generated"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            start = len(pair["prompt_ids"])
            with torch.no_grad():
                logps = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            expected = logps.gather(1, ids[0, start:, None]).sum().item()
            tolerance = BF16_NATS_PER_TOKEN * len(pair[f"{side}_ids"])
            assert score[f"{side}_logp"] == pytest.approx(expected, abs=tolerance), pair["pair_id"]


def test_truncated_responses_carry_no_end_of_turn(smollm2_run: Path) -> None:
    rows = [row for table in RunDir(Storage(smollm2_run)).generations(0).tables() for row in table.to_pylist()]
    for row in rows:
        assert (row["token_ids"][-1] == 2) == (row["finish_reason"] == "stop")
        assert 2 not in row["token_ids"][:-1]
        assert len(row["token_ids"]) <= 24


def test_each_iteration_plays_a_fresh_slice_and_keeps_the_window(smollm2_run: Path) -> None:
    run = RunDir(Storage(smollm2_run))
    played = [
        pa.concat_tables(list(run.generations(iteration).tables()))["prompt_id"].to_pylist() for iteration in (0, 1)
    ]
    assert len(played[0]) == len(played[1]) == 8
    assert not set(played[0]) & set(played[1])
    opponents = pa.concat_tables(list(run.pairs(1).tables()))["iteration"].to_pylist()
    assert sorted(opponents) == [0] * 8 + [1] * 8


def test_an_evaluation_counts_the_tokens_that_its_models_read(smollm2_run: Path) -> None:
    """Both models of the margins read prompt and y once, beside the answers of both; θ_0 has those of one."""
    run = RunDir(Storage(smollm2_run))
    rows = pa.concat_tables(list(run.heldout.tables())).to_pylist()
    own, earlier = (
        {row["prompt_id"]: row["token_ids"] for table in run.heldout_samples(t).tables() for row in table.to_pylist()}
        for t in (2, 1)
    )
    read = 0
    for row in rows:
        prompt, name = len(row["prompt_ids"]), row["prompt_id"]
        both = {tuple(row["real_ids"]), tuple(own[name]), tuple(earlier[name])}
        read += 2 * (prompt + sum(map(len, both))) + prompt + len(row["real_ids"]) + len(own[name])
    (commit,) = (it for it in run.events() if it["event"] == "commit" and it["stage"] == "iter_001/evaluation")
    assert commit["tokens"] == read


def test_evaluations_hold_what_the_readme_names(smollm2_run: Path) -> None:
    first = json.loads((smollm2_run / "sft" / "eval.json").read_text())
    last = json.loads((smollm2_run / "iter_001" / "eval.json").read_text())
    assert first["rows"] == last["rows"] == 8
    assert {"generated_length", "real_length", "truncation_rate", "identical_share", "length_auc"} <= first.keys()
    assert {"against_opponent", "against_self", "jsd_lower_bound", "real_logp_drift"} <= last.keys()
    assert last["jsd_lower_bound"] == pytest.approx((math.log(2) - last["against_opponent"]["loss"]) / 2)


def test_every_iterate_loads_in_vllm_and_scores_like_the_trainer(smollm2_run: Path) -> None:
    """vLLM's log-probs of the prompt+response agree with the stored reference within bf16 (a process of its own)."""
    checked = subprocess.run(
        [sys.executable, "-m", "tests.support.vllm_parity", str(smollm2_run)], cwd=ROOT,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr[-3000:]


def test_the_engine_is_audited_before_each_training(smollm2_run: Path) -> None:
    """Its own log p of 16 responses, or of all if there are fewer, beside the trainer's."""
    run = RunDir(Storage(smollm2_run))
    trained = [event for event in read_log(smollm2_run / "events.jsonl") if "engine_difference" in event]
    assert [event["folder"] for event in trained] == ["iter_000", "iter_001"]
    assert all(event["engine_difference"] <= BF16_NATS_PER_TOKEN for event in trained)
    for iteration in (0, 1):
        audited = table_from_bytes(run.storage.read(run.audit_path(iteration)))
        assert audited.num_rows == min(16, run.generations(iteration).manifest().rows)


def test_the_same_command_again_only_says_so(smollm2_run: Path) -> None:
    recipe = smollm2_run.parent / "recipe.yaml"
    before = {path: path.stat().st_mtime_ns for path in smollm2_run.rglob("part-*")}
    again = spin_ray("run", recipe, "--out", smollm2_run, timeout_s=120)
    assert again.returncode == 0, again.stderr
    assert "nothing left to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in smollm2_run.rglob("part-*")} == before


def test_another_recipe_in_the_same_folder_is_refused(
    smollm2_run: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, refused = call("run", smollm2_run.parent / "recipe.yaml", "--out", smollm2_run, "--seed=1")
    assert code == 2
    assert "seed (was 0, now 1)" in refused
