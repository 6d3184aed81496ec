"""Every setting of a run, its default and its reason.

A recipe is a YAML file with these sections. Unknown keys, impossible values and impossible combinations are errors when
it is read, all listed at once. Where the SPIN paper (arXiv 2401.01335, section 6.1 and appendix B) gives a value, the
default is that value; "Paper:" marks it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

T = TypeVar("T")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

ONE, LIST, WORD, NAME, PATH = TAGS = "<one>", "<list>", "<word>", "<name>", "<path>"
"""Tags of the kinds of value that one setting may have. The kind is chosen by what the recipe says, so that an error
speaks of that kind only. Pydantic writes the tag into the place of the error."""
_one_or_list = Discriminator(lambda value: LIST if isinstance(value, list | tuple) else ONE)
_one_or_word = Discriminator(lambda value: WORD if isinstance(value, str) else ONE)
_name_or_path = Discriminator(lambda value: PATH if isinstance(value, str) and ":" in value else NAME)

PerIteration = Annotated[Annotated[Positive, Tag(ONE)] | Annotated[tuple[Positive, ...], Tag(LIST)], _one_or_list]
PerIterationCount = Annotated[Annotated[Count, Tag(ONE)] | Annotated[tuple[Count, ...], Tag(LIST)], _one_or_list]
CountOrAll = Annotated[Annotated[Count, Tag(ONE)] | Annotated[Literal["all"], Tag(WORD)], _one_or_word]
ImportPath = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")]
"""Place of a user's own class or function, e.g. ``my_package.mine:Name``. Reading a recipe checks only the form."""
NameOrPath = Annotated[Annotated[T, Tag(NAME)] | Annotated[ImportPath, Tag(PATH)], _name_or_path]

MAY_CHANGE, IDENTITY = object(), object()
MayChange = Annotated[T, MAY_CHANGE]
"""A setting that may change between two calls of one run. Every other setting is part of the run's identity."""
Identity = Annotated[T, IDENTITY]
"""A section that is part of the run's identity as a whole, with the settings that may change in other sections."""

AlgorithmName = Literal["spin", "continued_sft", "dpo", "sppo", "self_reinforcement", "seft"]
LossName = Literal["logistic", "hinge", "exponential", "correlation"]
OptimizerName = Literal["rmsprop", "adamw"]
BackendName = Literal["fsdp2", "deepspeed"]


class Section(BaseModel):
    """Base of every section: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class ModelConfig(Section):
    """The start model: the one that the run trains first."""

    path: str
    """Model folder in Hugging Face layout (safetensors), ``embedded:NAME``, or a hub name where a hub is reachable."""
    max_length: Count = 2048
    """Longest prompt + response in tokens. Longer training rows go to quarantine. Memory grows with it. Paper: 2048."""
    chat_template: str | None = None
    """File with a Jinja chat template. Not set: the tokenizer's own, which some tokenizers lack."""
    trust_remote_code: bool = False
    """Permission to run Python code from the model folder. Off: folders with code or pickled weights are refused,
    because both can run anything on this machine."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    """Layout in which responses are scored. ``packed`` needs a model that takes a 4-D mask and position ids. ``padded``
    works with any causal language model at 2 to 4 times the cost. ``auto`` checks the model at the start of training
    and takes ``packed`` where it works."""


class DataConfig(Section):
    """The conversations that the run learns from, and those that it is measured on."""

    train: str
    """Training data: a JSONL or Parquet file, folder, glob or URI. Its columns are ``messages``, or ``prompt`` and
    ``response``. ``chosen`` may stand for either, and ``rejected`` beside it is y′ for algorithm ``dpo``."""
    questions: str | None = None
    """Unlabelled questions for ``self_reinforcement`` and ``seft``, in rows with ``prompt`` or ``messages``. An
    assistant's turn in them is not read."""
    heldout: str | None = None
    """Rows in the form of ``train`` that are never trained on. Not set: the run has no evaluation."""
    prompts_per_iteration: Count | None = None
    """Number of prompts that each iteration plays: the next slice of a seeded order, wrapping round at its end.
    Not set: all prompts. Short iterations keep y′ fresh, because y′ goes stale while the policy moves."""
    max_rows: Count | None = None
    """Number of training rows, and of questions, that are used, from the first. Not set: all."""
    turns: Literal["last", "first", "all"] = "last"
    """Assistant's messages that are taken as responses: the ``last`` of a conversation, the ``first`` (the paper's), or
    ``all``, each a row of its own. Messages of users are never scored."""
    system: str | None = None
    """System message for conversations that have none. Not set: the chat template's own default."""
    max_quarantine_fraction: Fraction = 0.05
    """Fraction of unusable rows (malformed, empty, too long, duplicate) above which the run stops with an error. Many
    such rows hint at a mistake in the data or its format."""


class ResourcesConfig(Section):
    """The request of one actor or worker to the Ray cluster."""

    cpus: Positive = 1
    """Logical CPUs. Work on the CPU computes with as many threads (rounded down, at least one)."""
    gpus: NonNegative = 0
    """Number of GPUs: whole, or a fraction for engines that share one. 0 computes on the CPU."""
    custom: MayChange[dict[str, Positive]] = {}
    """Custom Ray resources and their amounts, e.g. ``{"accelerator_type:H100": 0.001}``."""
    labels: MayChange[dict[str, str]] = {}
    """Ray's label selector for the nodes that may be used, e.g. ``{"ray.io/accelerator-type": "in(H100,H200)"}``."""

    @property
    def threads(self) -> int:
        """Compute threads of the process."""
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """The request in Ray's own names, e.g. ``{"CPU": 2, "GPU": 1}``."""
        named = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in named.items() if amount}


class SamplingConfig(Section):
    """The distribution that responses are drawn from. SPIN needs samples of p_θt itself, and the defaults give them:
    temperature 1, nothing cut off.
    """

    temperature: NonNegative = 1.0
    """Temperature of sampling. 1 samples from the model, 0 takes the likeliest token. Every value but 1 departs from
    the method."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that the sampled tokens have together; less likely tokens are never drawn. 1: no limit."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of likeliest tokens that are sampled from. 0: no limit."""
    max_tokens: Count = 1024
    """Longest response in tokens. A response that is cut here has no end-of-turn token."""


class EngineConfig(Section):
    """Arguments of the vLLM engine. ``model.max_length`` sets its ``max_model_len``; sampling settings of the model
    folder are not read.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of weights and computation. ``auto`` is that of ``train.precision``: fewer bits round small updates
    away, and θ_t would play like θ_{t-1}."""
    tensor_parallel_size: Count = 1
    """GPUs of one engine, all on one node. On GPUs it must equal ``generation.resources.gpus``."""
    max_num_seqs: Count = 256
    """Responses that are decoded together. More use the hardware better and need a larger key-value cache."""
    gpu_memory_utilization: MayChange[Annotated[float, Field(gt=0, le=1)]] = 0.9
    """Fraction of the GPU's memory for weights and key-value cache."""
    cpu_kv_cache_gib: MayChange[Count] = 2
    """Size of the key-value cache on CPU, in GiB."""
    enforce_eager: bool = False
    """Run without torch.compile. On CPU this saves a minute of start-up and costs little speed."""
    extra: dict[str, Any] = {}
    """Any other vLLM engine arguments, passed on as they are."""


class GenerationConfig(Section):
    """The stage in which the opponent θ_t answers the prompts."""

    sampling: SamplingConfig = SamplingConfig()
    """The distribution of one response."""
    samples_per_prompt: Count = 1
    """Responses y′ per prompt; each makes a pair of its own. Paper: 1."""
    shard_rows: Count = 512
    """Responses per shard: one batch of the engine, the unit of commit, and the most that a crash can lose. A retry
    repeats a shard exactly. Small shards leave the engine half empty at their ends."""
    replicas: MayChange[Count] = 1
    """Engines that generate side by side."""
    min_replicas: MayChange[Count | None] = None
    """Smallest number of engines that generation goes on with. The others wait for room, e.g. on a node that joins.
    Not set: all ``replicas`` must fit."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources of one engine."""
    engine: EngineConfig = EngineConfig()
    """Arguments of each engine."""
    start_timeout_s: MayChange[Positive] = 900
    """Longest wait for an engine to be ready, in seconds. Loading and compiling a large model take minutes."""
    shard_timeout_s: MayChange[Positive] = 7200
    """Longest time without a finished shard, in seconds, before the stage fails."""
    max_failures: MayChange[Annotated[int, Field(ge=0)]] = 3
    """Restarts of a dead engine, and repeated attempts at one shard, before the stage fails."""


class ObjectiveConfig(Section):
    """The function that training minimises."""

    loss: NameOrPath[LossName] = "logistic"
    """Loss ℓ of the margin in equation 4.7, or the import path of a function, ``my_package.mine:loss``. Paper:
    logistic, log(1 + e^-m)."""
    beta: MayChange[PerIteration] = 0.1
    """Factor of each log-ratio in the margin, λ in the paper. A larger β keeps θ_{t+1} closer to θ_t. A list gives each
    iteration its own (paper: 0.1, 0.1, 0.1, 5.0)."""
    window: CountOrAll = 2
    """Number of iterations whose y′ an iteration learns from: its own and the window-1 before it. Paper: 2. ``all`` is
    fictitious play: the opponent is the uniform mixture of all iterates, and their stored y′ are used again."""
    reference_alpha: Fraction = 1.0
    """α of the reference p_t^α · p_0^(1-α). 1: the opponent θ_t (SPIN). 0: the initial model θ_0. Between them:
    α-SPIN (arXiv 2404.04291), whose fixed point is biased towards θ_0 on purpose."""
    length_normalised: bool = False
    """Division of each log-ratio by the tokens of its response. Off in the paper: its margins are sums. A β for sums is
    too small for means, by about the length of a response."""
    sft_weight: NonNegative = 0.0
    """Weight of an added -log p(y), the mean over the response tokens of a step. It anchors small models and large
    steps. Paper: 0."""
    keep_identical: bool = False
    """Use of pairs with y = y′. Their margin is always 0, so only ``sft_weight`` learns from them. Without them the
    anchor rests on the prompts that the model answers differently, mostly those that it gets wrong."""

    def oldest_iteration(self, iteration: int) -> int:
        """Returns the first iteration whose y′ are still in the window of ``iteration``; it may be negative."""
        return 0 if self.window == "all" else iteration - self.window + 1


class ScorerConfig(Section):
    """The preference model of SPPO, which estimates P(one response beats the other)."""

    path: str
    """Model folder (safetensors), or a hub name where a hub is reachable."""
    kind: Literal["reward", "pairrm"] = "reward"
    """Kind of model. ``reward``: a sequence classifier with one output; P = σ(difference of rewards). ``pairrm``: a
    model like llm-blender/PairRM-hf, which reads both responses together. Paper of SPPO: PairRM."""
    max_length: Count = 2048
    """Longest input in tokens. Longer texts lose their end, as in PairRM."""
    replicas: Count = 1
    """Preference models that work side by side."""
    resources: Identity[ResourcesConfig] = ResourcesConfig()
    """Resources of one preference model."""


class SelfFilterConfig(Section):
    """Self-reinforcement's choice among the model's own answers to unlabelled questions."""

    min_agreement: Fraction = 0.5
    """Smallest fraction of a question's samples that must agree on its commonest answer; other questions are dropped.
    ``evaluation.answer_extractor`` reads the answer, else the whole response is compared. A departure: in the paper the
    model judges its answers in words, which small models cannot."""


class OptimizerConfig(Section):
    """The optimizer and the course of its learning rate."""

    name: NameOrPath[OptimizerName] = "rmsprop"
    """Optimizer, or the import path of a class, ``my_package.mine:Optimizer``. Paper: RMSProp."""
    weight_decay: NonNegative = 0.0
    """Weight decay, as torch's optimizer of that name applies it. Paper: 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up. Paper: linear decay to 0."""
    warmup_fraction: Fraction = 0.1
    """Fraction of the steps over which the learning rate rises linearly. Paper: 0.1."""
    max_grad_norm: Positive = 1.0
    """Largest global norm of the gradients; larger gradients are scaled down to it."""


class LoraConfig(Section):
    """Low-rank adapters that are trained in place of all weights, which then need no gradients and no optimizer state.

    A departure from the paper. Each iterate is exported merged, so the next opponent is a plain model again.
    """

    rank: Count = 16
    """Rank of the change that one iteration can make to a weight matrix. A higher rank learns more and needs more
    memory."""
    alpha: Count = 32
    """Scale of the change, which is multiplied by alpha / rank. Adapters want a learning rate 10 to 100 times that of
    all weights."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter, e.g. ``[q_proj, v_proj]``. ``all-linear``: every linear layer but the
    head."""


class TrainConfig(Section):
    """The stage that trains θ_{t+1} from θ_t on the pairs of an iteration."""

    backend: NameOrPath[BackendName] = "fsdp2"
    """Library that holds and shards the model: torch's FSDP2, DeepSpeed's ZeRO (extra ``deepspeed``), or the import
    path of a class, ``my_package.mine:Backend``."""
    workers: Count = 1
    """Train workers. Parameters, gradients and optimizer state are sharded over them."""
    min_workers: MayChange[Count | None] = None
    """Smallest number of workers for elastic training (FSDP2 only). When nodes are lost, training goes on with as few
    from the last checkpoint, and grows to ``workers`` when nodes join. Only the order in which gradients are summed
    differs. Not set: always ``workers``."""
    resize_interval_s: MayChange[NonNegative] = 300
    """Seconds between two attempts of an elastic group to grow. Each growth repeats the steps since the last
    checkpoint."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources of one worker: one GPU (NCCL) or none (gloo)."""
    learning_rate: MayChange[PerIteration] = 5e-7
    """Highest learning rate, at the end of the warm-up. A list gives each iteration its own (paper: 5e-7, 5e-7, 1e-7,
    1e-7)."""
    epochs: MayChange[PerIterationCount] = 2
    """Passes over the pairs of an iteration. A list gives each iteration its own. Paper: 2."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, a fresh one for every iteration."""
    lora: LoraConfig | None = None
    """Adapters (PEFT, extra ``lora``) in place of all weights; the ``sft`` warm-up always trains all. Not set: all
    weights, as in the paper."""
    global_batch_pairs: Count = 64
    """Pairs per optimizer step, over all workers. Paper: 64."""
    pack_length: Count = 4096
    """Tokens per pack, one micro-batch of one worker. It must hold a prompt with both responses: at least
    ``model.max_length`` + ``generation.sampling.max_tokens``. Longer packs use the hardware better and need more
    memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the computation. ``auto`` is bf16 on GPUs and, on CPUs, whichever of the two multiplies faster
    on this machine. A run keeps the precision that it began with. Master weights, gradients and optimizer state are
    always fp32, because at a learning rate of 1e-7 an update is below what bf16 can resolve."""
    gradient_checkpointing: bool = False
    """Computation of activations a second time in the backward pass: about a third slower, far less memory."""
    sharding: MayChange[Literal["full", "shard_grad_op"]] = "full"
    """Sharding of the weights. ``full`` (ZeRO-3) gathers each layer's weights in each forward and backward pass.
    ``shard_grad_op`` (ZeRO-2) gathers them once per optimizer step: far less traffic, but each worker holds one whole
    copy of the weights."""
    reduce_every_pack: MayChange[bool] = False
    """Summing of gradients over the workers after each pack, not once per step. Off: each worker holds the whole
    gradients of its earlier packs, 4 bytes per parameter. On: more traffic, for models whose gradients do not fit."""
    offload: MayChange[bool] = False
    """Storage of a worker's shard of weights, gradients and optimizer state in the CPU's memory, where the optimizer
    steps, too. The GPU then holds activations and the layer at work. Slower; for models that do not fit otherwise."""
    checkpoint_every_steps: MayChange[Count] = 200
    """Optimizer steps between checkpoints, and so the most that a killed worker can lose."""
    max_failures: MayChange[Annotated[int, Field(ge=0)]] = 3
    """Restarts of the worker group in one iteration before the run fails."""
    start_timeout_s: MayChange[Positive] = 600
    """Longest wait for the workers to be placed and to meet, in seconds."""
    stall_timeout_s: MayChange[Positive] = 86_400
    """Longest time without a finished step, in seconds, before the workers count as stuck. Scoring all pairs, or a
    whole evaluation, counts as one step, so the default is a day."""


class SftConfig(Section):
    """The optional warm-up that makes θ_0 from a base model by supervised fine-tuning on the same rows."""

    epochs: Count = 1
    """Passes over the rows. SPIN is meant for a model that another pass would no longer improve."""
    learning_rate: Positive = 2e-5
    """Highest learning rate. Paper's start model (zephyr-7b-sft-full): 2e-5."""
    global_batch_rows: Count = 64
    """Rows per optimizer step, over all workers."""
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", schedule="cosine")
    """Optimizer. AdamW with cosine decay is usual for supervised fine-tuning."""


class ReviserConfig(SftConfig):
    """The reviser of SEFT: a model that reads a question with the policy's answer and writes ``[keep]``, ``[minor]`` or
    ``[major]`` with a better answer.

    It is fine-tuned from θ_0, on θ_0's answers to the labelled prompts and on the human responses.
    """

    minor_from: Fraction = 0.5
    """Smallest similarity of answer and human response, from 0 to 1 by their tokens, at which a revision is labelled
    minor. Equal ones are labelled keep. A departure: the paper has a reward model tell them apart."""


class HealthConfig(Section):
    """Limits at which a run stops by itself because training is destroying the model. ``null`` switches one off.

    A loss or gradient that is not finite always stops all workers before the optimizer steps. Training is then tried
    again from the last checkpoint, ``train.max_failures`` times.
    """

    steps: Count = 5
    """Number of last steps over whose mean the loss, margin and log p(y) are checked."""
    max_loss: Positive | None = None
    """Highest loss. The logistic loss starts each iteration at ln 2. Off by default: a collapse may lower the loss."""
    max_margin: Positive | None = 30.0
    """Largest absolute margin. A healthy iteration ends with a few nats times beta."""
    max_real_logp_drop: Positive | None = 0.5
    """Largest fall of log p(y) within an iteration, as a fraction of its size: at 0.5, -100 nats may become -150."""
    max_length_change: Annotated[float, Field(gt=1)] | None = 4.0
    """Largest factor by which the mean length of y′ may grow or shrink, compared with that of θ_0."""


class EvaluationConfig(Section):
    """The measurement of each iterate on the held-out rows."""

    answer_extractor: Literal["none", "equals", "hashes"] = "none"
    """Way to read the number in a response, for rows that have an ``answer``. ``equals``: after the last ``=``.
    ``hashes``: after the last ``####``."""
    max_rows: Count | None = None
    """Number of held-out rows that are used, from the first. Not set: all."""


class ServingConfig(Section):
    """The endpoint of ``spin-ray serve``: its iterates, its engines, and limits on requests."""

    models: tuple[str, ...] = ("sft", "latest")
    """Iterates that have an engine: ``sft``, ``iter-0``, …, ``latest`` (follows RUN/LATEST), or ``all``."""
    host: str = "127.0.0.1"
    """Address that the server listens at. Others than this machine's need ``keys`` and Ray's token authentication."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port."""
    keys: str | None = None
    """File of hashed API keys; ``spin-ray serve-key`` makes its lines. Not set: whoever reaches the port may ask."""
    requests_per_minute: Count | None = None
    """Requests a minute per key; a key's own line overrides it. Without ``keys``: of all clients together. Not set: no
    limit."""
    max_concurrent: Count = 64
    """Answers that one ingress replica makes at once. Further requests get status 503 with Retry-After; none waits."""
    max_tokens: Count = 1024
    """Longest answer in tokens that a request may ask for, and its length if it names none."""
    max_body_bytes: Count = 2**20
    """Largest body of a request, in bytes. Larger ones are refused while they arrive."""
    body_timeout_s: Positive = 30
    """Longest wait for the whole body of a request, in seconds."""
    request_timeout_s: Positive = 600
    """Longest time for an answer, in seconds. Streams may go on for as long while their engine is replaced or the
    server stops."""
    stream_interval_s: NonNegative = 0.1
    """Seconds between two pieces of a stream after the first. Each piece costs Ray Serve milliseconds of CPU."""
    replicas: Count = 1
    """Engines per iterate."""
    max_replicas: Count = 1
    """Most engines per iterate under load. More than ``replicas``: Ray Serve adds engines as requests come."""
    target_ongoing_requests: Count = 32
    """Requests per engine that autoscaling aims at."""
    ingress_replicas: Count = 1
    """Processes that check, route and stream. Rates and ``max_concurrent`` hold in each of them."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources of one engine. While ``latest`` moves on, one engine more must fit."""
    engine: EngineConfig | None = None
    """Arguments of the engines. Not set: those of ``generation.engine``."""
    follow_interval_s: Positive = 2
    """Seconds between two looks at RUN/LATEST."""
    start_timeout_s: Positive = 900
    """Longest wait, in seconds, for an engine to be placed, to load and to answer a first request."""
    retry_failed_s: Positive = 60
    """Seconds before a new attempt at an iterate whose files were damaged or whose engine did not start."""
    drain_grace_s: NonNegative = 5
    """Seconds from the last new request to an old engine until its shutdown."""
    log_prompts: bool = False
    """Messages and prompts in the access log. Off, because they may be private."""
    votes: str | None = None
    """Database URL (SQLAlchemy's) of the arena's votes. Not set: ``RUN/votes.sqlite``, which serves one machine with a
    disk of its own. Ingress replicas on several machines need a database server."""


class StopConfig(Section):
    """The rule that ends a run before ``iterations``: the opponent's held-out distance from the data no longer falls.

    The distance is ``jsd_lower_bound`` of each evaluation. It is the difference that this model could see after one
    iteration of training, so read it together with the examples.
    """

    patience: Count = 1
    """Iterations in a row without a new lowest distance before the run stops."""
    min_fall: NonNegative = 0.0
    """Nats by which a distance must be below the lowest so far to count as lower."""


class MlflowConfig(Section):
    """Logging to MLflow. Needs the package mlflow or mlflow-skinny (extra ``mlflow``)."""

    uri: str | None = None
    """Tracking server or folder. Not set: the folder ``mlruns`` in the run folder, which needs no server."""
    experiment: str = "spin_ray"
    """Name of the MLflow experiment; each run folder is one MLflow run in it."""


class WandbConfig(Section):
    """Logging to Weights & Biases. Needs the package wandb (extra ``wandb``)."""

    project: str = "spin_ray"
    """Name of the W&B project; each run folder is one W&B run in it."""
    mode: Literal["offline", "online"] = "offline"
    """``offline`` writes to ``RUN/wandb`` for ``wandb sync``. ``online`` needs WANDB_API_KEY in the environment."""


class TrackingConfig(Section):
    """The trackers that receive the numbers of a run."""

    tensorboard: bool = True
    """Event files in ``RUN/tensorboard``; ``tensorboard --logdir RUN`` shows them."""
    mlflow: MlflowConfig | None = None
    """MLflow. ``{}`` takes its defaults. Not set: off."""
    wandb: WandbConfig | None = None
    """Weights & Biases. ``{}`` takes its defaults. Not set: off."""


class StorageConfig(Section):
    """The run folder: the lease of its one driver, and the files that are kept."""

    lease_timeout_s: Positive = 60
    """Seconds without renewal after which a driver's lease has ended, and another driver may take over. On the same
    host the lease ends with the driver's process."""
    keep_checkpoints: bool = False
    """Training checkpoints of finished iterations. Off: they are deleted, because their optimizer state takes 8 bytes
    per parameter or more."""


class ClusterConfig(Section):
    """The Ray cluster that the run uses."""

    address: str | None = None
    """Address of a running Ray cluster; ``auto`` finds one. Not set: $RAY_ADDRESS, else Ray is started on this
    machine."""
    local_cpus: Count | None = None
    """Logical CPUs of the Ray that is started on this machine. Not set: all."""
    wait_for_nodes_s: NonNegative = 0
    """Longest wait, in seconds, for an autoscaling cluster to grow to the size that the stages need."""


class Settings(Section):
    """Every setting of a run, section by section."""

    model: ModelConfig
    """Start model: a fine-tuned model, or a base model for the warm-up ``sft``."""
    data: DataConfig
    """Training, held-out and unlabelled data."""
    iterations: MayChange[Count] = 4
    """Number of iterations, T of Algorithm 1. A finished run goes on when it is raised. Paper: 4."""
    algorithm: NameOrPath[AlgorithmName] = "spin"
    """Algorithm of the family (docs/algorithms.md), or the import path of a class, ``my_package.mine:Algorithm``. It
    chooses the prompts, makes the pairs and sets the objective of an iteration."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every random choice: order of the rows, slices of the prompts, each response."""
    sft: SftConfig | None = None
    """Warm-up before iteration 0. ``{}`` takes its defaults. Not set: the start model is θ_0."""
    scorer: ScorerConfig | None = None
    """Preference model; ``sppo`` needs it and no other algorithm reads it."""
    self_filter: SelfFilterConfig | None = None
    """Filter of the model's own answers in ``self_reinforcement``. Not set: every answer is learnt from."""
    reviser: ReviserConfig | None = None
    """Reviser; ``seft`` needs it and no other algorithm reads it."""
    generation: GenerationConfig = GenerationConfig()
    """Generation of responses by the opponent."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Function that training minimises."""
    train: TrainConfig = TrainConfig()
    """Training of each iteration."""
    health: MayChange[HealthConfig] = HealthConfig()
    """Limits at which a run stops by itself."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurement on the held-out rows."""
    stop_when: MayChange[StopConfig | None] = None
    """Rule that ends the run early. ``{}`` takes its defaults. Not set: all ``iterations`` are done."""
    tracking: MayChange[TrackingConfig] = TrackingConfig()
    """Trackers that receive the numbers beside the run folder."""
    serving: MayChange[ServingConfig] = ServingConfig()
    """Endpoint of ``spin-ray serve``; a run does not read it."""
    storage: MayChange[StorageConfig] = StorageConfig()
    """Lease and kept files of the run folder."""
    cluster: MayChange[ClusterConfig] = ClusterConfig()
    """Ray cluster."""
