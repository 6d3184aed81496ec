"""Model folders as people have them, from the start check to scores: ids and log-probabilities are transformers'."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import check_recipe
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import open_renderer
from spin_ray.learner.hf_folder import load_model
from spin_ray.learner.layout import choose_layout
from spin_ray.learner.losses import pair_logps
from spin_ray.learner.packing import build_pack
from tests.support.learner_cases import logp_alone, table_of

TINY = Path(resolve("embedded:tiny-llama"))
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]
OTHER = "It may be 6."
Change = Callable[[Path], Path | str]


def recipe(path: Path | str) -> SpinConfig:
    data = {"train": "embedded:arithmetic-train", "heldout": None}
    return SpinConfig.model_validate(
        {"model": {"path": str(path), "max_length": 96}, "data": data, "train": {"global_batch_pairs": 1},
         "generation": {"sampling": {"max_tokens": 24}}}
    )  # fmt: skip


def our_scores(config: SpinConfig) -> tuple[list[int], list[list[int]], Tensor]:
    """Returns prompt ids, response ids and log-probabilities of both answers, by the way that a run takes."""
    start = check_recipe(config)
    renderer = open_renderer(str(start.model.path), config.model)
    first, second = renderer.render_all([MESSAGES, [MESSAGES[0], {"role": "assistant", "content": OTHER}]], [None] * 2)
    rows = [(first.prompt_ids, first.real_ids, second.real_ids)]
    model = load_model(start.model.path, trust_remote_code=False)
    batch = build_pack(((0,),), table_of(rows), pack_length=128, pad_id=start.model.pad_id)
    scorer = choose_layout(model, "auto", max_length=config.model.max_length).scorer(model)
    with torch.no_grad():
        return first.prompt_ids, [first.real_ids, second.real_ids], torch.cat([*pair_logps(scorer(batch), batch)])


def assert_as_transformers(config: SpinConfig, folder: Path) -> None:
    prompt, responses, found = our_scores(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for response, answer in zip(responses, (MESSAGES[1]["content"], OTHER), strict=True):
        whole = tokenizer.apply_chat_template([MESSAGES[0], {"role": "assistant", "content": answer}])["input_ids"]
        assert prompt + response == whole[: len(prompt) + len(response)]
        assert len(whole) - len(prompt) - len(response) <= 1  # the line break after the turn's end
    expected = torch.stack([logp_alone(model, prompt, response) for response in responses])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def change_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def saved(folder: Path, change: Callable[[Any], object] = lambda model: None, **options: Any) -> Path:
    """Saves the changed model once more; returns the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.pop("dtype", torch.float32))
    change(model)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **options)
    return folder


def of_a_trainer(folder: Path) -> Path:
    """A TRL output folder: files that nothing opens, and a checkpoint of other weights."""
    of_a_checkpoint(folder)
    for name in ("training_args.bin", "optimizer.pt", "README.md", "runs/today/events.out.tfevents"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def of_a_checkpoint(folder: Path) -> Path:
    """Returns a checkpoint beside the final model; its weights are others."""
    checkpoint = folder / "checkpoint-20"
    shutil.copytree(folder, checkpoint)
    saved(checkpoint, lambda model: model.model.embed_tokens.weight.data.neg_())
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"):
        (checkpoint / name).write_bytes(b"{}")
    return checkpoint


def untied(folder: Path) -> Path:
    def change(model: Any) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))

    return saved(folder, change)


def without_generation_config(folder: Path) -> Path:
    (folder / "generation_config.json").unlink(missing_ok=True)
    change_json(folder / "config.json", eos_token_id=..., bos_token_id=..., pad_token_id=...)
    return folder


def pad_is_eos(folder: Path) -> Path:
    eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    change_json(folder / "tokenizer_config.json", pad_token=eos)
    change_json(folder / "config.json", pad_token_id=json.loads((folder / "config.json").read_text())["eos_token_id"])
    return folder


def no_bos(folder: Path) -> Path:
    change_json(folder / "tokenizer_config.json", bos_token=None, add_bos_token=False)
    change_json(folder / "config.json", bos_token_id=None)
    return folder


FOLDERS: dict[str, Change] = {
    "as it is": lambda folder: folder,
    "of a trainer": of_a_trainer,
    "a checkpoint of a trainer": of_a_checkpoint,
    "sharded": lambda folder: saved(folder, max_shard_size="50KB"),
    "bf16": lambda folder: saved(folder, dtype=torch.bfloat16),
    "fp16": lambda folder: saved(folder, dtype=torch.float16),
    "untied": untied,
    "a vocabulary padded beyond the tokenizer's": lambda folder: saved(
        folder, lambda model: model.resize_token_embeddings(pad_to_multiple_of=256)
    ),
    "no generation_config": without_generation_config,
    "pad is eos": pad_is_eos,
    "no bos": no_bos,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "model")
    path = Path(FOLDERS[name](folder))
    assert_as_transformers(recipe(path), path)


def test_the_final_model_is_not_mixed_with_its_checkpoints(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "model")
    alone = our_scores(recipe(folder))[2]
    checkpoint = of_a_checkpoint(folder)
    assert torch.equal(our_scores(recipe(folder))[2], alone)
    assert not torch.allclose(our_scores(recipe(checkpoint))[2], alone, atol=0.1)


def test_a_model_is_the_same_by_each_way_to_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(TINY, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    found = [check_recipe(recipe(path)).model for path in (folder, "model", "./model", "~/model", "owner/name@v1")]
    assert {(model.path, model.digest) for model in found} == {(folder, found[0].digest)}
