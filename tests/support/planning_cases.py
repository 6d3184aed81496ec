"""Recipes, models and rows for tests of planning."""

from dataclasses import replace

from spin_ray.config.load import load_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh, OptimizerConfig
from spin_ray.loop.algorithms.table import find_algorithm
from spin_ray.planning.cluster import Devices
from spin_ray.planning.groups import Ranks
from spin_ray.planning.hardware import GPUS, Hardware
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.work import Packs, Work, epoch_packs
from tests.support.fakes import config_of
from tests.support.paths import RECIPES

ZEPHYR = load_config(RECIPES / "zephyr_7b.yaml")
SPIN = find_algorithm("spin")
A100 = GPUS["A100-80G"]
PAPER_WORK = Work(rows=50_000, prompt=130, real=256, generated=256, heldout_rows=500)
TINY = ModelShape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocab=10)
"""A layer multiplies 8·(2·8 + 2·4 + 3·16) = 576 weights and has 16 more in norms; 10·8·2 + 8 = 168 are outside."""
LLAMA_70B = ModelShape(
    layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256
)  # fmt: skip
ONE_PACK = Packs(steps=1, per_step=2, per_rank=1, length=3, targets=2, per_rank_at_most=1, tokens=6)
TWO_PACKS = replace(ONE_PACK, per_rank=2, per_rank_at_most=2)
FULL_PACKS = replace(TWO_PACKS, length=4096, targets=4096, tokens=8192)
"""Packs of ``ZEPHYR.train.pack_length`` response tokens."""
MISTRAL = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
"""The config.json of Mistral-7B."""
RMSPROP, ADAMW = OptimizerConfig(), OptimizerConfig(name="adamw")


def tiny_config(**train: object) -> SpinConfig:
    return config_of(
        model={"path": "m", "max_length": 2},
        generation={"sampling": {"max_tokens": 1}},
        train={"pack_length": 3, "global_batch_pairs": 1, "precision": "bf16", **train},
    )


def devices(gpu: Hardware, config: SpinConfig = ZEPHYR) -> Devices:
    return Devices(generation=gpu.share(config.generation.resources), train=gpu.share(config.train.resources))


def flat(config: SpinConfig) -> Ranks:
    """Returns the mesh that shards over all workers, on one node."""
    return Ranks(mesh=Mesh(shard=config.train.workers), per_node=config.train.workers)


def pair_packs(config: SpinConfig, work: Work, iteration: int) -> Packs:
    """Returns the packs of SPIN's epoch."""
    return epoch_packs(config, SPIN.costs(config, work, iteration).trained, config.train.workers)
