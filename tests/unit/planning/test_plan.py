"""Inputs of a plan, and the command: its tables, its refusals, and its advice taken word for word."""

import json
from typing import Any

import pytest

from spin_ray.config.load import load_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import DataError
from spin_ray.planning.cluster import Cluster, gpus_of_a_node, name_of_gpu, nodes_of
from spin_ray.planning.plan import Given, read_shape, read_work
from spin_ray.planning.remedies import remedies
from tests.support.fakes import config_of
from tests.support.paths import RECIPES
from tests.support.planning_cases import LLAMA_70B, MISTRAL, PAPER_WORK, SPIN, ZEPHYR

# Inputs


def test_shape_and_lengths_are_read_from_a_recipe_on_this_machine():
    config = load_config(RECIPES / "smoke.yaml")
    shape, work = read_shape(config), read_work(config, Given())
    assert (shape.layers, shape.hidden, shape.vocab, shape.tied) == (2, 128, 384, True)
    assert (work.rows, work.heldout_rows) == (128, 32)
    assert 5 < work.prompt < 60 and 3 < work.generated <= work.real < 30


def test_what_the_command_line_says_goes_before_the_data():
    config = load_config(RECIPES / "smoke.yaml")
    work = read_work(config, Given(rows=7, prompt_tokens=11, response_tokens=100))
    assert (work.rows, work.prompt, work.real, work.generated) == (7, 11, 100, config.generation.sampling.max_tokens)


def test_lengths_of_data_elsewhere_must_be_given():
    with pytest.raises(DataError, match=r"hf://.*give --response-tokens$"):
        read_work(ZEPHYR, Given(prompt_tokens=130))


# The command


@pytest.fixture
def call(call, monkeypatch):
    """Calls ``spin-ray plan zephyr_7b.yaml`` with the paper's lengths; returns exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def call_plan(*words: str, recipe: str = "zephyr_7b") -> tuple[int, str, str]:
        lengths = ["--prompt-tokens", "130", "--response-tokens", "256"] if recipe == "zephyr_7b" else []
        return call("plan", RECIPES / f"{recipe}.yaml", *lengths, *words)

    return call_plan


def refused(found: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    code, out, error = found
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.strip()


def test_the_plan_of_the_papers_recipe_has_every_stage_and_the_published_times(call):
    code, out, error = call("--gpu", "A100-80G")
    assert (code, error) == (0, "")
    for text in ("generation", "scoring", "training", "iter_002 to iter_003", "Total: ", "4.32", "Why: ", "14.5 GB"):
        assert text in out


def test_another_experiment_is_not_compared_with_the_paper(call):
    assert "4.32" not in call("--gpu", "H100-80G")[1]


@pytest.mark.slow
def test_a_recipe_for_this_machine_needs_no_options(call):
    code, out, error = call(recipe="smoke")
    assert (code, error) == (0, "")
    assert "sft" in out and "last iterate" in out


ONE_CARD = (
    "--gpus-per-node=1", "--train.workers=1", "--generation.replicas=1", "--train.pack_length=2304",
    "--train.gradient_checkpointing=true", "--generation.engine.max_num_seqs=64",
)  # fmt: skip


@pytest.mark.parametrize(("base", "weights"), [("bf16", 14.7), ("int8", 7.7), ("nf4", 4.3)])
def test_7b_with_adapters_fits_a_card_of_24_gb(call, base, weights):
    """Frozen: 7.24B at 2 bytes; or 6.98B in linear layers at 1 or 0.516 and the rest at 2. Adapters: 42M at 4."""
    code, out, error = call(
        "--gpu", "RTX4090", *ONE_CARD, f"--train.lora={{rank: 16, base: {base}, merge: false}}", "--json"
    )
    assert (code, error) == (0, "")
    training = json.loads(out)["phases"][0]["stages"][-1]
    assert training["memory"]["weights"] / 1e9 == pytest.approx(weights, abs=0.05)
    assert sum(training["memory"].values()) < 0.9 * 24e9


def test_layers_to_adapt_have_the_names_of_many_families(call):
    lora = "--train.lora={{merge: false, target_modules: [{}]}}"
    assert call("--gpu", "RTX4090", *ONE_CARD, lora.format("qkv_proj, gate_up_proj"))[0] == 0
    assert "does not know the widths of Wx; " in refused(call("--gpu", "RTX4090", lora.format("q_proj, Wx")))


def test_7b_without_adapters_does_not_fit_a_card_of_24_gb(call):
    assert "does not fit on RTX-4090: needs" in refused(call("--gpu", "RTX4090", *ONE_CARD))


@pytest.mark.parametrize(
    ("given", "found"),
    [("H100", "H100-80G"), ("rtx-5090", "RTX-5090"), ("A100", "A100"), ("A10", "A10"), ("RTX 3090", "RTX-3090")],
)
def test_a_card_is_named_as_people_write_it_unless_that_is_two(given, found):
    assert name_of_gpu(given) == found


def test_the_word_none_is_no_card():
    assert Cluster(gpu="none") == Cluster()


@pytest.mark.parametrize(
    ("replicas", "gpus", "workers", "each"),
    [(1, 1, 1, 1), (1, 0.5, 1, 1), (4, 0.7, 1, 4), (10, 0.1, 1, 1), (1, 4, 2, 4), (2, 1, 16, 8), (1, 16, 4, 8)],
)
def test_a_machine_has_the_gpus_that_the_recipe_asks_for_unless_that_is_more_than_eight(replicas, gpus, workers, each):
    generation = {"replicas": replicas, "resources": {"gpus": gpus}, "engine": {"gpu_memory_utilization": 0.09}}
    if gpus > 1:
        generation["engine"] = {"tensor_parallel_size": min(gpus, 8), "pipeline_parallel_size": max(1, gpus // 8)}
    config = config_of(generation=generation, train={"workers": workers, "resources": {"gpus": 1}})
    assert gpus_of_a_node(config) == each


def test_no_card_is_advised_that_one_machine_of_a_recipe_for_one_card_lacks(call):
    """Where a second card would do, it is a second machine's."""
    words = [word for word in ONE_CARD if not word.startswith("--gpus-per-node")]
    advice = refused(call("--gpu", "RTX4090", *words))
    assert "--train.workers=" not in advice or "--nodes=" in advice
    assert call("--gpu", "RTX4090", *words, "--train.lora={rank: 16, merge: false}")[0] == 0


def engines(replicas: int, gpus: float, tensor: int = 1, filled: float = 0.9) -> SpinConfig:
    engine = {"tensor_parallel_size": tensor, "gpu_memory_utilization": filled}
    generation = {"resources": {"gpus": gpus}, "replicas": replicas, "engine": engine}
    return config_of(generation=generation, train={"precision": "bf16"})


def test_an_engine_with_a_part_of_a_gpu_has_it_of_a_single_one():
    """Three of 0.3 and one of 0.7 fill a GPU, as Ray places them."""
    for replicas, gpus, nodes in [(24, 0.3, 1), (25, 0.3, 2), (8, 0.7, 1), (9, 0.7, 2), (80, 0.1, 1)]:
        assert nodes_of(engines(replicas, gpus, filled=0.09), 8)["generation"] == nodes


@pytest.mark.parametrize(("given", "wider"), [(engines(8, 2, tensor=2), 4), (engines(32, 0.5, filled=0.45), 8)])
def test_wider_engines_are_advised_for_all_gpus_that_the_recipe_has(given, wider):
    """16 GPUs; two of them have no room for 141 GB of weights."""
    cluster = Cluster(nodes=2, gpu="A100-80G")
    advised = remedies(given, LLAMA_70B, cluster, PAPER_WORK, "generation", SPIN)[0]
    assert f"tensor_parallel_size={wider} " in advised and advised.endswith(f"replicas={16 // wider}")


def test_an_engine_over_nodes_needs_whole_tensor_groups_on_them():
    """Nodes of 8: an engine of 2 · 8 has two; of 2 · 4 one; three engines of 5 have three, as no two share a node."""
    for tensor, pipeline, replicas, nodes in [(8, 2, 1, 2), (4, 2, 1, 1), (5, 1, 3, 3)]:
        engine = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        generation = {"engine": engine, "resources": {"gpus": tensor * pipeline}, "replicas": replicas}
        assert nodes_of(config_of(generation=generation), 8)["generation"] == nodes


UNSPLIT = "--train.mesh={shard: 8}"
"""Mesh without tensor groups, which ``auto`` makes where a layer and a pack do not fit."""
WHOLE = "--train.reduce_every_pack=false"
"""Option by which each worker keeps whole gradients."""


def test_a_plan_computes_activations_again_only_where_they_would_not_fit(call):
    for gpu in ("A100-80G", "A100-40G"):
        assert call("--gpu", gpu)[0] == 0
    assert "29.5 activations" in call("--gpu", "A100-80G")[1]
    assert "29.5 activations" not in call("--gpu", "A100-40G")[1]


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (["--gpu", "A100-40G", WHOLE, UNSPLIT], "training"),
        (["--gpu", "L4", WHOLE], "training"),
        (["--gpu", "L4", "--train.sharding=shard_grad_op", "--train.pack_length=8192", UNSPLIT], "scoring"),
        (["--gpu", "L4", "--generation.engine.dtype=float32"], "generation"),
        (["--gpu", "A100-40G", "--train.gradient_checkpointing=false", UNSPLIT], "training"),
        (
            [
                "--gpu",
                "A100-40G",
                "--train.gradient_checkpointing=false",
                "--train.sharding=shard_grad_op",
                WHOLE,
                UNSPLIT,
            ],
            "training",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_settings_under_which_the_stage_fits(call, words, stage):
    """The advice is taken word for word: generation fits, or every stage of the train workers."""
    line = refused(call(*words))
    assert line.startswith(f"error: {stage} does not fit on {words[1]}: needs ")
    for remedy in cures(line):
        code, out, error = call(*words, *remedy.split())
        assert (code == 0 and stage in out) or (stage == "generation" and not error.startswith("error: generation "))


def cures(refusal: str) -> list[str]:
    advice = refusal.partition("it would fit with ")[2]
    assert advice
    return advice.split(" or with ")


QUANTISED, OFFLOADED = "--train.lora.base=nf4 --train.lora.merge=false", "--train.offload=true"


@pytest.mark.parametrize(
    ("vocab", "words", "stage", "advised"),
    [
        (128256, ["--train.lora={rank: 16}", "--train.pack_length=4096"], "scoring", {QUANTISED, OFFLOADED}),
        (32000, ["--train.lora={rank: 16, base: nf4, merge: false}", "--sft={}"], "sft training", {OFFLOADED}),
        (32000, [], "scoring", {OFFLOADED}),
        (128256, [], "scoring", set()),
    ],
)
def test_cures_of_one_card_are_those_that_init_would_take(call, tmp_path, vocab, words, stage, advised):
    """Llama 3.1 8B and a 7B on 24 GB; the warm-up trains all weights.

    Offloaded, all weights of the 8B take 27 GB: 16 to compute with, 8 to sum the gradients of embedding and head.
    """
    sizes = MISTRAL | {"model_type": "llama", "vocab_size": vocab, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    given = ("--gpu", "RTX4090", *ONE_CARD, f"--model.path={tmp_path}", "--rows", "1000", *words)
    line = refused(call(*given))
    assert line.startswith(f"error: {stage} does not fit on RTX-4090")
    assert advised <= set(cures(line)) and (OFFLOADED in advised or OFFLOADED not in cures(line))
    for remedy in cures(line):
        assert call(*given, *remedy.split())[0] == 0, remedy


def test_a_mixture_whose_quantised_base_no_card_loads_fits_as_it_is_stored(call, tmp_path):
    """Mixtral: 91 GB on each of eight cards while loading, or an eighth of 93 GB."""
    sizes = MISTRAL | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    engine = ("--generation.engine.tensor_parallel_size=4", "--generation.resources.gpus=4", "--generation.replicas=2")
    lora = "--train.lora={rank: 16, base: nf4, merge: false}"
    line = refused(call("--gpu", "A100-40G", f"--model.path={tmp_path}", "--rows", "1000", *engine, lora))
    assert line.startswith("error: scoring does not fit on A100-40G: needs 93.4 GB (91.4 whole base while loading,")
    assert "--train.lora.base=bf16" in cures(line)


def test_a_model_that_no_setting_makes_fit_is_refused_without_advice(call, tmp_path):
    """A layer of 2^17 · (4 + 3·4) · 2^17 weights: no sharding over 16 times as many GPUs holds two."""
    sizes: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 2**17}
    sizes |= {"intermediate_size": 2**19, "num_attention_heads": 1024}
    (tmp_path / "config.json").write_text(str(sizes | {"vocab_size": 32000}).replace("'", '"'))
    line = refused(call("--gpu", "L4", f"--model.path={tmp_path}", "--rows", "100"))
    assert line.endswith("no setting tried makes it fit")


def test_the_first_stage_that_does_not_fit_is_told_first(call, tmp_path):
    """70B of weights fill eight cards of 24 GB; training it whole takes more of each, whatever the prompts."""
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    words = ("--gpu", "RTX-4090", "--nodes=8", "--rows", "100", f"--model.path={tmp_path}", "--train.workers=64")
    assert refused(call(*words)).startswith("error: generation does not fit on RTX-4090: needs 14")
    engine = ("--generation.engine.tensor_parallel_size=8", "--generation.resources.gpus=8")
    assert refused(call(*words, *engine)).startswith("error: training: a prompt with its responses, up to ")


PHI_4: dict[str, Any] = {
    "model_type": "phi3", "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 17920,
    "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352,
}  # fmt: skip


def test_engines_are_split_over_the_gpus_that_vllm_takes(call, tmp_path):
    """Ten heads of keys and values are on 2 GPUs or on 5, never on 4 or 8."""
    (tmp_path / "config.json").write_text(json.dumps(PHI_4))
    words = ("--gpu", "RTX-4090", "--rows", "100", f"--model.path={tmp_path}", "--train.lora={rank: 8}")
    advice = refused(call(*words)).partition("generation does not fit")[2]
    assert "tensor_parallel_size=2" in advice
    assert not {"tensor_parallel_size=4", "tensor_parallel_size=8"} & set(
        advice.replace("--generation.engine.", "").split()
    )
    engine = (f"--generation.{name}" for name in ("engine.tensor_parallel_size=4", "resources.gpus=4", "replicas=2"))
    assert "neither 4 nor the model's 10 key and value heads divides the other, as vLLM needs; give 1, 2, 5" in refused(
        call(*words, *engine)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--gpu: the recipe asks for GPUs; give one of A100-80G"),
        (["--gpu", "B17"], "--gpu B17: unknown; give one of A100-80G"),
        (["--gpu", "L4", "--gpus-per-node", "4"], "generation asks for 8 GPUs, the cluster has 1 × 4; give --nodes=2"),
        (
            [
                "--gpu",
                "L4",
                "--gpus-per-node",
                "1",
                "--generation.resources.gpus=2",
                "--generation.engine.tensor_parallel_size=2",
            ],
            "generation.resources.gpus: one engine asks for 2 GPUs, a node has 1",
        ),
        (["--gpu", "L4", "--algorithm=seft", "--reviser={}"], "algorithm: plan does not know what seft costs"),
        (
            ["--gpu", "L4", "--model.path=who/knows"],
            "model.path who/knows: is not on this machine, and plan asks no hub; `hf download who/knows --rev",
        ),
    ],
)
def test_what_is_missing_is_one_line(call, words, message):
    assert message in refused(call(*words))


def test_a_gpu_for_a_recipe_that_asks_for_none_is_one_line(call):
    assert "the recipe asks for no GPU; also give --generation.resources.gpus=1" in refused(
        call("--gpu", "L4", recipe="smoke")
    )


def test_the_plan_as_json_has_the_seconds_and_bytes_of_the_tables(call):
    code, out, _ = call("--gpu", "A100-80G", "--json")
    found = json.loads(out)
    assert code == 0 and found["seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"]))
    stages = {stage["name"]: stage for phase in found["phases"] for stage in phase["stages"]}
    assert {"generation", "scoring", "training"} <= stages.keys()
    assert all(sum(stage["memory"].values()) <= stage["room"] for stage in stages.values())


LORA = "--train.lora={{rank: 16, base: {}, merge: false}}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # 12 bytes of 7.24B weights on each of 8 workers, of a single one, with AdamW's 16; 14 with ZeRO-3
        (["--gpus-per-node=8"], ["10.9 GB each and 87 GB per node"]),
        (ONE_CARD, ["loads the whole model in fp32, 29.0 GB", "86.9 GB each and 87 GB per node"]),
        (["--train.optimizer={name: adamw}"], ["14.5 GB each and 116 GB per node"]),
        (["--train.backend=deepspeed", "--train.compile=false"], ["12.7 GB each and 101 GB per node"]),
        # 42M in adapters: 12 bytes and 2 of the frozen rest; the warm-up trains all weights
        ([LORA.format("bf16")], ["1.9 GB each and 15 GB per node"]),
        ([LORA.format("nf4"), *ONE_CARD], ["1.0 GB each and 1 GB per node"]),
        ([LORA.format("bf16"), "--sft={}"], ["14.5 GB each and 116 GB per node"]),
    ],
)
def test_the_memory_of_a_node_that_offloading_takes_is_said(call, words, expected):
    code, out, error = call("--gpu", "A100-80G", "--train.offload=true", *words, "--json")
    assert (code, error) == (0, "")
    said = [note for note in json.loads(out)["notes"] if note.startswith("Host memory: ")]
    assert all(any(each in note for note in said) for each in expected)


def test_offloaded_gradients_of_several_packs_are_a_note(call):
    """64 pairs a step on one card fill packs of 4,096 tokens, and adapters have few gradients."""
    for words, said in (([], True), (["--train.pack_length=200000"], False), ([LORA.format("bf16")], False)):
        _, out, error = call("--gpu", "H200", "--train.offload=true", *ONE_CARD, *words, "--json")
        assert not error, words
        assert any("29.0 GB of gradients are copied" in note for note in json.loads(out)["notes"]) is said


def test_only_a_run_that_writes_whole_models_gathers_them(call):
    """Adapters are written alone; the warm-up's model is whole."""
    gathers = "the first train worker gathers the model to write it, 14.5 GB"
    for words, said in (([], True), ([LORA.format("bf16")], False), ([LORA.format("bf16"), "--sft={}"], True)):
        _, out, _ = call("--gpu", "H200", *words, "--json")
        assert (gathers in out) is said


def test_held_out_rows_are_those_that_a_run_makes_of_conversations(tmp_path):
    """Ten conversations of four turns are forty rows; a row without a response is none."""
    turns = [{"role": role, "content": f"{turn}"} for turn in range(4) for role in ("user", "assistant")]
    rows = [*({"messages": [{"role": "user", "content": f"{n}"}, *turns[1:]]} for n in range(10)), {"prompt": "q"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = Given(rows=100, prompt_tokens=10, response_tokens=10)
    for choice, count in (("all", 40), ("last", 10)):
        data = {"train": "d", "heldout": str(tmp_path / "rows.jsonl"), "turns": choice}
        assert read_work(config_of(data=data), given).heldout_rows == count
        part = {"train": data["heldout"], "heldout_fraction": 0.5, "turns": choice}
        assert read_work(config_of(data=part), given).heldout_rows == count / 2
    assert read_work(config_of(data=data, evaluation={"max_rows": 3}), given).heldout_rows == 3


def test_an_array_has_its_rows_whatever_the_file_is_called(tmp_path):
    rows = [{"prompt": f"{number} + 1", "response": "r"} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows))
    config = load_config(RECIPES / "smoke.yaml", {"data.train": str(tmp_path / "rows.jsonl")})
    assert read_work(config, Given()).rows == 30


def test_an_estimate_of_usable_rows_refuses_no_source(tmp_path):
    """Of 600 rows one of the first 256 is bad, by which 598 would be usable; 599 are."""
    rows = [*({"prompt": f"{number} + 1", "response": "r"} for number in range(599)), {"prompt": "q"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    train = [{"path": str(tmp_path / "rows.jsonl"), "rows": 599}]
    config = load_config(RECIPES / "smoke.yaml", {"data.train": train, "data.max_rows": None})
    assert read_work(config, Given()).rows == 599
