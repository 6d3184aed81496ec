"""Hours and memory of a run before it runs, from counts of FLOPs and bytes. Arithmetic only: no Ray, no torch.

    recipe, model shape, row lengths, hardware ──> iterations of stages, each with FLOPs, seconds and bytes

Time is a roofline (Williams, Waterman, Patterson 2009): the longer of FLOPs / reachable FLOP/s and bytes / reachable
bytes/s. Counted is what the code does, not what it might: packs are computed to their padded length with a dense mask,
a shard ends with its longest response.

Not counted: reading data, checkpoints, export, tensor-parallel traffic; a padded layout
(``model.attention``) costs 2-4 times the packed one assumed here.

Units: tokens, FLOPs (a multiply-add is 2), bytes (GB = 1e9), seconds. ``h`` hidden width, ``q`` width of all heads.
"""

from dataclasses import dataclass, replace
from math import ceil

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.planning.hardware import GB, GIB, Hardware
from spin_ray.planning.model_shape import ModelShape

RUNTIME = 2 * GB
"""CUDA context, communication buffers, workspaces, fragmentation. An assumption."""
ENGINE_START_S = {"eager": 25.0, "compiled": 90.0}
"""Start of vLLM 0.29 with a 135M model on two CPU cores, seen once; loading a larger model takes longer."""
WORKERS_START_S = 20.0
"""Ray Train's controller, its helpers and the workers with torch and transformers imported, until the first pack: 16 to
22 s on two CPU cores, of any model; loading a large one takes longer."""
PACKING_LOSS, PART_PACK = 0.03, 0.7
"""A step whose tokens would fill n packs takes about (1 + loss)·n + part of them: best fit leaves little room, but
the last pack is part empty. Counted with ``learner.packing.plan_epoch`` on log-normal lengths; a test repeats it."""
LENGTHS_OF_A_PACK = 16
"""``learner.loop.LENGTHS_OF_A_PACK``, not imported because torch would come with it."""
LENGTH_SPREAD = 2 / 3
"""Standard deviation of a row's length over its mean: an assumption, text is about log-normal with a sigma of 0.6."""
QUINTILES = (-1.28, -0.52, 0.0, 0.52, 1.28)
"""Middles of five equally likely parts of a normal distribution: steps with few tokens to steps with many."""
CHUNK_TARGETS = 256
"""``learner.scoring.TARGETS_PER_CHUNK``, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Rows and their mean lengths. Example, the paper's: ``Work(rows=50_000, prompt=130, real=256, generated=256)``."""

    rows: int
    """Usable training rows."""
    prompt: float
    """Mean tokens of x, the chat template's included."""
    real: float
    """Mean tokens of y."""
    generated: float
    """Mean tokens of y'; nobody knows them before: as long as y, cut at ``max_tokens``."""
    heldout_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    name: str
    tokens: float
    """Prompt and response tokens that the stage works on, over all epochs; padding is not among them."""
    flops: float
    seconds: float
    bound: str
    """What takes the most of the time."""
    memory: dict[str, float]
    """Bytes on the fullest device (a GPU, or a worker's share of the host), by purpose."""
    room: float
    """Bytes that there are."""

    @property
    def needed(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.room


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What the stages run on: one engine's GPU (or cores), one train worker's, as ``Hardware.share`` gives them."""

    generation: Hardware
    train: Hardware


# Generation


def generation_cost(
    config: SpinConfig, shape: ModelShape, device: Hardware, work: Work, jobs: tuple[int, ...]
) -> StageCost:
    """Engines answer ``jobs`` prompts each in shards (``stages.generation``).

    A decode step of c responses reads the weights and their keys and values once, and computes c tokens; a shard's
    last steps belong to its longest response alone.
    """
    settings, engine = config.generation, config.resolve_dtype(config.generation.engine)
    per_shard = max(1, settings.shard_rows // settings.samples_per_prompt) * settings.samples_per_prompt
    responses = [prompts * settings.samples_per_prompt for prompts in jobs]
    rounds = ceil(sum(ceil(count / per_shard) for count in responses) / settings.replicas)
    size = min(per_shard, max(responses))
    seats = _seats(config, shape, device, work, size)

    context = work.prompt + work.generated / 2
    prefill = shape.trunk_flops(work.prompt, work.prompt**2 / 2) + shape.head_flops(1)
    token = shape.trunk_flops(1, context) + shape.head_flops(1)
    parallel = engine.tensor_parallel_size
    read_s = device.reading(seats.weights + seats.together * context * seats.kv)
    compute_s = device.seconds(seats.together * token / parallel, engine.dtype)
    longest = min(settings.sampling.max_tokens, config.model.max_length - work.prompt)
    decoding = "decoding: memory bandwidth" if read_s > compute_s else "decoding: compute"
    spent = {
        "engine start": ENGINE_START_S["eager" if engine.enforce_eager else "compiled"],
        "prefill: compute": rounds * size * device.seconds(prefill / parallel, engine.dtype),
        decoding: rounds * size * work.generated / seats.together * max(read_s, compute_s),
        "longest responses": rounds * max(0.0, longest - work.generated) * device.reading(seats.weights),
    }
    return StageCost(
        name="generation",
        tokens=sum(responses) * (work.prompt + work.generated),
        flops=sum(responses) * (prefill + work.generated * token),
        seconds=sum(spent.values()),
        bound=max(spent, key=lambda name: spent[name]),
        memory=seats.memory,
        room=seats.room,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seats:
    """How many responses an engine decodes together, and the bytes on each of its devices."""

    together: int
    weights: float
    kv: float
    """Keys and values of one token."""
    memory: dict[str, float]
    room: float


def _seats(config: SpinConfig, shape: ModelShape, device: Hardware, work: Work, size: int) -> _Seats:
    """On a GPU the cache gets what weights and runtime leave of ``gpu_memory_utilization``, on CPU a size of its own.

    vLLM refuses to start unless one response of ``max_length`` fits the cache.
    """
    engine, on_gpu = config.resolve_dtype(config.generation.engine), bool(config.generation.resources.gpus)
    dtype_bytes = 4 if engine.dtype == "float32" else 2
    weights = dtype_bytes * shape.parameters / engine.tensor_parallel_size
    kv = shape.kv_bytes(dtype_bytes) / engine.tensor_parallel_size
    room = device.memory * (engine.gpu_memory_utilization if on_gpu else 1)
    cache = room - weights - RUNTIME if on_gpu else engine.cpu_kv_cache_gib * GIB
    response, longest = (work.prompt + work.generated) * kv, config.model.max_length * kv
    together = max(1, min(engine.max_num_seqs, size, int(cache // response)))
    used = max(longest, together * response) if on_gpu else cache
    memory = {"weights": weights, "KV cache": used, "runtime": RUNTIME}
    if not on_gpu and longest > cache:
        memory, room = {"KV cache of the longest response": longest}, cache
    return _Seats(together=together, weights=weights, kv=kv, memory=memory, room=room)


# Scoring and training


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """How the rows of an epoch fall into optimizer steps and packs (``learner.packing``)."""

    steps: int
    per_step: float
    """Packs of a step over all ranks, on average; so are the next three."""
    per_rank: float
    """Packs of one rank: several ranks have equally many, of even lengths."""
    length: float
    """Tokens of a pack, with padding."""
    targets: float
    """Response tokens in a pack: where the head runs."""
    per_rank_at_most: int
    """Packs of that rank in a step of three standard deviations more tokens: memory must hold then, too."""
    tokens: float
    """Of the epoch, without padding."""


def packs_of(
    trees: float, tree_tokens: float, targets: float, *, steps: float, pack_length: int, workers: int
) -> Packs:
    """Packs for ``trees`` trees of ``tree_tokens`` tokens on average, ``targets`` of which are responses."""
    steps = max(1, ceil(steps))
    per_step = trees / steps
    deviation = LENGTH_SPREAD / per_step**0.5

    def packs(deviations: float) -> int:
        filled = per_step * tree_tokens / pack_length * max(0.0, 1 + deviations * deviation)
        fewest = max(1, round((1 + PACKING_LOSS) * filled + PART_PACK))
        return ceil(fewest / workers) * workers

    counts = [packs(deviations) for deviations in QUINTILES]
    mean = sum(counts) / len(counts)
    padding = pack_length / LENGTHS_OF_A_PACK / 2
    return Packs(
        steps=steps,
        per_step=mean,
        per_rank=mean / workers,
        length=min(per_step * tree_tokens / mean + padding, pack_length),
        targets=per_step * targets / mean,
        per_rank_at_most=packs(3) // workers,
        tokens=trees * tree_tokens,
    )


def pair_packs(config: SpinConfig, work: Work, iteration: int) -> Packs:
    """Packs of an epoch of SPIN. A tree is a prompt, y once, and every y' of its rows: samples, and opponents in the
    window if every iteration plays all prompts.
    """
    window = iteration + 1 - max(config.objective.oldest_iteration(iteration), 0)
    played = min(config.data.prompts_per_iteration or work.rows, work.rows)
    repeats, groups = (window, 1) if played == work.rows else (1, window)
    branches = config.generation.samples_per_prompt * repeats
    trees = played * groups
    return packs_of(
        trees,
        work.prompt + work.real + branches * work.generated,
        work.real + branches * work.generated,
        steps=trees * branches / config.train.global_batch_pairs,
        pack_length=config.train.pack_length,
        workers=config.train.workers,
    )


def sft_packs(config: SpinConfig, work: Work) -> Packs:
    batch = config.sft.global_batch_rows if config.sft else work.rows
    return packs_of(
        work.rows, work.prompt + work.real, work.real,
        steps=work.rows / batch, pack_length=config.train.pack_length, workers=config.train.workers,
    )  # fmt: skip


def heldout_packs(config: SpinConfig, work: Work) -> Packs:
    """Evaluation scores y with the samples of two iterates, all rows as one step."""
    responses = work.real + 2 * work.generated
    return packs_of(
        work.heldout_rows, work.prompt + responses, responses,
        steps=1, pack_length=config.train.pack_length, workers=config.train.workers,
    )  # fmt: skip


def pack_flops(config: SpinConfig, shape: ModelShape, length: float, targets: float, *, backward: bool) -> float:
    """Of one pack of ``length`` tokens: a forward pass, with backward 3 times that (twice for the gradients of weights
    and inputs), and 4 where activations are computed again: layers with checkpointing, the head always
    (``_chunked_logps``).

    The mask is dense, so attention computes all of length² pairs.
    """
    trunk, head = shape.trunk_flops(length, length**2), shape.head_flops(targets)
    if not backward:
        return trunk + head
    return (4 if config.train.gradient_checkpointing else 3) * trunk + 4 * head


def step_traffic(config: SpinConfig, shape: ModelShape, packs: float, *, backward: bool) -> float:
    """Bytes that a rank receives for one step: gathered weights in the computation's type, then fp32 gradients.

    Sharded in full, each pass of each pack gathers; otherwise a step does once. Gradients are reduced once a step, or
    with every pack.
    """
    train = config.train
    passes = packs * (2 if backward else 1) if train.sharding == "full" else 1
    reduced = (packs if train.reduce_every_pack else 1) if backward else 0
    gathered = passes * _dtype_bytes(config) + 4 * reduced
    return shape.parameters * gathered * (train.workers - 1) / train.workers


def scoring_cost(config: SpinConfig, shape: ModelShape, device: Hardware, packs: Packs) -> StageCost:
    """The reference: a forward pass over the first epoch's packs by workers that hold the optimizer already."""
    return _learner_cost("scoring", config, shape, device, packs, passes=1, optimizer=config.train.optimizer)


def evaluation_cost(config: SpinConfig, shape: ModelShape, device: Hardware, work: Work) -> StageCost:
    """Held-out rows under two models, one after the other."""
    packs = heldout_packs(config, work)
    cost = _learner_cost("evaluation", config, shape, device, packs, passes=2, optimizer=None)
    return _with_start(cost)


def training_cost(
    config: SpinConfig, shape: ModelShape, device: Hardware, packs: Packs, epochs: int, optimizer: OptimizerConfig
) -> StageCost:
    """Steps, and the start of the workers, which also score."""
    cost = _learner_cost("training", config, shape, device, packs, passes=epochs, optimizer=optimizer, backward=True)
    return _with_start(cost)


def _with_start(cost: StageCost) -> StageCost:
    bound = cost.bound if cost.seconds > WORKERS_START_S else "start of workers"
    return replace(cost, seconds=cost.seconds + WORKERS_START_S, bound=bound)


def _learner_cost(
    name: str,
    config: SpinConfig,
    shape: ModelShape,
    device: Hardware,
    packs: Packs,
    *,
    passes: int,
    optimizer: OptimizerConfig | None,
    backward: bool = False,
) -> StageCost:
    flops = pack_flops(config, shape, packs.length, packs.targets, backward=backward)
    compute = device.seconds(packs.per_rank * flops, config.train.precision)
    traffic = device.sending(step_traffic(config, shape, packs.per_rank, backward=backward))
    return StageCost(
        name=name,
        tokens=passes * packs.tokens,
        flops=passes * packs.steps * packs.per_step * flops,
        seconds=passes * packs.steps * max(compute, traffic),
        bound="gathering weights" if traffic > compute else "compute",
        memory=learner_memory(config, shape, packs, optimizer=optimizer, backward=backward),
        room=device.memory,
    )


def learner_memory(
    config: SpinConfig, shape: ModelShape, packs: Packs, *, optimizer: OptimizerConfig | None, backward: bool
) -> dict[str, float]:
    """Bytes of one rank by purpose (``learner.backends.fsdp2``); fp32 states are sharded over the workers.

    Per parameter: 4 for the weight, 4 for its gradient, 4 (RMSProp) or 8 (AdamW) for the optimizer. ``backward``
    without sync keeps the gradients of a rank's earlier packs whole, 4 bytes per parameter on every rank, unless they
    are reduced with every pack. With ``train.offload`` the shares are in the host's memory, not the GPU's; what
    bringing them over costs is not in ``seconds``.
    """
    on_host = config.train.offload and config.train.resources.gpus
    sharded = 0 if on_host else shape.parameters / config.train.workers
    moments = {"rmsprop": 1, "adamw": 2}[optimizer.name] if optimizer else 0
    memory = {"weights": 4 * sharded, "optimizer": 4 * moments * sharded}
    if backward:
        memory |= {"gradients": 4 * sharded}
        accumulates = packs.per_rank_at_most > 1 and not config.train.reduce_every_pack
        memory |= {"whole gradients": 4.0 * shape.parameters if accumulates else 0.0}
    memory |= {
        "gathered weights": _gathered_bytes(config, shape, backward=backward),
        "activations": _activation_bytes(config, shape, packs, backward=backward),
        "runtime": RUNTIME,
    }
    return {purpose: count for purpose, count in memory.items() if count}


def _gathered_bytes(config: SpinConfig, shape: ModelShape, *, backward: bool) -> float:
    """Weights as computed with: two layers (one in use, one on its way) and the root where layers are sharded again
    after use, else all; while gradients are reduced, two fp32 buffers of the largest unit.
    """
    resharded = config.train.sharding == "full" and config.train.workers > 1
    weights = shape.root + 2 * shape.layer if resharded else shape.parameters
    buffers = 2 * 4 * max(shape.root, shape.layer) if backward and config.train.workers > 1 else 0
    return _dtype_bytes(config) * weights + buffers


def _activation_bytes(config: SpinConfig, shape: ModelShape, packs: Packs, *, backward: bool) -> float:
    """What one pack keeps: layers (all of them, or their inputs and one of them), mask, one chunk of logits.

    A layer keeps, per token: two norms with an fp32 copy of their input, its normalised form and their output
    (2h(4 + 2b) for b bytes a number); queries, keys and values repeated to all heads, and attention's output (4qb);
    four vectors of the feed-forward network (4ib). Counted on transformers' Llama as arXiv 2205.05198 does on GPT.
    """
    length, b = config.train.pack_length, _dtype_bytes(config)
    layer = length * (2 * shape.hidden * (4 + 2 * b) + 4 * shape.q * b + 4 * shape.intermediate * b)
    inputs = length * shape.hidden * b
    if not backward:
        kept = float(layer)
    elif config.train.gradient_checkpointing:
        kept = float(shape.layers * inputs + layer)
    else:
        kept = float(shape.layers * layer)
    mask = length**2 * (b + 1)  # additive, and the booleans that it is made of
    logits = CHUNK_TARGETS * shape.vocab * (3 * 4 if backward else 4)  # fp32; with gradient and softmax
    return kept + packs.targets * shape.hidden * b + mask + logits


def _dtype_bytes(config: SpinConfig) -> int:
    return 2 if config.train.precision == "bf16" else 4


# A whole run


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Stages of one iteration, or of several that cost the same."""

    first: str
    last: str
    count: int
    stages: tuple[StageCost, ...]

    @property
    def name(self) -> str:
        return self.first if self.count == 1 else f"{self.first} to {self.last}"

    @property
    def seconds(self) -> float:
        return self.count * sum(stage.seconds for stage in self.stages)


def plan_run(config: SpinConfig, shape: ModelShape, devices: Devices, work: Work) -> list[Phase]:
    """Every stage of the driver's loop that costs something, iterations of equal cost together."""
    phases: list[Phase] = []
    if config.sft:
        warm_up = training_cost(
            config, shape, devices.train, sft_packs(config, work), config.sft.epochs, config.sft.optimizer
        )
        phases.append(Phase(first="sft", last="sft", count=1, stages=(warm_up,)))
    for iteration in range(config.iterations + 1):
        stages = iteration_costs(config, shape, devices, work, iteration)
        name = f"iter_{iteration:03d}" if iteration < config.iterations else "last iterate"
        if phases and phases[-1].stages == stages:
            phases[-1] = replace(phases[-1], last=name, count=phases[-1].count + 1)
        elif stages:
            phases.append(Phase(first=name, last=name, count=1, stages=stages))
    return phases


def iteration_costs(
    config: SpinConfig, shape: ModelShape, devices: Devices, work: Work, iteration: int
) -> tuple[StageCost, ...]:
    """θ_t answers and is evaluated, then θ_{t+1} is trained; of the last iterate only the former is left."""
    trained = iteration < config.iterations
    played = min(config.data.prompts_per_iteration or work.rows, work.rows) if trained else 0
    jobs = tuple(count for count in (work.heldout_rows, played) if count)
    stages = []
    if jobs:
        stages.append(generation_cost(config, shape, devices.generation, work, jobs))
    if work.heldout_rows and iteration:
        stages.append(evaluation_cost(config, shape, devices.train, work))
    if trained:
        packs, epochs = pair_packs(config, work, iteration), config.at(iteration).epochs
        stages.append(scoring_cost(config, shape, devices.train, packs))
        stages.append(training_cost(config, shape, devices.train, packs, epochs, config.train.optimizer))
    return tuple(stages)


# The paper's own times

PUBLISHED_H = {"generation, 50k prompts": 1.45, "training, 50k pairs": 4.32, "training, 100k pairs": 8.64}
"""Hours on 8 A100 of 80 GB, a 7B model, 2 epochs: arXiv 2401.01335."""
PAPER_GPUS, PAPER_EPOCHS, PAPER_PROMPTS = 8, 2, 50_000
PAPER_GENERATION_BATCH = 16
"""Prompts per GPU that the authors' first code hands to ``transformers`` together (README of uclaml/SPIN, step 1)."""
PAPER_PADDING = 2.0
"""Longest row of a batch over the mean row. An assumption: 16 rows (8 pairs per GPU) of log-normal length with a
sigma of 0.45 give it; the paper does not say how much it pads."""


def paper_way_hours(shape: ModelShape, device: Hardware, work: Work, max_tokens: int) -> dict[str, float]:
    """The authors' procedure (uclaml/SPIN) under this model, for the keys of ``PUBLISHED_H``.

    Generation: fixed batches, each as long as its longest response, bound by reading the weights at every step.
    Training: y and y' are rows of their own, each with the prompt, padded to the longest of the batch; the policy
    with checkpointing (4 forward passes' worth), the reference model live (1), the head on every token (3 + 1).
    """
    context = work.prompt + max_tokens / 2  # of 16 responses one nearly always goes on to max_tokens
    step = device.reading(2 * shape.parameters + PAPER_GENERATION_BATCH * context * shape.kv_bytes(2))
    generation = PAPER_PROMPTS / (PAPER_GPUS * PAPER_GENERATION_BATCH) * max_tokens * step

    row = PAPER_PADDING * (work.prompt + (work.real + work.generated) / 2)
    flops = 5 * shape.trunk_flops(row, row**2 / 2) + 4 * shape.head_flops(row)
    training = PAPER_PROMPTS * PAPER_EPOCHS * 2 * device.seconds(flops, "bf16") / PAPER_GPUS
    hours = (generation / 3600, training / 3600, 2 * training / 3600)
    return dict(zip(PUBLISHED_H, hours, strict=True))
