"""A whole run whose iterations commit adapters alone; PEFT says what they mean."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import find_inputs
from spin_ray.loop.launch import run_spin
from spin_ray.loop.stages.training import worker
from spin_ray.report.export import export
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.fakes import rows_of
from tests.support.learner_cases import one_rank

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SpinConfig, RunDir]]:
    folder = tmp_path_factory.mktemp("adapters")
    with one_rank(folder), pytest.MonkeyPatch.context() as patch:
        small_run.in_this_process(patch)
        config = recipe(folder)
        small_run.run(config, folder / "run")
        yield config, RunDir(Storage(folder / "run"))


def recipe(folder: Path) -> SpinConfig:
    values = small_run.make_inputs(folder).model_dump()
    train = values["train"] | {"lora": {"rank": 2, "alpha": 4, "merge": False}, "learning_rate": 0.05, "epochs": 1}
    return SpinConfig.model_validate(values | {"iterations": 2, "train": train})


def adapted(run: RunDir, config: SpinConfig, iteration: int):
    start = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(start, run.storage.path(f"iter_00{iteration}/adapter")).eval()


def test_an_iteration_commits_an_adapter_alone_that_peft_loads(finished) -> None:
    config, run = finished
    for iteration in (0, 1):
        folder = run.storage.path(f"iter_00{iteration}/adapter")
        assert not run.storage.path(f"iter_00{iteration}/model").exists()
        assert run.model(iteration + 1).path == f"iter_00{iteration}/adapter"
        stored = json.loads((folder / "adapter_config.json").read_text())
        assert (stored["r"], stored["lora_alpha"], stored["base_model_name_or_path"]) == (2, 4, config.model.path)
        assert sum(map(torch.Tensor.numel, load_file(folder / "adapter_model.safetensors").values())) < 1000
        assert AutoTokenizer.from_pretrained(folder).chat_template
    logits = [adapted(run, config, iteration)(IDS).logits for iteration in (0, 1)]
    start = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)(IDS).logits
    assert (logits[0] - start).abs().max() > 1e-3 and (logits[1] - logits[0]).abs().max() > 1e-3
    # transformers itself finds the frozen model by the name in the folder
    whole = AutoModelForCausalLM.from_pretrained(run.storage.path("iter_001/adapter"), dtype=torch.float32)
    torch.testing.assert_close(whole(IDS).logits, logits[1])


def test_the_reference_is_the_last_adapter_on_the_frozen_model(finished) -> None:
    """Margins start at 0 to the bit, and the stored scores of iteration 1 are PEFT's of ``iter_000/adapter``."""
    config, run = finished
    for iteration in (0, 1):
        assert read_json_lines(run.storage, f"iter_00{iteration}/train_log.jsonl")[0]["margin"] == 0.0
    pairs = {row["pair_id"]: row for table in run.pairs(1).tables() for row in table.to_pylist()}
    scores = rows_of(run.reference(1))
    model = adapted(run, config, 0)
    assert len(scores) == len(pairs) > 0
    for score in scores[:4]:
        pair = pairs[score["pair_id"]]
        ids = torch.tensor([pair["prompt_ids"] + pair["real_ids"]])
        logps = model(ids).logits.log_softmax(-1)[0, len(pair["prompt_ids"]) - 1 : -1]
        expected = logps.gather(1, torch.tensor(pair["real_ids"])[:, None]).sum().item()
        assert score["real_logp"] == pytest.approx(expected, abs=1e-3)


def test_held_out_rows_are_scored_under_the_adapter(finished) -> None:
    """The held-out margin of θ_1 against θ_0 is not 0, as it would be if the adapter were left out."""
    _, run = finished
    first = run.evaluation(1)
    assert first is not None and abs(first["against_opponent"]["margin"]) > 1e-4


def test_an_adapter_is_exported_merged_as_peft_merges_it(finished, tmp_path: Path) -> None:
    config, run = finished
    export(run, "latest", str(tmp_path / "out"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    torch.testing.assert_close(exported(IDS).logits, adapted(run, config, 1)(IDS).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_the_result_of_a_run_of_adapters_becomes_a_model(finished, monkeypatch, tmp_path: Path) -> None:
    """``result.model`` is the adapter alone, which `vllm serve` does not take."""
    config, run = finished
    small_run.in_this_process(monkeypatch)
    result = run_spin(config, run.storage.root)
    assert result.model == run.storage.path("iter_001/adapter")
    exported = AutoModelForCausalLM.from_pretrained(result.export(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    torch.testing.assert_close(exported(IDS).logits, adapted(run, config, 1)(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_committed_adapter_is_a_start_model_of_another_run(finished, monkeypatch, tmp_path: Path) -> None:
    config, run = finished
    monkeypatch.setenv("SPIN_RAY_CACHE", str(tmp_path))
    path = str(run.storage.path("iter_001/adapter"))
    found = find_inputs(config.model_copy(update={"model": config.model.model_copy(update={"path": path})}))
    start = AutoModelForCausalLM.from_pretrained(found.model.path)
    torch.testing.assert_close(start(IDS).logits, adapted(run, config, 1)(IDS).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(found.model.path).chat_template


def test_a_killed_training_goes_on_at_its_checkpoint_to_the_same_adapter(finished, monkeypatch, tmp_path: Path) -> None:
    config, run = finished
    shutil.copytree(run.storage.root, tmp_path / "run")
    for name in ("iter_001", "LATEST"):
        target = tmp_path / "run" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    take_step, taken = worker.train_step, []

    def dies_at_the_last(*given):
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return take_step(*given)

    small_run.in_this_process(monkeypatch)
    longer = config.with_train(checkpoint_every_steps=1)
    monkeypatch.setattr(worker, "train_step", dies_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        small_run.run(longer, tmp_path / "run")
    small_run.run(longer, tmp_path / "run")
    found = load_file(tmp_path / "run/iter_001/adapter/adapter_model.safetensors")
    expected = load_file(run.storage.path("iter_001/adapter/adapter_model.safetensors"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
