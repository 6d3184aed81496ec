"""The table of sizes in docs/cluster.md: hours and memory that ``spin-ray plan`` predicts for the paper's data.

Nothing is run; a model that is too large for its nodes would raise here:

    python benchmarks/sizing_table.py [--write]
"""

import argparse
import json
import tempfile
from pathlib import Path

from doc_table import put

from spin_ray.config.sections import load_config
from spin_ray.planning.cluster import Cluster
from spin_ray.planning.hardware import GB
from spin_ray.planning.plan import Given, check_memory, read_shape, read_work

RECIPE = Path(__file__).resolve().parents[1] / "jobs" / "recipes" / "zephyr_7b.yaml"
LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip


def for_70b(gpus: int) -> dict[str, str]:
    """Engines of four GPUs, one train worker per GPU, gradients never whole."""
    return {
        "generation.engine.tensor_parallel_size": "4", "generation.resources.gpus": "4",
        "generation.replicas": str(gpus // 4), "train.workers": str(gpus), "train.reduce_every_pack": "true",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/cluster.md")
    options = parser.parse_args()
    lines = ["| model | nodes | settings | hours | fullest GPU, GB | in which stage |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_70B))
        for model, nodes, gpu, changes in [
            ("7B", 1, "A100-80G", {}),
            ("7B", 1, "H100-80G", {}),
            ("7B", 2, "H100-80G", {"train.workers": "16", "generation.replicas": "16"}),
            ("70B", 4, "H100-80G", for_70b(32)),
            ("70B", 8, "H100-80G", for_70b(64)),
        ]:
            config = load_config(RECIPE, changes | ({"model.path": folder} if model == "70B" else {}))
            cluster = Cluster(nodes=nodes, gpu=gpu, gpus_per_node=8)
            work = read_work(config, Given(rows=50000, prompt_tokens=130, response_tokens=256))
            phases = check_memory(config, read_shape(config), cluster, work)
            hours = sum(phase.seconds for phase in phases) / 3600
            fullest = max((stage for phase in phases for stage in phase.stages), key=lambda stage: stage.needed)
            settings = " ".join(f"`--{key}={value}`" for key, value in changes.items()) or "as it is"
            lines.append(
                f"| {model} | {nodes} × 8 {gpu} | {settings} | {hours:.1f} | {fullest.needed / GB:.0f} "
                f"| {fullest.name} |"
            )
    print("\n".join(lines))
    if options.write:
        put("sizes", "\n".join(lines))


if __name__ == "__main__":
    main()
