"""What a run costs: counts by hand on a tiny decoder, known models, packs as they are really packed, the paper's times,
and what the command says.
"""

from dataclasses import replace
from math import ceil, log

import numpy as np
import pytest

from spin_ray.config.load import load_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig, ResourcesConfig
from spin_ray.errors import DataError, ModelError
from spin_ray.learner import scoring
from spin_ray.learner import step as loop
from spin_ray.learner.packing import PairLengths, plan_epoch
from spin_ray.planning.cost_model import (
    CHUNK_TARGETS,
    LENGTHS_OF_A_PACK,
    PUBLISHED_H,
    RUNTIME,
    WORKERS_START_S,
    Devices,
    Packs,
    Work,
    generation_cost,
    learner_memory,
    pack_flops,
    packs_of,
    pair_packs,
    paper_way_hours,
    plan_run,
    step_traffic,
    training_cost,
)
from spin_ray.planning.hardware import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY, CPU, GIB, GPUS, Hardware
from spin_ray.planning.model_shape import KNOWN_SHAPES, MISTRAL_7B, ModelShape
from spin_ray.planning.plan import Given, read_shape, read_work
from tests.support.fakes import config_of
from tests.support.paths import RECIPES

ZEPHYR = load_config(RECIPES / "zephyr_7b.yaml")
A100 = GPUS["A100-80G"]
PAPER_WORK = Work(rows=50_000, prompt=130, real=256, generated=256, heldout_rows=500)
TINY = ModelShape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocab=10)
"""A layer multiplies 8·(2·8 + 2·4 + 3·16) = 576 weights and has 16 more in norms; 10·8·2 + 8 = 168 are outside."""
ONE_PACK = Packs(steps=1, per_step=2, per_rank=1, length=3, targets=2, per_rank_at_most=1, tokens=6)
TWO_PACKS = replace(ONE_PACK, per_rank=2, per_rank_at_most=2)
RMSPROP, ADAMW = OptimizerConfig(), OptimizerConfig(name="adamw")


def tiny_config(**train: object) -> SpinConfig:
    """Packs of 3 tokens."""
    return config_of(
        model={"path": "m", "max_length": 2},
        generation={"sampling": {"max_tokens": 1}},
        train={"pack_length": 3, "global_batch_pairs": 1, **train},
    )


def devices(gpu: Hardware, config: SpinConfig = ZEPHYR) -> Devices:
    return Devices(generation=gpu.share(config.generation.resources), train=gpu.share(config.train.resources))


def changed(config: SpinConfig, **train: object) -> SpinConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


# Parameters and FLOPs, by hand


def test_parameters_of_the_tiny_decoder_by_hand():
    """2·(576 + 16) + 168 = 1352."""
    assert (TINY.layer_matmuls, TINY.layer, TINY.root, TINY.parameters) == (576, 592, 168, 1352)
    assert replace(TINY, tied=True).parameters == 1352 - 80


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (MISTRAL_7B, 7_241_732_096),
        (replace(MISTRAL_7B, vocab=128_256), 8_030_261_248),  # Llama 3.1 8B
        (
            ModelShape(
                layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True
            ),
            134_515_008,  # SmolLM2-135M
        ),
    ],
)
def test_parameters_are_those_that_published_models_have(shape, parameters):
    assert shape.parameters == parameters


def test_flops_of_a_pack_by_hand():
    """Below the head 2 layers · (2·576·3 tokens + 4·8·3² pairs) = 7488; the head 2·8·10·2 targets = 320.

    Backward doubles the forward pass, checkpointing repeats it, and the head is always computed again.
    """
    plain, repeated = tiny_config(), tiny_config(gradient_checkpointing=True)
    assert pack_flops(plain, TINY, 3, 2, backward=False) == 7488 + 320
    assert pack_flops(plain, TINY, 3, 2, backward=True) == 3 * 7488 + 4 * 320
    assert pack_flops(repeated, TINY, 3, 2, backward=True) == 4 * 7488 + 4 * 320
    assert pack_flops(repeated, TINY, 3, 2, backward=False) == 7488 + 320


def test_a_large_model_costs_about_6_flops_per_parameter_and_token():
    """6N is the usual estimate (arXiv 2001.08361); attention adds some, embeddings are not multiplied."""
    tokens = ZEPHYR.train.pack_length
    flops = pack_flops(changed(ZEPHYR, gradient_checkpointing=False), MISTRAL_7B, tokens, tokens, backward=True)
    assert flops / (6 * MISTRAL_7B.parameters * tokens) == pytest.approx(1.0, abs=0.2)


def test_traffic_of_a_step_by_hand():
    """1352 parameters, half of them elsewhere. In full: 2 packs · 2 passes · 2 bytes; else once; gradients 4 bytes."""
    full, once = tiny_config(workers=2), tiny_config(workers=2, sharding="shard_grad_op")
    assert step_traffic(full, TINY, 2, backward=True) == 1352 / 2 * (2 * 2 * 2 + 4)
    assert step_traffic(once, TINY, 2, backward=True) == 1352 / 2 * (2 + 4)
    assert step_traffic(full, TINY, 2, backward=False) == 1352 / 2 * 2 * 2
    assert step_traffic(tiny_config(), TINY, 2, backward=True) == 0


# Memory, by hand


def test_memory_of_a_train_worker_by_hand():
    """Half of 1352 parameters at 4 bytes each is 2704.

    Gathered: 168 + 2·592 in bf16, two fp32 buffers of 592. Activations of a layer, 3 tokens:
    2·8·8 (norms) + 4·8·2 (attention) + 4·16·2 (feed-forward) = 320 bytes a token; then 2 targets · 8 · 2, a mask of
    3² · 3 and 256 · 10 logits three times in fp32.
    """
    rest = 2 * 8 * 2 + 9 * 3 + 256 * 10 * 12
    expected = {
        "weights": 2704, "optimizer": 2704, "gradients": 2704, "whole gradients": 5408,
        "gathered weights": 2 * (168 + 2 * 592) + 2 * 4 * 592, "activations": 2 * 3 * 320 + rest, "runtime": RUNTIME,
    }  # fmt: skip
    config = tiny_config(workers=2)
    assert learner_memory(config, TINY, TWO_PACKS, optimizer=RMSPROP, backward=True) == expected
    checkpointed = tiny_config(workers=2, gradient_checkpointing=True)
    kept = learner_memory(checkpointed, TINY, TWO_PACKS, optimizer=RMSPROP, backward=True)["activations"]
    assert kept == 2 * 3 * 8 * 2 + 3 * 320 + rest


def test_states_are_12_bytes_per_parameter_with_rmsprop_and_16_with_adamw():
    for optimizer, size in [(RMSPROP, 12), (ADAMW, 16)]:
        memory = learner_memory(tiny_config(), TINY, ONE_PACK, optimizer=optimizer, backward=True)
        assert sum(memory[name] for name in ("weights", "gradients", "optimizer")) == size * 1352


def test_a_rank_with_one_pack_a_step_keeps_no_whole_gradients():
    assert "whole gradients" not in learner_memory(tiny_config(), TINY, ONE_PACK, optimizer=RMSPROP, backward=True)


def test_evaluation_holds_neither_gradients_nor_optimizer():
    memory = learner_memory(tiny_config(), TINY, TWO_PACKS, optimizer=None, backward=False)
    assert memory.keys() == {"weights", "gathered weights", "activations", "runtime"}


def test_gradients_reduced_with_every_pack_are_never_whole():
    config = tiny_config(reduce_every_pack=True)
    assert "whole gradients" not in learner_memory(config, TINY, TWO_PACKS, optimizer=RMSPROP, backward=True)


def test_shard_grad_op_holds_a_whole_copy_of_the_weights():
    config = changed(ZEPHYR, sharding="shard_grad_op")
    full, once = (
        learner_memory(c, MISTRAL_7B, TWO_PACKS, optimizer=RMSPROP, backward=True)["gathered weights"]
        for c in (ZEPHYR, config)
    )
    assert once - full == 2 * 30 * MISTRAL_7B.layer, "two of 32 layers are there anyway"


# Generation, by hand


def generation_config(**generation: object) -> SpinConfig:
    return config_of(
        model={"path": "m", "max_length": 20},
        generation={
            "sampling": {"max_tokens": 10}, "shard_rows": 8, "resources": {"gpus": 1},
            "engine": {"max_num_seqs": 4, "enforce_eager": True}, **generation,
        },
    )  # fmt: skip


SLOW_MEMORY = Hardware(name="x", bf16=1e30, fp32=1e30, memory=2 * RUNTIME, bandwidth=1e3, link=1.0)
SLOW_COMPUTE = replace(SLOW_MEMORY, bf16=1e3, bandwidth=1e30)
WORK = Work(rows=16, prompt=6, real=8, generated=8)


def test_decoding_bound_by_memory_by_hand():
    """16 responses are 2 shards of 8, 4 at a time, of 8 tokens: 32 steps, and 2 · (10 − 8) with one response alone.

    A step reads 2·1352 bytes of weights and 4 · (6 + 4) tokens' keys and values of 2·2·1·4·2 = 32 bytes.
    """
    config = generation_config()
    cost = generation_cost(config, TINY, SLOW_MEMORY, WORK, (16,))
    read = 32 * (2704 + 4 * 10 * 32) + 4 * 2704
    assert cost.seconds == pytest.approx(25 + read / (1e3 * BANDWIDTH_EFFICIENCY))
    assert cost.bound == "decoding: memory bandwidth"
    assert cost.memory == {"weights": 2704, "KV cache": 4 * 14 * 32, "runtime": RUNTIME}
    assert cost.room == pytest.approx(0.9 * 2 * RUNTIME)


def test_decoding_bound_by_compute_by_hand():
    """A prompt: 2·(2·576·6 + 4·8·18) + 160 FLOPs; a token after 10 others: 2·(2·576 + 4·8·10) + 160."""
    cost = generation_cost(generation_config(), TINY, SLOW_COMPUTE, WORK, (16,))
    prompt, token = 2 * (1152 * 6 + 32 * 18) + 160, 2 * (1152 + 320) + 160
    assert cost.flops == 16 * (prompt + 8 * token)
    assert cost.seconds == pytest.approx(25 + cost.flops / (1e3 * COMPUTE_EFFICIENCY))
    assert cost.bound == "decoding: compute"


def test_replicas_share_whole_shards():
    """Three shards on two engines take as long as four."""
    seconds = [
        generation_cost(generation_config(replicas=2), TINY, SLOW_MEMORY, WORK, (rows,)).seconds for rows in (24, 32)
    ]
    assert seconds[0] == seconds[1]


def test_a_full_cache_holds_fewer_responses_and_takes_longer():
    """Room for 2 responses of 14 tokens instead of 4: twice the steps."""
    small = replace(SLOW_MEMORY, memory=(RUNTIME + 2704 + 2 * 14 * 32 + 1) / 0.9)
    wide, narrow = (generation_cost(generation_config(), TINY, device, WORK, (16,)) for device in (SLOW_MEMORY, small))
    assert narrow.fits and narrow.seconds > wide.seconds


def test_an_engine_must_have_room_for_one_response_of_full_length():
    """20 tokens · 32 bytes beside weights and runtime."""
    enough = (RUNTIME + 2704 + 20 * 32) / 0.9
    for memory, fits in [(enough + 1, True), (enough - 1, False)]:
        assert generation_cost(generation_config(), TINY, replace(SLOW_MEMORY, memory=memory), WORK, (16,)).fits is fits


def test_a_cpu_cache_too_small_for_one_response_does_not_fit():
    """Mistral's keys and values take 131,072 bytes a token: 1 GiB holds 8192."""
    for length, fits in [(8192, True), (8193, False)]:
        config = config_of(
            model={"path": "m", "max_length": length},
            generation={"engine": {"cpu_kv_cache_gib": 1}},
            train={"pack_length": 16384},
        )
        device = replace(CPU, memory=100 * GIB).share(ResourcesConfig(cpus=2))
        assert generation_cost(config, MISTRAL_7B, device, WORK, (16,)).fits is fits


def test_tensor_parallel_engines_hold_a_part_each():
    half = generation_config(engine={"tensor_parallel_size": 2}, resources={"gpus": 2})
    whole, part = (generation_cost(c, MISTRAL_7B, A100, WORK, (16,)).memory for c in (generation_config(), half))
    assert part["weights"] == whole["weights"] / 2


# Packs


@pytest.mark.parametrize(
    ("tokens", "sigma", "pack_length", "batch"),
    [(640, 0.6, 4096, 64), (900, 0.3, 4096, 64), (90, 0.6, 256, 16), (110, 0.3, 512, 24), (300, 0.5, 512, 16)],
)
def test_packs_are_predicted_as_plan_epoch_makes_them(tokens, sigma, pack_length, batch):
    """Log-normal lengths; the mean number of packs of a step and their length, of one and of 4 ranks, within 15 %."""
    rng = np.random.default_rng(0)
    columns = [
        np.ceil(rng.lognormal(log(share * tokens) - sigma**2 / 2, sigma, 80 * batch)).astype(int)
        for share in (0.3, 0.4, 0.3)
    ]
    kept = sum(columns) <= pack_length
    prompt, real, generated = (column[kept] for column in columns)
    lengths = PairLengths(prompt=prompt, real=real, generated=generated, tree_key=np.arange(len(prompt)))
    for ranks in (1, 4):
        shape = {"pack_length": pack_length, "global_batch_pairs": batch}
        steps = plan_epoch(lengths, **shape, seed=0, epoch=0, ranks=ranks)[:-1]
        predicted = packs_of(
            len(steps) * batch, float((prompt + real + generated).mean()), 0,
            steps=len(steps), pack_length=pack_length, workers=ranks,
        )  # fmt: skip
        found = np.array([len(step.packs) for step in steps])
        assert predicted.per_step == pytest.approx(found.mean(), rel=0.15)
        assert predicted.per_rank == pytest.approx(np.ceil(found / ranks).mean(), rel=0.15)
        assert predicted.per_rank_at_most >= ceil(np.quantile(found, 0.99) / ranks)
        multiple = pack_length // LENGTHS_OF_A_PACK
        built = [
            ceil(sum((prompt + real + generated)[row] for tree in pack for row in tree) / multiple) * multiple
            for step in steps
            for pack in step.packs
        ]
        assert predicted.length == pytest.approx(np.mean(built), rel=0.15)


def test_numbers_of_the_learner_that_are_repeated_here():
    assert (CHUNK_TARGETS, LENGTHS_OF_A_PACK) == (scoring.TARGETS_PER_CHUNK, loop.LENGTHS_OF_A_PACK)


def test_two_opponents_of_one_prompt_share_its_tree():
    """Iteration 1 has twice the pairs of iteration 0, in the trees of the same prompts with one more y' each."""
    first, second = (pair_packs(ZEPHYR, PAPER_WORK, iteration) for iteration in (0, 1))
    assert (first.tokens, second.tokens) == (50_000 * 642, 50_000 * 898)
    assert (first.steps, second.steps) == (782, 1563)


def test_slices_of_the_prompts_share_no_trees():
    config = ZEPHYR.model_copy(update={"data": ZEPHYR.data.model_copy(update={"prompts_per_iteration": 10_000})})
    assert [pair_packs(config, PAPER_WORK, iteration).tokens for iteration in (0, 1)] == [642e4, 2 * 642e4]


# Monotonicity


def hours(config: SpinConfig = ZEPHYR, gpu: Hardware = A100, work: Work = PAPER_WORK) -> float:
    return sum(phase.seconds for phase in plan_run(config, MISTRAL_7B, devices(gpu, config), work)) / 3600


@pytest.mark.parametrize("field", ["rows", "prompt", "real", "generated", "heldout_rows"])
def test_more_of_anything_takes_longer(field):
    more = replace(PAPER_WORK, **{field: getattr(PAPER_WORK, field) * 2})
    assert hours(work=more) > hours()


def test_faster_hardware_takes_less_time():
    assert hours(gpu=GPUS["H100-80G"]) < hours() < hours(gpu=GPUS["L4"])


def test_checkpointing_costs_time_and_saves_memory():
    cheap, dear = (
        training_cost(c, MISTRAL_7B, A100, pair_packs(c, PAPER_WORK, 0), 2, RMSPROP)
        for c in (ZEPHYR, changed(ZEPHYR, gradient_checkpointing=False))
    )
    assert cheap.seconds > dear.seconds and cheap.needed < dear.needed


def test_an_epoch_more_costs_its_steps_and_no_second_start_of_the_workers():
    """One start and e epochs: 2·cost(2 epochs) - cost(4 epochs) is the start."""
    config = tiny_config()
    one, two, four = (training_cost(config, TINY, A100, ONE_PACK, epochs, RMSPROP).seconds for epochs in (1, 2, 4))
    assert 2 * two - four == pytest.approx(WORKERS_START_S)
    assert one > WORKERS_START_S


def test_more_workers_need_less_memory_and_time():
    costs = []
    for workers in (8, 16, 32):
        config = changed(ZEPHYR, workers=workers)
        costs.append(training_cost(config, MISTRAL_7B, A100, pair_packs(config, PAPER_WORK, 0), 2, RMSPROP))
    assert [c.needed for c in costs] == sorted((c.needed for c in costs), reverse=True)
    assert costs[0].seconds > costs[1].seconds >= costs[2].seconds


def test_a_slow_link_makes_gathering_the_bound_and_shard_grad_op_the_cure():
    slow = replace(A100, link=1e9)
    times = {}
    for sharding in ("full", "shard_grad_op"):
        config = changed(ZEPHYR, sharding=sharding)
        cost = training_cost(config, MISTRAL_7B, slow, pair_packs(config, PAPER_WORK, 0), 2, RMSPROP)
        assert cost.bound == "gathering weights"
        times[sharding] = cost.seconds
    assert times["shard_grad_op"] < times["full"]


# The paper


def test_the_papers_times_lie_in_the_stated_band():
    """Their way of training is predicted to within a factor 1.5; padding and lengths are assumptions. Generation is
    a lower bound (weights read once a step), which their host-bound code exceeds by less than 5.
    """
    predicted = paper_way_hours(MISTRAL_7B, A100, PAPER_WORK, 256)
    generation, *training = [PUBLISHED_H[name] / predicted[name] for name in PUBLISHED_H]
    assert all(1 / 1.5 < ratio < 1.5 for ratio in training)
    assert 1 < generation < 5


def test_the_zephyr_recipe_is_a_known_shape():
    assert KNOWN_SHAPES[ZEPHYR.model.path] == MISTRAL_7B


# What is read


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


@pytest.mark.parametrize(
    ("config", "message"),
    [({"hidden_size": 8}, "has no num_hidden_layers"), ({"num_local_experts": 8}, "mixture of experts")],
)
def test_a_model_that_the_formulas_do_not_describe_is_refused(config, message):
    whole = dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"), 8
    )
    with pytest.raises(ModelError, match=message):
        ModelShape.from_config(config if "hidden_size" in config else whole | config, "m/config.json")


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
    for text in ("generation", "scoring", "training", "iter_001 to iter_003", "Total: ", "4.32", "Why: ", "14.5 GB"):
        assert text in out


def test_another_experiment_is_not_compared_with_the_paper(call):
    assert "4.32" not in call("--gpu", "H100-80G")[1]


def test_a_recipe_for_this_machine_needs_no_options(call):
    code, out, error = call(recipe="smoke")
    assert (code, error) == (0, "")
    assert "sft" in out and "last iterate" in out


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (["--gpu", "A100-40G"], "training"),
        (["--gpu", "L4"], "training"),
        (["--gpu", "L4", "--train.sharding=shard_grad_op", "--train.pack_length=8192"], "scoring"),
        (["--gpu", "L4", "--generation.engine.dtype=float32"], "generation"),
        (["--gpu", "A100-40G", "--train.gradient_checkpointing=false", "--train.sharding=shard_grad_op"], "training"),
    ],
)
def test_what_cannot_fit_is_refused_with_settings_under_which_the_stage_fits(call, words, stage):
    """The advice is taken word for word: the stage is then refused no more."""
    line = refused(call(*words))
    assert line.startswith(f"error: {stage} does not fit on {words[1]}: needs ")
    advice = line.partition("it would fit with ")[2]
    assert advice
    for remedy in advice.split(" or with "):
        code, out, error = call(*words, *remedy.split())
        assert (code == 0 and stage in out) or not error.startswith(f"error: {stage} "), remedy


def test_a_model_that_no_setting_makes_fit_is_refused_without_advice(call, tmp_path):
    """A layer of 2^17 · (4 + 3·4) · 2^17 weights: no sharding over 16 times as many GPUs holds two."""
    sizes = {"num_hidden_layers": 80, "hidden_size": 2**17, "intermediate_size": 2**19, "num_attention_heads": 1024}
    (tmp_path / "config.json").write_text(str(sizes | {"vocab_size": 32000}).replace("'", '"'))
    line = refused(call("--gpu", "L4", f"--model.path={tmp_path}", "--rows", "100"))
    assert line.endswith("no setting tried makes it fit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--gpu: the recipe asks for GPUs; name theirs, one of A100-80G"),
        (["--gpu", "B17"], "--gpu B17: unknown; one of A100-80G"),
        (["--gpu", "L4", "--gpus-per-node", "4"], "generation asks for 8 GPUs, 1 × 4 are there; give --nodes=2"),
        (
            [
                "--gpu",
                "L4",
                "--gpus-per-node",
                "1",
                "--generation.resources.gpus=2",
                "--generation.engine.tensor_parallel_size=2",
            ],
            "generation.resources.gpus: 2 for one engine, a node has 1",
        ),
        (["--gpu", "L4", "--algorithm=dpo"], "algorithm: plan knows the costs of spin, not of dpo"),
        (["--gpu", "L4", "--model.path=who/knows"], "model.path who/knows: no such folder, and plan asks no hub"),
    ],
)
def test_what_is_missing_is_one_line(call, words, message):
    assert message in refused(call(*words))


def test_a_gpu_for_a_recipe_that_asks_for_none_is_one_line(call):
    assert "the recipe asks for no GPU; give --generation.resources.gpus=1" in refused(
        call("--gpu", "L4", recipe="smoke")
    )
