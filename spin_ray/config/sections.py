"""Every setting of a run, its default and its reason.

A recipe is a YAML file with these sections; unknown keys, impossible values and impossible combinations are errors at
load, all listed at once. Defaults follow the SPIN paper (arXiv 2401.01335, section 6.1 and appendix B)
where it gives a value.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from spin_ray.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
T = TypeVar("T")


_ONE, _LIST, _WORD = "<one>", "<list>", "<word>"
_one_or_list = Discriminator(lambda value: _LIST if isinstance(value, list | tuple) else _ONE)
"""Chooses the kind by what was written, so that an error speaks of that kind only."""
PerIteration = Annotated[Annotated[Positive, Tag(_ONE)] | Annotated[tuple[Positive, ...], Tag(_LIST)], _one_or_list]
PerIterationCount = Annotated[Annotated[Count, Tag(_ONE)] | Annotated[tuple[Count, ...], Tag(_LIST)], _one_or_list]
_one_or_word = Discriminator(lambda value: _WORD if isinstance(value, str) else _ONE)
CountOrAll = Annotated[Annotated[Count, Tag(_ONE)] | Annotated[Literal["all"], Tag(_WORD)], _one_or_word]


AlgorithmName = Literal["spin", "continued_sft", "dpo", "sppo", "self_reinforcement", "seft"]


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
    custom: dict[str, Positive] = {}
    """Custom Ray resources, e.g. ``{"accelerator_type:H100": 0.001}``."""
    labels: dict[str, str] = {}
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
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the GPU's memory for weights and key-value cache."""
    cpu_kv_cache_gib: Count = 2
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
    replicas: Count = 1
    """Engines that generate side by side."""
    min_replicas: Count | None = None
    """Go on with as few as this; those that find no room wait, and play as soon as a node joins. Not set: ``replicas``
    must fit."""
    resources: ResourcesConfig = ResourcesConfig()
    """Per engine."""
    engine: EngineConfig = EngineConfig()
    """How vLLM is started."""
    start_timeout_s: Positive = 900
    """Longest wait for an engine to be ready."""
    shard_timeout_s: Positive = 7200
    """Longest wait without any shard being finished."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of an engine that dies, and further attempts at a shard, before the stage fails."""


class ObjectiveConfig(Section):
    loss: Literal["logistic", "hinge", "exponential", "correlation"] = "logistic"
    """ℓ of equation 4.7. Paper: logistic, log(1 + e^-m)."""
    beta: PerIteration = 0.1
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
    resources: ResourcesConfig = ResourcesConfig()
    """Per judge."""


class SelfFilterConfig(Section):
    """Self-reinforcement: which of the model's own answers to unlabelled questions are worth learning from."""

    min_agreement: Fraction = 0.5
    """Least share of a question's samples that give its commonest answer (read by ``evaluation.answer_extractor``; else
    the whole response). A departure: the paper lets the model judge its answers in words, which small ones cannot."""


class OptimizerConfig(Section):
    name: Literal["rmsprop", "adamw"] = "rmsprop"
    """Paper: RMSProp."""
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
    backend: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """What holds and shards the model: torch's own FSDP2, or DeepSpeed's ZeRO (the extra ``deepspeed``)."""
    workers: Count = 1
    """Train workers; parameters, gradients and optimizer state are sharded over them."""
    min_workers: Count | None = None
    """Elastic training (FSDP2 only): when nodes are lost, go on with as few as this from the last checkpoint, and take
    up to ``workers`` again when nodes join. The result is the same but for the order in which gradients are summed. Not
    set: always ``workers``."""
    resize_interval_s: NonNegative = 300
    """How often an elastic group looks whether it can grow; growing, too, goes on from the last checkpoint."""
    resources: ResourcesConfig = ResourcesConfig()
    """Per worker. Workers with a GPU use NCCL, others gloo."""
    learning_rate: PerIteration = 5e-7
    """Peak; a list gives each iteration its own. Paper: 5e-7, 5e-7, 1e-7, 1e-7."""
    epochs: PerIterationCount = 2
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
    """Number format of the computation. ``auto`` is bf16 on GPUs and, on CPUs, the faster one; a run keeps what it
    began with. Master weights, gradients and optimizer state are fp32 always: at a learning rate of 1e-7 an update is
    below what bf16 can resolve."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    sharding: Literal["full", "shard_grad_op"] = "full"
    """``full`` (ZeRO-3) gathers each layer's weights anew in each forward and backward pass. ``shard_grad_op`` (ZeRO-2)
    gathers once per optimizer step: far less traffic, for one whole copy of the weights per worker."""
    reduce_every_pack: bool = False
    """Sum gradients over the workers after each pack, not once per step. Off: every worker holds the gradients of its
    earlier packs whole, 4 bytes per parameter. On: more traffic, for models whose gradients would not fit so."""
    offload: bool = False
    """Keep a worker's share of weights, gradients and optimizer state in the CPU's memory and step there: what is left
    on the GPU is what a layer needs at the moment, and activations. Slower; for models that do not fit otherwise."""
    checkpoint_every_steps: Count = 200
    """Steps between checkpoints: what a killed worker can lose."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of the worker group in one iteration before the run fails."""
    start_timeout_s: Positive = 600
    """Longest wait for the workers to be placed and to meet."""
    stall_timeout_s: Positive = 86_400
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


class SpinConfig(Section):
    """One run. Example: ``SpinConfig(model={"path": "sft-model"}, data={"train": "sft.jsonl"}, iterations=2)``."""

    model: ModelConfig
    """What is trained: the SFT model, or the base model that ``sft`` makes one of."""
    data: DataConfig
    """What it learns from."""
    iterations: Count = 4
    """T of Algorithm 1. Paper: iterations 0 to 3. May be raised later: the same command then goes on."""
    algorithm: AlgorithmName = "spin"
    """What an iteration plays, how its pairs are made, and the loss they feed (docs/algorithms.md)."""
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
    health: HealthConfig = HealthConfig()
    """When it stops by itself."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured on the held-out rows."""
    stop_when: StopConfig | None = None
    """A rule that ends the run early; ``{}`` takes its defaults, none when not set. May be changed between calls."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the numbers go beside the run folder."""
    serving: ServingConfig = ServingConfig()
    """How ``spin-ray serve`` answers; a run does not read it."""
    storage: StorageConfig = StorageConfig()
    """What is kept, and how one driver at a time is ensured."""
    cluster: ClusterConfig = ClusterConfig()
    """Where it runs."""

    @model_validator(mode="after")
    def _combinations_are_possible(self) -> Self:
        problems = list(_impossible(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def decided(self, engine: EngineConfig) -> EngineConfig:
        """The engine's settings without ``auto``."""
        if engine.dtype != "auto":
            return engine
        return engine.model_copy(update={"dtype": "bfloat16" if self.train.precision == "bf16" else "float32"})

    def at(self, iteration: int) -> IterationSettings:
        """The values that a list may give each iteration its own of."""
        return IterationSettings(
            beta=_pick(self.objective.beta, iteration),
            learning_rate=_pick(self.train.learning_rate, iteration),
            epochs=_pick(self.train.epochs, iteration),
        )

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run, flattened to ``{"section.field": value}``.

        Left out: where and how fast it runs, and what may grow (``iterations``) or is checked per iteration by its own
        stage (the values that may be lists).
        """
        flat = flatten(self.model_dump(mode="json"))
        return {key: value for key, value in flat.items() if not key.startswith(_NOT_IDENTITY)}


class IterationSettings(Section):
    """The values of one iteration, lists resolved."""

    beta: float
    learning_rate: float
    epochs: int


_NOT_IDENTITY = (
    "iterations", "stop_when", "tracking.", "cluster.", "storage.", "health.", "serving.",
    "objective.beta", "train.learning_rate", "train.epochs", "train.max_failures", "train.checkpoint_every_steps",
    "train.sharding", "train.reduce_every_pack", "train.offload", "train.start_timeout_s", "train.stall_timeout_s",
    "train.min_workers", "train.resize_interval_s", "train.resources.custom", "train.resources.labels",
    "generation.replicas", "generation.min_replicas", "generation.max_failures", "generation.start_timeout_s",
    "generation.shard_timeout_s", "generation.resources.custom", "generation.resources.labels",
    "generation.engine.gpu_memory_utilization", "generation.engine.cpu_kv_cache_gib",
)  # fmt: skip


_CREDENTIALS = re.compile(r"://[^/]*:[^/]*@|[?&][^=]*(secret|token|password|access_key)[^=]*=", re.IGNORECASE)


def _pick(value: T | tuple[T, ...], iteration: int) -> T:
    return value[iteration] if isinstance(value, tuple) else value


def _impossible(config: SpinConfig) -> Iterator[str]:
    """Combinations that no run can satisfy, one sentence each."""
    for name, value in [
        ("objective.beta", config.objective.beta),
        ("train.learning_rate", config.train.learning_rate),
        ("train.epochs", config.train.epochs),
    ]:
        if isinstance(value, tuple) and len(value) != config.iterations:
            yield f"{name}: has {len(value)} values for {config.iterations} iterations; give one value or one for each"
    if config.generation.sampling.max_tokens >= config.model.max_length:
        yield (
            f"generation.sampling.max_tokens: {config.generation.sampling.max_tokens} leaves no room for a prompt "
            f"within model.max_length {config.model.max_length}; lower it or raise max_length"
        )
    longest_tree = config.model.max_length + config.generation.sampling.max_tokens
    if config.train.pack_length < longest_tree:
        yield (
            f"train.pack_length: {config.train.pack_length} cannot hold a prompt with both responses; raise it to "
            f"{longest_tree} (model.max_length + generation.sampling.max_tokens) or lower those"
        )
    gpus, parallel = config.generation.resources.gpus, config.generation.engine.tensor_parallel_size
    if gpus and gpus >= 1 and gpus != parallel:
        yield f"generation.resources.gpus: {gpus:g} must equal generation.engine.tensor_parallel_size {parallel}"
    if not gpus and parallel > 1:
        yield f"generation.engine.tensor_parallel_size: {parallel} needs generation.resources.gpus: {parallel}"
    if config.train.resources.gpus not in (0, 1):
        yield f"train.resources.gpus: {config.train.resources.gpus:g}; a train worker drives exactly one GPU, or none"
    for field, most, least in [
        ("train.min_workers", config.train.workers, config.train.min_workers),
        ("generation.min_replicas", config.generation.replicas, config.generation.min_replicas),
    ]:
        if least is not None and least > most:
            yield f"{field}: {least} is more than the {most} of {field.replace('min_', '')}"
    if config.train.min_workers is not None and config.train.backend == "deepspeed":
        yield "train.min_workers: DeepSpeed's checkpoints are of one number of workers; use train.backend: fsdp2"
    for name, uri in [
        ("model.path", config.model.path), ("data.train", config.data.train), ("data.heldout", config.data.heldout),
    ]:  # fmt: skip
        if uri and _CREDENTIALS.search(uri):
            yield f"{name}: holds credentials, which would be written to run.json; give them by environment variables"
    if "hf_token" in config.generation.engine.extra:
        yield "generation.engine.extra.hf_token: would be written to run.json; give it by $HF_TOKEN"
    if config.evaluation.answer_extractor != "none" and config.data.heldout is None:
        yield "evaluation.answer_extractor: needs data.heldout"
    if config.stop_when is not None and config.data.heldout is None:
        yield "stop_when: patience and min_fall need data.heldout"
    yield from _impossible_for_algorithm(config)
    owned = {"model", "tokenizer", "dtype", "seed", "max_model_len", "generation_config", "skip_tokenizer_init"}
    owned |= {"trust_remote_code", "load_format", "enable_prefix_caching"}
    owned |= set(EngineConfig.model_fields)
    for key in sorted(owned & set(config.generation.engine.extra)):
        yield f"generation.engine.extra.{key}: is set by spin_ray; use the field of its own"


_NEEDS = {
    "sppo": ("scorer",),
    "self_reinforcement": ("sft", "data.questions"),
    "seft": ("reviser",),
}
"""Sections and fields that an algorithm cannot do without."""
_SERVES = {
    "scorer": ("sppo",),
    "self_filter": ("self_reinforcement",),
    "reviser": ("seft",),
    "data.questions": ("self_reinforcement", "seft"),
}
"""Optional sections and fields, and the algorithms that read them."""


def _impossible_for_algorithm(config: SpinConfig) -> Iterator[str]:
    def given(name: str) -> bool:
        section, _, field = name.partition(".")
        value = getattr(config, section)
        return (getattr(value, field) if field else value) is not None

    name = config.algorithm
    for needed in _NEEDS.get(name, ()):
        if not given(needed):
            yield f"{needed}: algorithm {name} needs it"
    for optional, readers in _SERVES.items():
        if given(optional) and name not in readers:
            yield f"{optional}: is for algorithm {' and '.join(readers)}, not for {name}; leave it out"
    default = ObjectiveConfig()
    if name != "spin":
        for field in ("window", "reference_alpha"):
            if field == "window" and config.objective.window == 1:
                continue
            if getattr(config.objective, field) != getattr(default, field):
                yield f"objective.{field}: is for algorithm spin; {name} learns from the responses of its iteration"
    if name == "sppo":
        if config.objective.loss != default.loss:
            yield "objective.loss: sppo has a loss of its own; leave it out"
        if config.generation.samples_per_prompt < 2:
            yield "generation.samples_per_prompt: sppo compares samples of a prompt; give 2 or more (paper: 5)"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_config(recipe: str | Path, overrides: dict[str, str] | None = None) -> SpinConfig:
    """Reads a recipe and applies ``{"section.field": "YAML value"}`` on top.

    Raises:
        ConfigError: the file cannot be read, or its content is wrong; every problem is listed.
    """
    try:
        text = Path(recipe).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe}: cannot be read ({error})") from error
    content = _parse_yaml(text, source=str(recipe))
    if not isinstance(content, dict):
        raise ConfigError(f"{recipe}: must hold sections (model, data, …), found {type(content).__name__}")
    for key, text in (overrides or {}).items():
        _set(content, key, text)
    return parse_config(content, source=str(recipe))


def override(config: SpinConfig, overrides: dict[str, str]) -> SpinConfig:
    """``config`` with ``{"section.field": "YAML value"}`` on top; a ConfigError lists what cannot be."""
    content = config.model_dump(mode="json")
    for key, text in overrides.items():
        _set(content, key, text)
    return parse_config(content, source="the settings given")


def parse_config(content: dict[str, Any], source: str) -> SpinConfig:
    """Validates ``content``; ``source`` is named in the error, which lists every problem."""
    try:
        return SpinConfig.model_validate(content)
    except ValidationError as error:
        problems = [line for detail in error.errors() for line in _explain(detail)]
        problems += _impossible_besides(content, error.errors())
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def _explain(detail: Any) -> list[str]:
    where = _where(detail)
    if detail["type"] == "extra_forbidden":
        return [f"{where}: unknown key"]
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"]).split("\n")
    shown = repr(detail["input"])
    given = "" if detail["type"] == "missing" else f" (got {shown if len(shown) <= 80 else shown[:77] + '…'})"
    reason = "must be a section with fields of its own" if detail["type"] == "model_type" else detail["msg"].lower()
    return [f"{where}: {reason}{given}"]


def _where(detail: Any) -> str:
    """The place as the recipe writes it, e.g. ``objective.beta.1``."""
    return ".".join(str(part) for part in detail["loc"] if part not in (_ONE, _LIST, _WORD))


def _impossible_besides(content: dict[str, Any], details: list[Any]) -> list[str]:
    """Impossible combinations of values that are right by themselves; pydantic looks at none while one is wrong."""
    rest = copy.deepcopy(content)
    doubtful = []
    for detail in details:
        _drop(rest, detail["loc"])
        # Behind an unknown key may be a misspelt field: then nothing of its section is known.
        where = _where(detail)
        doubtful.append(where.rpartition(".")[0] if detail["type"] == "extra_forbidden" else where)
    for section, field in (("model", "path"), ("data", "train")):
        rest.setdefault(section, {}).setdefault(field, "")
    try:
        SpinConfig.model_validate(rest)
    except ValidationError as error:
        problems = [line for detail in error.errors() if detail["type"] == "value_error" for line in _explain(detail)]
        return [problem for problem in problems if not any(name in problem for name in doubtful)]
    return []


def _drop(tree: Any, path: tuple[Any, ...]) -> None:
    """Removes the deepest key of ``path`` that is there."""
    holder, key = None, None
    for part in path:
        if not isinstance(tree, dict) or part not in tree:
            break
        holder, key, tree = tree, part, tree[part]
    if holder is not None:
        del holder[key]


def _set(content: dict[str, Any], key: str, text: str) -> None:
    *sections, field = key.split(".")
    for section in sections:
        child = content.setdefault(section, {})
        if child is None:
            child = content[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {section} is a value, not a section")
        content = child
    content[field] = _parse_yaml(text, source=f"--{key}={text}")


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets its converters' own errors through, e.g. ValueError for the date 2024-13-45.
        raise ConfigError(f"{source}: is not YAML: {' '.join(str(error).split())}") from error
