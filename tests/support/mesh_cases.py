"""Four gloo processes that train tiny models on one mesh after another."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spin_ray.config.sections import LoraConfig, Mesh, OptimizerConfig
from spin_ray.errors import ModelError
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.backends.meshes import check_split, make_mesh
from spin_ray.learner.hf_folder import load_model
from spin_ray.learner.step import Objective, PackShape, ReferenceScores, score_rows, train_step
from tests.support.learner_cases import PACK_LENGTH, VOCAB, one_step, random_rows, table_of, tiny_llama
from tests.support.ranks import run_ranks

RANKS, STEPS = 4, 2
ROWS = random_rows(0, trees=8)
"""Three packs: with four data ranks one rank has only padding, with two ranks one has two packs."""
MESHES = {
    "4 × FSDP": Mesh(shard=4),
    "2 × 2 hybrid": Mesh(replicate=2, shard=2),
    "2 × 2 FSDP × tensor": Mesh(shard=2, tensor=2),
    "2 × 2 copies × tensor": Mesh(replicate=2, tensor=2),
}
CASES = (
    *(("llama", mesh, "") for mesh in MESHES),
    ("llama", "2 × 2 hybrid", "every pack, adamw"),
    ("llama", "2 × 2 FSDP × tensor", "adamw"),
    ("qwen2", "2 × 2 FSDP × tensor", "padded"),
    ("gemma3", "2 × 2 FSDP × tensor", "recomputed"),
    ("phi3", "2 × 2 FSDP × tensor", "offload, shard_grad_op"),
    ("llama", "2 × 2 hybrid", "adapters, adamw"),
)
"""Model, mesh, and unusual settings."""
RESUMED = (
    ("2 × 2 FSDP × tensor", "2 × 2 hybrid", ""),
    ("2 × 2 hybrid", "2 × 2 FSDP × tensor", ""),
    ("2 × 2 hybrid", "4 × FSDP", "adapters, adamw"),
)
"""Meshes that wrote a checkpoint, meshes that resume from it, and unusual settings."""


def save_models(directory: Path) -> None:
    """Writes models with two key heads for four heads: Llama, Qwen2 (biases), Gemma (norms of heads), Phi (fused)."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    tiny_llama().save_pretrained(directory / "llama")
    torch.manual_seed(1)
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for layer in qwen2.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).bias, std=0.2)
    qwen2.save_pretrained(directory / "qwen2")
    kinds = ["sliding_attention", "full_attention"]
    gemma3 = Gemma3TextConfig(**sizes, head_dim=8, sliding_window=6, layer_types=kinds, query_pre_attn_scalar=8)
    Gemma3ForCausalLM(gemma3).save_pretrained(directory / "gemma3")
    Phi3ForCausalLM(Phi3Config(**sizes, eos_token_id=1)).save_pretrained(directory / "phi3")


def make_backend(directory: Path, model: str, mesh: Mesh | None, more: str = "") -> Fsdp2Backend:
    settings = BackendSettings(
        max_length=PACK_LENGTH,
        precision="fp32",
        attention="padded" if "padded" in more else "packed",
        gradient_checkpointing="recomputed" in more,
        sharding="shard_grad_op" if "shard_grad_op" in more else "full",
        offload="offload" in more,
        reduce_every_pack="every pack" in more,
        mesh=mesh,
        lora=LoraConfig(rank=4) if "adapters" in more else None,
        optimizer=OptimizerConfig(name="adamw" if "adamw" in more else "rmsprop", eps=1e-4),
        learning_rate=0.01,
        total_steps=STEPS + 1,
    )
    return Fsdp2Backend(directory / model, settings, torch.device("cpu"))


def shape_on(mesh: Mesh | None) -> PackShape:
    return PackShape(pack_length=PACK_LENGTH, global_batch_pairs=len(ROWS), pad_id=0, tensor=mesh.tensor if mesh else 1)


def train(backend: Fsdp2Backend, mesh: Mesh | None, steps: int) -> list[dict[str, float]]:
    reference = ReferenceScores(real=torch.zeros(len(ROWS)), generated=torch.zeros(len(ROWS)))
    objective = Objective(loss="logistic", beta=0.5, sft_weight=0.1)
    given = (one_step(ROWS), table_of(ROWS), shape_on(mesh), objective, reference)
    return [train_step(backend, *given) for _ in range(steps)]


def file_of(directory: Path, *case: str) -> Path:
    return directory / " ".join(case).replace("×", "x")


def _one_of_four(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), RANKS), rank=rank, world_size=RANKS)
    for case in CASES:
        model, mesh = case[0], MESHES[case[1]]
        backend, place = make_backend(directory, model, mesh, case[2]), file_of(directory, *case)
        scored = score_rows(backend, [one_step(ROWS)], table_of(ROWS), shape_on(mesh))
        history = train(backend, mesh, STEPS)
        backend.save(Path(f"{place} checkpoint"))
        backend.export_hf(Path(f"{place} export"))
        whole = [part.to_local() for part in backend._shards.values() if part.device_mesh.ndim < 2]
        told = {"history": history, "scored": scored, "writes": shape_on(mesh).writes()}
        told |= {"plain": [part.flatten().tolist() for part in whole]}
        Path(f"{place} {rank}.json").write_text(json.dumps(told))
    for before, after, more in RESUMED:
        backend = make_backend(directory, "llama", MESHES[after], more)
        backend.load(Path(f"{file_of(directory, 'llama', before, more)} checkpoint"))
        history = train(backend, MESHES[after], 1)
        Path(f"{file_of(directory, before, after, more)} {rank}.json").write_text(json.dumps(history))
    broken = load_model(directory / "llama", trust_remote_code=False)
    styles = {"q_proj": "colwise", "k_proj": "colwise_rep", "v_proj": "colwise_rep", "o_proj": "rowwise"}
    broken.config.base_model_tp_plan = {f"layers.*.self_attn.{name}": style for name, style in styles.items()}
    try:
        check_split(broken, make_mesh(Mesh(shard=2, tensor=2), torch.device("cpu")), torch.device("cpu"))
    except ModelError as error:
        (directory / f"refused {rank}").write_text(str(error))
    dist.destroy_process_group()


def run_four(directory: Path) -> None:
    """Writes metrics, scores, checkpoints and exports of every case to ``directory``."""
    save_models(directory)
    run_ranks(_one_of_four, (directory,), RANKS)
