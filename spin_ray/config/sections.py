"""Every setting of a run, its default and its reason.

A recipe is a YAML file with these sections; unknown keys, impossible values and impossible combinations are errors at
load, all listed at once. Defaults follow the SPIN paper (arXiv 2401.01335, section 6.1 and appendix B)
where it gives a value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


ONE, LIST, WORD, NAME, PATH = TAGS = "<one>", "<list>", "<word>", "<name>", "<path>"
"""Kinds of value of one setting, as pydantic writes them into the place of an error; no part of the recipe."""
_one_or_list = Discriminator(lambda value: LIST if isinstance(value, list | tuple) else ONE)
"""Chooses the kind by what was written, so that an error speaks of that kind only."""
PerIteration = Annotated[Annotated[Positive, Tag(ONE)] | Annotated[tuple[Positive, ...], Tag(LIST)], _one_or_list]
PerIterationCount = Annotated[Annotated[Count, Tag(ONE)] | Annotated[tuple[Count, ...], Tag(LIST)], _one_or_list]
_one_or_word = Discriminator(lambda value: WORD if isinstance(value, str) else ONE)
CountOrAll = Annotated[Annotated[Count, Tag(ONE)] | Annotated[Literal["all"], Tag(WORD)], _one_or_word]

T = TypeVar("T")
ImportPath = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")]
"""Something of the user's own, e.g. ``my_package.mine:Name``. Reading the recipe does not import it."""
_name_or_path = Discriminator(lambda value: PATH if isinstance(value, str) and ":" in value else NAME)
NameOrPath = Annotated[Annotated[T, Tag(NAME)] | Annotated[ImportPath, Tag(PATH)], _name_or_path]

MAY_CHANGE, IDENTITY = object(), object()
MayChange = Annotated[T, MAY_CHANGE]
"""A setting that may change between two calls of one run; every other setting is part of the run's identity."""
Identity = Annotated[T, IDENTITY]
"""A section that is part of the run's identity with all its settings, also those that may change elsewhere."""


AlgorithmName = Literal["spin", "continued_sft", "dpo", "sppo", "self_reinforcement", "seft"]
LossName = Literal["logistic", "hinge", "exponential", "correlation"]
OptimizerName = Literal["rmsprop", "adamw"]
Precision = Literal["bf16", "fp32"]
BackendName = Literal["fsdp2", "deepspeed"]


class Section(BaseModel):
    """Base of every section: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class ModelConfig(Section):
    path: str
    """Model folder in Hugging Face layout (safetensors), ``embedded:NAME``, or a hub name where a hub is reachable."""
    max_length: Count = 2048
    """Longest prompt + response in tokens; longer SFT rows go to quarantine. Paper: 2048."""
    chat_template: str | None = None
    """File with a Jinja chat template, for tokenizers that have none."""
    trust_remote_code: bool = False
    """Let the model folder bring its own code. Off: such folders, and pickled weights, are refused."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    """How responses are scored. ``packed`` needs a model that takes a 4-D mask and position ids; ``padded`` works with
    any causal LM at 2-4 times the cost; ``auto`` checks the model once at the start of training and chooses."""


class DataConfig(Section):
    train: str
    """SFT data: JSONL or Parquet file, folder, glob or URI, with ``messages`` or ``prompt``/``response`` columns.
    ``chosen`` stands for either, and ``rejected`` beside it is y′ for ``dpo``."""
    questions: str | None = None
    """Unlabelled questions, for algorithms that learn from them: rows with ``prompt``, or ``messages`` whose assistant
    turn, if there is one, is not read."""
    heldout: str | None = None
    """Held-out rows in the same form, never trained on. Without them there is no evaluation."""
    prompts_per_iteration: Count | None = None
    """How many prompts each iteration plays: a fresh slice of a seeded order, wrapping round. All of them when not set.
    Many short iterations with fresh y′ keep the opponent honest (y′ goes stale while the policy moves)."""
    max_rows: Count | None = None
    """Use only the first rows of the training data."""
    turns: Literal["last", "first", "all"] = "last"
    """Which assistant messages are responses: the ``last`` of a conversation, the ``first`` (paper: first turn), or
    ``all`` (each makes a row). What a user says is never scored."""
    system: str | None = None
    """System message for conversations that have none (otherwise the chat template's own default applies)."""
    max_quarantine_fraction: Fraction = 0.05
    """Share of unusable rows (malformed, empty, over-long, duplicate) above which the run stops with an error."""


class ResourcesConfig(Section):
    """What one actor or worker asks of the cluster."""

    cpus: Positive = 1
    """Logical CPUs; on CPU also the number of compute threads (whole part, at least one)."""
    gpus: NonNegative = 0
    """GPUs, whole or (engines that share one) a fraction; 0 computes on the CPU."""
    custom: MayChange[dict[str, Positive]] = {}
    """Custom Ray resources, e.g. ``{"accelerator_type:H100": 0.001}``."""
    labels: MayChange[dict[str, str]] = {}
    """Which nodes may be taken: Ray's label selector, e.g. ``{"ray.io/accelerator-type": "in(H100,H200)"}``."""

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """The request in Ray's own words, e.g. ``{"CPU": 2, "GPU": 1}``."""
        named = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in named.items() if amount}


class SamplingConfig(Section):
    """How the opponent answers. SPIN needs samples of p_θt itself: temperature 1, the distribution not truncated."""

    temperature: NonNegative = 1.0
    """1 samples from the model; 0 is greedy and, like every other value, a departure from the method."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """1: no limit. Below, only the likeliest tokens that together have this probability are sampled."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: no limit."""
    max_tokens: Count = 1024
    """Longest response. A response cut here carries no end-of-turn token."""


class EngineConfig(Section):
    """vLLM's engine arguments. ``max_model_len`` is ``model.max_length``; sampling is never the model folder's."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of weights and computation. ``auto`` is that of ``train.precision``, so that what plays is what was trained:
    fewer bits round small updates away, and θ_t then plays like θ_{t-1}."""
    tensor_parallel_size: Count = 1
    """GPUs per engine (one node); ``generation.resources.gpus`` must equal it when GPUs are used."""
    max_num_seqs: Count = 256
    """Responses decoded together."""
    gpu_memory_utilization: MayChange[Annotated[float, Field(gt=0, le=1)]] = 0.9
    """Share of the GPU's memory for weights and key-value cache."""
    cpu_kv_cache_gib: MayChange[Count] = 2
    """Key-value cache on CPU, GiB."""
    enforce_eager: bool = False
    """Skip torch.compile: on CPU it saves a minute of start-up and costs little afterwards."""
    extra: dict[str, Any] = {}
    """Any other vLLM engine argument, passed on as it is."""


class GenerationConfig(Section):
    sampling: SamplingConfig = SamplingConfig()
    """How one response is drawn."""
    samples_per_prompt: Count = 1
    """Responses y′ per prompt; each makes a pair of its own. Paper: 1."""
    shard_rows: Count = 512
    """Responses per shard: the unit of work, of commit and of what a crash can lose. A shard is one batch of the
    engine, so a retry repeats it exactly; too small a shard leaves the engine half empty at its end."""
    replicas: MayChange[Count] = 1
    """Engines that generate side by side."""
    min_replicas: MayChange[Count | None] = None
    """Go on with as few as this; those that find no room wait, and play as soon as a node joins. Not set: ``replicas``
    must fit."""
    resources: ResourcesConfig = ResourcesConfig()
    """Per engine."""
    engine: EngineConfig = EngineConfig()
    """How vLLM is started."""
    start_timeout_s: MayChange[Positive] = 900
    """Longest wait for an engine to be ready."""
    shard_timeout_s: MayChange[Positive] = 7200
    """Longest wait without any shard being finished."""
    max_failures: MayChange[Annotated[int, Field(ge=0)]] = 3
    """Restarts of an engine that dies, and further attempts at a shard, before the stage fails."""


class ObjectiveConfig(Section):
    loss: NameOrPath[LossName] = "logistic"
    """ℓ of equation 4.7, or ``my_package.mine:loss``. Paper: logistic, log(1 + e^-m)."""
    beta: MayChange[PerIteration] = 0.1
    """λ of the paper: strength of the KL regulariser. A list has one for each iteration (paper: 0.1, 0.1, 0.1, 5.0)."""
    window: CountOrAll = 2
    """How many opponents' responses an iteration learns from: its own and those of window-1 earlier ones. Paper: 2.
    ``all`` is fictitious play: the opponent is the uniform mixture of all iterates, whose stored y′ are used again."""
    reference_alpha: Fraction = 1.0
    """The reference is p_t^α · p_0^(1-α). 1: the last iterate (SPIN). 0: the model that iteration 0 started from.
    Between: α-SPIN (arXiv 2404.04291), whose fixed point is biased towards that model by design."""
    length_normalised: bool = False
    """Divide each log-ratio by the number of its response's tokens. A departure from the paper: its margins are sums,
    and a β for sums is about a response's length too small for means."""
    sft_weight: NonNegative = 0.0
    """Weight of an added -log p(y), per response token of the step: an anchor for small models and large steps.
    0 is the paper's objective; everything else a departure from it."""
    keep_identical: bool = False
    """Keep pairs with y = y′. Their margin is 0 whatever the model is, so they serve ``sft_weight`` alone: without them
    the anchor rests on the prompts that the model answers differently, and so mostly on those it gets wrong."""

    def oldest_iteration(self, iteration: int) -> int:
        """The first iteration whose y′ are still in the window of ``iteration``; may be negative."""
        return 0 if self.window == "all" else iteration - self.window + 1


class ScorerConfig(Section):
    """SPPO's judge of responses: P(one beats the other), by a model that was trained on preferences."""

    path: str
    """Its folder (safetensors), or a hub name where a hub is reachable."""
    kind: Literal["reward", "pairrm"] = "reward"
    """``reward``: a sequence classifier with one output, P = σ(difference of rewards). ``pairrm``: a model like
    llm-blender/PairRM-hf, which reads both responses together. Paper: PairRM."""
    max_length: Count = 2048
    """Longest text in tokens; what is longer is cut at its end, as PairRM does."""
    replicas: Count = 1
    """Judges that score side by side."""
    resources: Identity[ResourcesConfig] = ResourcesConfig()
    """Per judge."""


class SelfFilterConfig(Section):
    """Self-reinforcement: which of the model's own answers to unlabelled questions are worth learning from."""

    min_agreement: Fraction = 0.5
    """Least share of a question's samples that give its commonest answer (read by ``evaluation.answer_extractor``; else
    the whole response). A departure: the paper lets the model judge its answers in words, which small ones cannot."""


class OptimizerConfig(Section):
    name: NameOrPath[OptimizerName] = "rmsprop"
    """``rmsprop``, ``adamw`` or ``my_package.mine:Optimizer``. Paper: RMSProp."""
    weight_decay: NonNegative = 0.0
    """Paper: 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up. Paper: linear decay to 0."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps over which the learning rate rises linearly. Paper: 0.1."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights: no gradients and optimizer state for the rest. A departure from
    the paper. Each iterate is exported merged, so the next opponent and reference is a plain model again.
    """

    rank: Count = 16
    """Of the change that one iteration can make to a weight matrix."""
    alpha: Count = 32
    """The change is scaled by alpha / rank. Adapters want a learning rate 10 to 100 times that of all weights."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter, e.g. ``[q_proj, v_proj]``; all linear ones but the head by default."""


class TrainConfig(Section):
    backend: NameOrPath[BackendName] = "fsdp2"
    """What holds and shards the model: torch's own FSDP2, DeepSpeed's ZeRO (the extra ``deepspeed``), or
    ``my_package.mine:Backend``."""
    workers: Count = 1
    """Train workers; parameters, gradients and optimizer state are sharded over them."""
    min_workers: MayChange[Count | None] = None
    """Elastic training (FSDP2 only): when nodes are lost, go on with as few as this from the last checkpoint, and take
    up to ``workers`` again when nodes join. The result is the same but for the order in which gradients are summed. Not
    set: always ``workers``."""
    resize_interval_s: MayChange[NonNegative] = 300
    """How often an elastic group looks whether it can grow; growing, too, goes on from the last checkpoint."""
    resources: ResourcesConfig = ResourcesConfig()
    """Per worker. Workers with a GPU use NCCL, others gloo."""
    learning_rate: MayChange[PerIteration] = 5e-7
    """Peak; a list gives each iteration its own. Paper: 5e-7, 5e-7, 1e-7, 1e-7."""
    epochs: MayChange[PerIterationCount] = 2
    """Passes over the pairs of an iteration. Paper: 2."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """A fresh one for every iteration."""
    lora: LoraConfig | None = None
    """Adapters (PEFT, the extra ``lora``) instead of all weights; not for the ``sft`` warm-up. Off by default."""
    global_batch_pairs: Count = 64
    """Pairs per optimizer step, over all workers. Paper: 64."""
    pack_length: Count = 4096
    """Tokens per pack, one micro-batch of one worker. Must hold prompt + y + y′: at least max_length + max_tokens."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the computation. ``auto`` is bf16 on GPUs and, on CPUs, the one of the two that multiplies
    faster on this machine. A run keeps the precision that it began with. Master weights, gradients and optimizer state
    are always fp32: at a learning rate of 1e-7 an update is below what bf16 can resolve."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    sharding: MayChange[Literal["full", "shard_grad_op"]] = "full"
    """``full`` (ZeRO-3) gathers each layer's weights anew in each forward and backward pass. ``shard_grad_op`` (ZeRO-2)
    gathers once per optimizer step: far less traffic, for one whole copy of the weights per worker."""
    reduce_every_pack: MayChange[bool] = False
    """Sum gradients over the workers after each pack, not once per step. Off: every worker holds the gradients of its
    earlier packs whole, 4 bytes per parameter. On: more traffic, for models whose gradients would not fit so."""
    offload: MayChange[bool] = False
    """Keep a worker's share of weights, gradients and optimizer state in the CPU's memory and step there: what is left
    on the GPU is what a layer needs at the moment, and activations. Slower; for models that do not fit otherwise."""
    checkpoint_every_steps: MayChange[Count] = 200
    """Steps between checkpoints: what a killed worker can lose."""
    max_failures: MayChange[Annotated[int, Field(ge=0)]] = 3
    """Restarts of the worker group in one iteration before the run fails."""
    start_timeout_s: MayChange[Positive] = 600
    """Longest wait for the workers to be placed and to meet."""
    stall_timeout_s: MayChange[Positive] = 86_400
    """Longest wait without a step being finished. Scoring all pairs, or a whole evaluation, counts as one step."""


class SftConfig(Section):
    """Optional warm-up that makes θ_0 from a base model, on the same rows and packs."""

    epochs: Count = 1
    """Passes over the rows. SPIN's own regime starts where one more would no longer help."""
    learning_rate: Positive = 2e-5
    """Paper's SFT model (zephyr-7b-sft-full): 2e-5."""
    global_batch_rows: Count = 64
    """Rows per optimizer step, over all workers."""
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", schedule="cosine")
    """AdamW with cosine decay, as SFT usually has."""


class ReviserConfig(SftConfig):
    """SEFT: a model that reads a question with the policy's answer and writes ``[keep]``, ``[minor]`` or ``[major]``
    with a better answer. It is fine-tuned from θ_0, on θ_0's answers to the labelled prompts and people's.
    """

    minor_from: Fraction = 0.5
    """Similarity of answer and human response (0 to 1, of their tokens) from which a revision is called minor; equal
    ones are kept. The paper has a reward model tell them apart."""


class HealthConfig(Section):
    """When a run stops by itself because the model is being destroyed. ``null`` switches a limit off.

    A loss or gradient that is not finite always stops all workers before the optimizer steps, and training is tried
    again from the last checkpoint (``train.max_failures`` times).
    """

    steps: Count = 5
    """Losses, margins and log-probabilities are judged by their mean over so many steps."""
    max_loss: Positive | None = None
    """Of the SPIN objective; ln 2 at the start of each iteration (logistic loss)."""
    max_margin: Positive | None = 30.0
    """Of either sign. A healthy iteration ends with a few nats times beta."""
    max_real_logp_drop: Positive | None = 0.5
    """By which share of its size log p(y) may fall within an iteration: at 0.5, 100 nats become 150."""
    max_length_change: Annotated[float, Field(gt=1)] | None = 4.0
    """By which factor the mean length of y′ may grow or shrink against that of the first opponent."""


class EvaluationConfig(Section):
    answer_extractor: Literal["none", "equals", "hashes"] = "none"
    """How a response's number is read where rows carry ``answer``: after the last ``=`` or after ``####``."""
    max_rows: Count | None = None
    """Use only the first held-out rows."""


class ServingConfig(Section):
    """The endpoint of ``spin-ray serve``: which iterates, on what, and what a client may ask of them."""

    models: tuple[str, ...] = ("sft", "latest")
    """Which iterates have an engine: ``sft``, ``iter-0``, …, ``latest`` (moves with RUN/LATEST), or ``all``."""
    host: str = "127.0.0.1"
    """Address to listen at. Beyond this machine only with ``keys`` and Ray's token authentication."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port."""
    keys: str | None = None
    """File of hashed API keys (``spin-ray serve-key`` makes its lines). None: whoever reaches the port may ask."""
    requests_per_minute: Count | None = None
    """Of each key, unless its line says otherwise; without keys of everybody together. None: no limit."""
    max_concurrent: Count = 64
    """Answers made at once per ingress replica; further requests get 503 with Retry-After instead of a queue."""
    max_tokens: Count = 1024
    """Longest answer a request may ask for, and gets if it asks for none in particular."""
    max_body_bytes: Count = 2**20
    """A larger request is refused while it streams in."""
    body_timeout_s: Positive = 30
    """Longest wait for the whole body of a request."""
    request_timeout_s: Positive = 600
    """Longest answer, and how long a stream may go on while its engine is being replaced or the server stops."""
    stream_interval_s: NonNegative = 0.1
    """Pause between two pieces of a stream after the first: each piece costs Ray Serve milliseconds of CPU."""
    replicas: Count = 1
    """Engines per iterate."""
    max_replicas: Count = 1
    """More than ``replicas``: Ray Serve adds engines under load up to this number."""
    target_ongoing_requests: Count = 32
    """Load per engine that autoscaling aims at."""
    ingress_replicas: Count = 1
    """Processes that check, route and stream. Rates and ``max_concurrent`` hold in each of them."""
    resources: ResourcesConfig = ResourcesConfig()
    """Per engine. While ``latest`` moves on, one more than usual must fit."""
    engine: EngineConfig | None = None
    """How vLLM is started; None: as in ``generation.engine``."""
    follow_interval_s: Positive = 2
    """How often RUN/LATEST is looked at."""
    start_timeout_s: Positive = 900
    """Longest wait for an engine to be placed, loaded and to answer a first request."""
    retry_failed_s: Positive = 60
    """Pause before an iterate that failed its digest or did not start is tried again."""
    drain_grace_s: NonNegative = 5
    """Pause between the moment that nothing new goes to an old engine and its shutdown."""
    log_prompts: bool = False
    """Put messages and prompts into the access log."""
    votes: str | None = None
    """Database URL (SQLAlchemy's) for the arena's votes and what they were on. None: ``RUN/votes.sqlite``, which serves
    one machine on a disk of its own; ingress replicas on several machines need a database server."""


class StopConfig(Section):
    """Ends the run before ``iterations`` when the held-out distance between opponent and people stops falling.

    The distance is ``jsd_lower_bound`` of each evaluation. It is what this model, trained for one iteration, could see:
    a rule without a judge, to be read with the examples.
    """

    patience: Count = 1
    """Iterations in a row without a new lowest distance before the run stops."""
    min_fall: NonNegative = 0.0
    """Nats by which a distance must be below the lowest so far to count as a fall."""


class MlflowConfig(Section):
    """Needs the package mlflow or mlflow-skinny (extra ``mlflow``)."""

    uri: str | None = None
    """Tracking server or folder. Not set: the folder ``mlruns`` of the run, which needs no server."""
    experiment: str = "spin_ray"
    """Holds one MLflow run for each run folder."""


class WandbConfig(Section):
    """Needs the package wandb (extra ``wandb``)."""

    project: str = "spin_ray"
    """Holds one W&B run for each run folder."""
    mode: Literal["offline", "online"] = "offline"
    """``offline`` writes to ``RUN/wandb``, for ``wandb sync``; ``online`` needs WANDB_API_KEY in the environment."""


class TrackingConfig(Section):
    tensorboard: bool = True
    """Write event files to ``RUN/tensorboard``; ``tensorboard --logdir RUN`` shows them."""
    mlflow: MlflowConfig | None = None
    """Log to MLflow, too; ``{}`` takes its defaults."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases, too; ``{}`` takes its defaults."""


class StorageConfig(Section):
    lease_timeout_s: Positive = 60
    """A driver that has not renewed its lease for so long counts as dead (on this host: once its process is gone)."""
    keep_checkpoints: bool = False
    """Keep the training checkpoints of finished iterations (optimizer state: 8 bytes per parameter or more)."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray cluster to attach to (``auto`` finds a running one). Not set: $RAY_ADDRESS, else an embedded local Ray."""
    local_cpus: Count | None = None
    """Logical CPUs of an embedded Ray. Not set: the machine's."""
    wait_for_nodes_s: NonNegative = 0
    """Longest wait for an autoscaling cluster to grow to what the stages ask for."""


class Settings(Section):
    """Every setting of a run, section by section."""

    model: ModelConfig
    """What is trained: the SFT model, or the base model that ``sft`` makes one of."""
    data: DataConfig
    """What it learns from."""
    iterations: MayChange[Count] = 4
    """T of Algorithm 1. Paper: iterations 0 to 3. May be raised later: the same command then goes on."""
    algorithm: NameOrPath[AlgorithmName] = "spin"
    """What an iteration plays, how its pairs are made, and the loss they feed (docs/algorithms.md); or
    ``my_package.mine:Algorithm``."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of every random choice: order of the rows, slices of the prompts, each response."""
    sft: SftConfig | None = None
    """Warm-up before iteration 0; none when not set."""
    scorer: ScorerConfig | None = None
    """SPPO's judge."""
    self_filter: SelfFilterConfig | None = None
    """Self-reinforcement's choice among its own answers; every answer is learnt from when not set."""
    reviser: ReviserConfig | None = None
    """SEFT's reviser."""
    generation: GenerationConfig = GenerationConfig()
    """How the opponent plays."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What training minimises."""
    train: TrainConfig = TrainConfig()
    """How it is minimised."""
    health: MayChange[HealthConfig] = HealthConfig()
    """When it stops by itself."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured on the held-out rows."""
    stop_when: MayChange[StopConfig | None] = None
    """A rule that ends the run early; ``{}`` takes its defaults, none when not set. May be changed between calls."""
    tracking: MayChange[TrackingConfig] = TrackingConfig()
    """Where the numbers go beside the run folder."""
    serving: MayChange[ServingConfig] = ServingConfig()
    """How ``spin-ray serve`` answers; a run does not read it."""
    storage: MayChange[StorageConfig] = StorageConfig()
    """What is kept, and how one driver at a time is ensured."""
    cluster: MayChange[ClusterConfig] = ClusterConfig()
    """Where it runs."""
