"""Every setting of a run, its default and its reason.

Reading a recipe (YAML) lists all wrong keys, values and combinations at once. "Paper:" marks the values of the SPIN
paper (arXiv 2401.01335, section 6.1 and appendix B), which are the defaults.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from spin_ray.config.algorithms import AlgorithmName
from spin_ray.config.paths import without_scheme

T = TypeVar("T")


def _no_flag(value: Any) -> Any:
    """Refuses YAML's true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "input should be a number")
    return value


def _parted(value: Any) -> Any:
    """Parts a text at its commas, as people write a list on a command line."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


_number = BeforeValidator(_no_flag)
Words = Annotated[tuple[str, ...], BeforeValidator(_parted)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _number]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _number]
Fraction = Annotated[float, Field(ge=0, le=1), _number]
PositiveFraction = Annotated[float, Field(gt=0, le=1), _number]
HeldOut = Annotated[float, Field(gt=0, le=0.5), _number]
Count = Annotated[int, Field(ge=1), _number]
CountOrZero = Annotated[int, Field(ge=0), _number]

ONE, LIST, WORD, NAME, PATH = TAGS = "<one>", "<list>", "<word>", "<name>", "<path>"
"""Tags for the kinds of value of one setting; pydantic writes them into an error's location."""
_one_or_list = Discriminator(lambda value: LIST if isinstance(value, list | tuple) else ONE)
_one_or_word = Discriminator(lambda value: WORD if isinstance(value, str) else ONE)
_name_or_path = Discriminator(lambda value: PATH if isinstance(value, str) and ":" in value else NAME)

PerIteration = Annotated[Annotated[Positive, Tag(ONE)] | Annotated[tuple[Positive, ...], Tag(LIST)], _one_or_list]
PerIterationCount = Annotated[Annotated[Count, Tag(ONE)] | Annotated[tuple[Count, ...], Tag(LIST)], _one_or_list]
AutoOrOne = Annotated[Annotated[T, Tag(ONE)] | Annotated[Literal["auto"], Tag(WORD)], _one_or_word]
AutoOrFlag = Annotated[Annotated[bool, Tag(ONE)] | Annotated[Literal["auto"], Tag(WORD)], _one_or_word]
CountOrAll = Annotated[Annotated[Count, Tag(ONE)] | Annotated[Literal["all"], Tag(WORD)], _one_or_word]
ImportPath = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")]
"""Path to a user's class or function, e.g. ``my_package.mine:Name``. Reading a recipe checks only its form."""
NameOrPath = Annotated[Annotated[T, Tag(NAME)] | Annotated[ImportPath, Tag(PATH)], _name_or_path]

MAY_CHANGE, IDENTITY = object(), object()
MayChange = Annotated[T, MAY_CHANGE]
"""A setting that may change between two calls of one run. All other settings are the run's identity."""
Identity = Annotated[T, IDENTITY]
"""A section that belongs to the run's identity as a whole."""

FormName = Literal[
    "chosen_rejected", "prompt_chosen_rejected", "messages", "sharegpt", "real_generated", "prompt_completion",
    "prompt_response", "alpaca", "orca", "question_answer", "sharegpt_preferred",
    "alpaca_preferred",
]  # fmt: skip
GradeName = Literal["number", "exact", "regex", "multiple_choice", "json"]
LossName = Literal["logistic", "hinge", "exponential", "correlation", "space"]
OptimizerName = Literal["rmsprop", "adamw", "adamw_8bit", "muon"]
BackendName = Literal["fsdp2", "deepspeed"]


class Section(BaseModel):
    """Base of every section: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


PathOrUri = Annotated[str, AfterValidator(without_scheme)]
"""A path of this machine, perhaps written as ``file://`` URI, or the URI of a store or hub."""


class ModelConfig(Section):
    """The model that the run starts from."""

    path: PathOrUri
    """Model folder (safetensors), ``embedded:NAME``, or ``owner/name`` or ``owner/name@revision`` of a hub. An adapter
    (PEFT) is merged with its base model once, in the cache; the run starts from the merged model."""
    revision: str | None = None
    """Branch, tag or commit of a hub's model. Not set: that of ``path``, else the newest."""
    base: str | None = None
    """Base model of the adapter at ``path``. Not set: the base that the adapter names."""
    max_length: Count = 2048
    """Longest prompt + response in tokens. Longer rows go to quarantine. Memory grows with it. Paper: 2048."""
    chat_template: str | None = None
    """File with a Jinja chat template. Not set: the tokenizer's own, which some lack."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, e.g. ``{enable_thinking: false}``, for every conversation."""
    trust_remote_code: bool = False
    """Permission to run Python code from the model folder. Off: folders with code or pickled weights are refused."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    """Layout of the sequences that are scored. ``packed`` needs a model that takes a 4-D mask and position ids.
    ``padded`` works with any causal language model at 2 to 4 times the cost. ``auto`` takes ``packed`` where it gives
    the same scores as the model itself."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_the_users(cls, given: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(given.keys() & OWN_TEMPLATE_VARIABLES):
            raise ValueError(f"model.chat_template_kwargs.{own[0]}: is set by spin_ray; take it out")
        return given


OWN_TEMPLATE_VARIABLES = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
    "return_assistant_tokens_mask", "strftime_now", "raise_exception",
}  # fmt: skip
"""Arguments of ``apply_chat_template``, and functions that templates may call."""


class Source(Section):
    """One of several sources of rows. Without ``weight`` and ``rows`` it gives all its rows."""

    path: PathOrUri
    """A file, folder, glob or URI."""
    weight: Positive | None = None
    """Share of rows, relative to other sources with a weight. The scarcest of them gives all its rows."""
    rows: Count | None = None
    """Number of rows, drawn at random with the run's seed."""

    @model_validator(mode="after")
    def _has_one_measure(self) -> Source:
        if self.weight is not None and self.rows is not None:
            raise ValueError(f"{self.path} has both weight and rows; give one of them")
        return self


_Sources = Annotated[tuple[Source, ...], Field(min_length=1)]
OneOrSources = Annotated[Annotated[PathOrUri, Tag(ONE)] | Annotated[_Sources, Tag(LIST)], _one_or_list]
Train = str | tuple[Source, ...]


def sources_of(train: Train | None) -> tuple[Source, ...]:
    """Returns the sources of a setting such as ``data.train``; a single path becomes one whole source."""
    return (Source(path=train),) if isinstance(train, str) else train or ()


def name_of(train: Train | None) -> str:
    """Returns the paths of a setting such as ``data.train`` in one line."""
    return ", ".join(source.path for source in sources_of(train))


class DataConfig(Section):
    """The conversations that the run learns from and is measured on."""

    train: OneOrSources
    """Training data: a file, folder, glob or URI, or a list of several, ``[{path: a.jsonl, weight: 3}, …]``.
    docs/data.md has the kinds of files and the forms of rows."""
    form: FormName | None = None
    """Form of the rows (docs/data.md). Not set: recognised from the columns."""
    columns: dict[str, str] = {}
    """Names of the form's columns in the files, e.g. ``{prompt: question}``."""
    questions: OneOrSources | None = None
    """Unlabelled questions for ``self_reinforcement`` and ``seft``, as ``prompt`` or ``messages``. A last turn of the
    assistant is not read. One source, or a list of several, as for ``train``."""
    heldout: OneOrSources | None = None
    """Rows like those of ``train``, one source or a list of several. None of them is trained on, also where
    ``evaluation.max_rows`` measures on fewer. Not set: no evaluation, unless ``heldout_fraction`` is."""
    heldout_fraction: HeldOut | None = None
    """Fraction of the conversations of ``train`` that are held out, e.g. 0.02, where there are no rows for ``heldout``.
    A digest of a conversation's first question decides. Not set: none."""
    prompts_per_iteration: Count | None = None
    """Number of prompts per iteration, in a seeded order that wraps round. Not set: all. Fewer prompts make shorter
    iterations, so y′ comes from a more recent model."""
    max_rows: Count | None = None
    """Number of training rows, and of questions, from the first. Not set: all. Not for several sources, which have
    ``rows``."""
    turns: Literal["last", "first", "all"] = "last"
    """Assistant messages that are taken as responses: the ``last`` of a conversation, the ``first`` (the paper's), or
    ``all``, each in a row of its own."""
    system: str | None = None
    """System message for conversations without one. Not set: the chat template's default."""
    keep_leaks: bool = False
    """Training on rows that are also held out. Off: such rows are removed from training, and counted."""
    max_quarantine_fraction: Fraction = 0.05
    """Fraction of a source's rows that may be unusable; with more the run stops, as many hint at a mistake in the
    data."""

    @property
    def heldout_from(self) -> Train | None:
        """Sources of the held-out rows: ``heldout``, or with a fraction ``train``; None without such rows."""
        return self.heldout if self.heldout_fraction is None else self.train

    @property
    def holds_out(self) -> bool:
        """True if there are held-out rows."""
        return self.heldout_from is not None

    @property
    def trained_fraction(self) -> float:
        """Fraction of the conversations of ``train`` that are not held out of it."""
        return 1 - (self.heldout_fraction or 0)


class ResourcesConfig(Section):
    """The request of one actor or worker to the Ray cluster."""

    cpus: Positive = 1
    """Logical CPUs, and the number of compute threads on the CPU (rounded down, at least one)."""
    gpus: NonNegative = 0
    """Number of GPUs: whole, or a fraction for engines that share one."""
    custom: MayChange[dict[str, Positive]] = {}
    """Custom Ray resources, e.g. ``{"accelerator_type:H100": 0.001}``."""
    labels: MayChange[dict[str, str]] = {}
    """Ray's label selector for nodes, e.g. ``{"ray.io/accelerator-type": "in(H100,H200)"}``."""

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """The request under Ray's own names, e.g. ``{"CPU": 2, "GPU": 1}``."""
        named = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in named.items() if amount}


class SamplingConfig(Section):
    """The distribution that responses are drawn from. The defaults sample from p_θt itself, as SPIN needs."""

    temperature: NonNegative = 1.0
    """Temperature: 1 samples from the model, 0 takes the likeliest token; else 0.01 to 2. Any but 1 departs from the
    method."""
    top_p: PositiveFraction = 1.0
    """Total probability of the likeliest tokens. Less likely tokens are never sampled. 1: no limit."""
    top_k: CountOrZero = 0
    """Number of likeliest tokens that are sampled from. 0: no limit."""
    max_tokens: Count = 1024
    """Longest response in tokens. A longer one is cut and has no end-of-turn token."""


class EngineConfig(Section):
    """Arguments of the vLLM engine. Sampling settings of the model folder are not read."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of weights and computation. ``auto`` follows ``train.precision``. A format with fewer bits rounds
    small updates away."""
    tensor_parallel_size: Count = 1
    """GPUs that share each layer, all on one node. Times ``pipeline_parallel_size``, it must equal
    ``generation.resources.gpus``."""
    pipeline_parallel_size: MayChange[Count] = 1
    """Groups of ``tensor_parallel_size`` GPUs, each with a part of the layers. More than one: for models too large for
    one node; groups may lie on different nodes."""
    max_num_seqs: Count = 256
    """Responses that are decoded together. More use the hardware better and need more memory. Not set: 512 on GPUs,
    256 on CPUs. A run keeps its number."""
    gpu_memory_utilization: MayChange[PositiveFraction] = 0.9
    """Fraction of the GPU's memory for weights and key-value cache. Engines that share a GPU need less each, e.g. 0.45
    for two, and start one after another."""
    cpu_kv_cache_gib: MayChange[Count] = 2
    """Size of the key-value cache on CPU, in GiB."""
    enforce_eager: bool = False
    """No torch.compile and no CUDA graphs. On CPU this saves a minute of start-up and costs little speed."""
    extra: dict[str, Any] = {}
    """Other vLLM engine arguments, passed on as they are."""

    @property
    def devices(self) -> int:
        """GPUs of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class GenerationConfig(Section):
    """The stage in which the opponent θ_t answers the prompts."""

    sampling: SamplingConfig = SamplingConfig()
    """The distribution of one response."""
    samples_per_prompt: Count = 1
    """Responses y′ per prompt, each for a pair of its own. Paper: 1."""
    shard_rows: Count = 512
    """Responses per shard. A shard is one batch of the engine, and the most that an engine loses in a crash. Small
    shards leave the engine half empty at their ends. Not set: about 4096 on GPUs, so that all engines get equal work,
    and 512 on CPUs. Remote CSV, Arrow and compressed text are not counted for it: 4096. A run keeps its number."""
    replicas: MayChange[Count] = 1
    """Engines that generate side by side."""
    min_replicas: MayChange[Count | None] = None
    """Number of engines that must find room before generation starts; the others start when there is room. Not set: all
    ``replicas``."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources of one engine."""
    engine: EngineConfig = EngineConfig()
    """Arguments of each engine."""
    start_timeout_s: MayChange[Positive] = 900
    """Longest wait for an engine to be ready, in seconds. Large models take minutes. Also the longest for a worker to
    import a grader of your own."""
    shard_timeout_s: MayChange[Positive] = 7200
    """Longest time without a finished shard, in seconds, before the stage fails. Also the longest without a finished
    part of SPPO's preferences, or without 256 more rows from a grader of your own."""
    max_failures: MayChange[CountOrZero] = 3
    """Restarts of a dead engine, and repeated attempts at one shard, before the stage fails."""


class ObjectiveConfig(Section):
    """The function that training minimises."""

    loss: NameOrPath[LossName] = "logistic"
    """Loss ℓ of the margin in equation 4.7, or the import path of a function, ``my_package.mine:loss``. Paper:
    logistic, log(1 + e^-m). ``space`` (SPACE, arXiv 2512.07175) uses the two log-ratios separately, with ``beta`` 1."""
    beta: MayChange[PerIteration] = 0.1
    """Factor of each log-ratio in the margin, the paper's λ. A larger β keeps θ_{t+1} closer to θ_t. A list gives each
    iteration its own (paper: 0.1, 0.1, 0.1, 5.0)."""
    window: CountOrAll = 2
    """Number of iterations whose y′ an iteration learns from, itself included. Paper: 2. ``all`` is fictitious play:
    the opponent is the uniform mixture of all iterates."""
    reference_alpha: Fraction = 1.0
    """α of the reference p_t^α · p_0^(1-α). 1: the opponent θ_t (SPIN). 0: the initial model θ_0. Between: α-SPIN
    (arXiv 2404.04291), whose fixed point is biased towards θ_0."""
    length_normalised: bool = False
    """Division of each log-ratio by the number of tokens of its response. Off in the paper. A β chosen for sums is too
    small for means, by a factor of about the length of a response."""
    sft_weight: NonNegative = 0.0
    """Weight of an added loss -log p(y), the mean over a step's response tokens. It stabilises small models and large
    steps. Paper: 0."""
    positive_weight: NonNegative = 0.0
    """λ of DPO-Positive (arXiv 2402.13228), which subtracts β·λ·max(0, -r(y)) from the margin, where r(y) is log
    p_θ(y)/p_ref(y). The term keeps log p(y) from falling; ``sft_weight`` raises it. Paper: no such term. DPO-Positive:
    50."""
    mu: Positive = 1.0
    """μ of ``loss: space``: weight of the generated responses. 1: the same as of the human ones."""
    history_weight: NonNegative = 0.1
    """Weight of T-SPIN's second term, which prefers y′ to θ_0's response. T-SPIN's paper: 0.1, its β."""
    keep_identical: bool = False
    """Use of pairs with y = y′. Their margin is 0, so only ``sft_weight`` learns from them. Without them,
    ``sft_weight`` acts mostly on prompts that the model gets wrong. ``loss: space`` and ``positive_weight`` learn from
    them, so there it is on if not given. T-SPIN always uses those whose response by θ_0 differs."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_loss_needs(cls, given: Any) -> Any:
        """Sets the values that the theory of the loss needs, if the recipe has none."""
        if isinstance(given, dict) and given.get("loss") == "space":
            return {"beta": 1.0, "window": 1, "keep_identical": True} | given
        return {"keep_identical": True} | given if isinstance(given, dict) and given.get("positive_weight") else given

    def oldest_iteration(self, iteration: int) -> int:
        """Returns the first iteration in the window of ``iteration``; it may be negative."""
        return 0 if self.window == "all" else iteration - self.window + 1

    def opponents(self, iteration: int) -> int:
        """Returns the number of iterations whose y′ an iteration trains on."""
        return iteration + 1 - max(self.oldest_iteration(iteration), 0)


class ScorerConfig(Section):
    """The preference model of SPPO, which estimates P(one response beats the other)."""

    path: PathOrUri
    """Model folder (safetensors), or a hub name. For ``grade`` a grader, as ``evaluation.grade``."""
    kind: Literal["reward", "pairrm", "grade"] = "reward"
    """Kind of model. ``reward``: a sequence classifier with one output; P = σ(difference of rewards). ``pairrm``: one
    like llm-blender/PairRM-hf (the paper's), which reads both responses together. ``grade``: no model but a grader of
    responses by their row's ``answer``; P = (1 + difference of grades) / 2."""
    max_length: Count = 2048
    """Longest input in tokens. Longer texts lose their end."""
    replicas: Count = 1
    """Preference models that work side by side."""
    resources: Identity[ResourcesConfig] = ResourcesConfig()
    """Resources of one preference model."""

    @model_validator(mode="after")
    def _grader_is_no_model(self) -> ScorerConfig:
        fields = type(self).model_fields
        for name in ("max_length", "replicas", "resources") if self.kind == "grade" else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"scorer.{name}: is for a preference model, and a grader is none; leave it out")
        return self


class SelfFilterConfig(Section):
    """Self-reinforcement's choice among the model's own answers to unlabelled questions."""

    min_agreement: Fraction = 0.5
    """Smallest fraction of a question's samples that agree on its commonest answer; other questions are dropped.
    ``evaluation.answer_extractor`` reads the answer, else whole responses are compared. In the paper the model judges
    in words."""
    grade: NameOrPath[GradeName] | None = None
    """Grader, as ``evaluation.grade``, of the samples of questions with an ``answer``. The model learns from the best
    sample instead of the commonest one. Questions without an answer are dropped."""
    min_grade: Fraction = 0.5
    """Smallest grade of a sample that the model learns from; questions without such a sample are dropped."""


class OptimizerConfig(Section):
    """The optimizer and the course of its learning rate."""

    name: NameOrPath[OptimizerName] = "rmsprop"
    """Optimizer, or the import path of a class, ``my_package.mine:Optimizer``. Paper: RMSProp. ``adamw_8bit`` stores
    each moment in one byte (extra ``quantised``, one worker); ``muon`` is for adapters."""
    weight_decay: NonNegative = 0.0
    """Weight decay of the optimizer. Paper: 0."""
    betas: MayChange[tuple[Fraction, Fraction] | None] = None
    """AdamW's decay rates of the two moments, below 1. Not set: the optimizer's own, 0.9 and 0.999."""
    eps: MayChange[Positive | None] = None
    """Number that is added to the denominator. Not set: the optimizer's own, 1e-8 (``muon``: 1e-7)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up. Paper: linear decay to 0."""
    warmup_fraction: Fraction = 0.1
    """Fraction of the steps over which the learning rate rises. Paper: 0.1."""
    max_grad_norm: Positive = 1.0
    """Largest global norm of the gradients; larger ones are scaled down."""


class LoraConfig(Section):
    """Low-rank adapters in place of all weights; a departure from the paper."""

    rank: Count = 16
    """Rank of an iteration's change to a weight matrix. A higher one learns more and needs more memory."""
    alpha: Count = 32
    """Scale of the change, which is multiplied by alpha / rank. Adapters need 10 to 100 times the learning rate of full
    training."""
    target_modules: Literal["all-linear"] | Words = "all-linear"
    """Layers that get an adapter, e.g. ``[q_proj, v_proj]``. ``all-linear``: every linear layer but the head."""
    base: Literal["bf16", "nf4", "int8"] = "bf16"
    """Number format of the frozen weights: 2 bytes a parameter, or about 0.5 (``nf4``) or 1 (``int8``), both by
    bitsandbytes (extra ``quantised``). The experts of a mixture keep 2 bytes. ``bf16`` is fp32 where
    ``train.precision`` is fp32."""
    merge: bool = True
    """Commit of each iterate as a whole model, with fresh adapters for the next. Off: an iteration commits its adapter
    alone (``iter_NNN/adapter``, PEFT's layout, tens of MB), which the next trains further on the same frozen base."""

    @property
    def is_quantised(self) -> bool:
        """True if the frozen weights are of 4 or 8 bits."""
        return self.base != "bf16"

    @field_validator("target_modules")
    @classmethod
    def _names_layers(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not given:
            raise ValueError("train.lora.target_modules: names no layer; give some, e.g. [q_proj, v_proj]")
        return given


class Mesh(Section):
    """The train workers as a grid, whose innermost dimension is ``tensor``.

    Workers of one ``tensor`` group compute one pack together. Workers of one ``shard`` group hold together one copy of
    weights, gradients and optimizer state. ``replicate`` is the number of copies.
    """

    replicate: Count = 1
    """Copies of the weights. Only gradients are exchanged between copies, to be summed."""
    shard: Count = 1
    """Workers (or tensor groups) over which a copy is sharded."""
    tensor: Count = 1
    """Workers that split each layer's heads and feed-forward network, by transformers' plan for the model."""

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def data_ranks(self) -> int:
        """The number of workers, or tensor groups, that get packs of their own."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        return f"{{replicate: {self.replicate}, shard: {self.shard}, tensor: {self.tensor}}}"


class TrainConfig(Section):
    """The stage that trains θ_{t+1} from θ_t on the pairs of an iteration."""

    backend: NameOrPath[BackendName] = "fsdp2"
    """Library that shards the model: torch's FSDP2, DeepSpeed's ZeRO (extra ``deepspeed``), or the import path of a
    class, ``my_package.mine:Backend``."""
    workers: Count = 1
    """Train workers, over which parameters, gradients and optimizer state are sharded."""
    min_workers: MayChange[Count | None] = None
    """Smallest number of workers for elastic training (FSDP2 only). After the loss of nodes, training continues from
    the last checkpoint with the workers that are left, and grows again when nodes join. The results differ only by the
    order in which gradients are summed. Not set: always ``workers``."""
    resize_interval_s: MayChange[NonNegative] = 300
    """Seconds between attempts of an elastic group to grow. Each growth repeats the steps since the last checkpoint."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources of one worker: one GPU (NCCL) or none (gloo)."""
    learning_rate: MayChange[PerIteration] = 5e-7
    """Highest learning rate, after the warm-up. A list gives each iteration its own (paper: 5e-7, 5e-7, 1e-7, 1e-7)."""
    epochs: MayChange[PerIterationCount] = 2
    """Passes over an iteration's pairs. A list gives each iteration its own. Paper: 2."""
    schedule_epochs: MayChange[PerIterationCount | None] = None
    """Passes that the learning rate's schedule is planned for, of which ``epochs`` are trained. A list gives each
    iteration its own. Not set: ``epochs``."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, fresh for every iteration."""
    lora: LoraConfig | None = None
    """Adapters (PEFT, extra ``lora``), never in the warm-up ``sft``. Not set: all weights are trained."""
    global_batch_pairs: Count = 64
    """Pairs per optimizer step, at most, over all workers. A prompt with more pairs makes a step alone. Paper: 64."""
    pack_length: Count = 4096
    """Tokens per pack, one micro-batch of one worker: at least ``model.max_length`` +
    ``generation.sampling.max_tokens``. Longer packs use the hardware better and need more memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the computation. ``auto`` is bf16 on GPUs and the faster of the two on CPUs. A run keeps its
    precision. Master weights, gradients and optimizer state are always fp32: bf16 cannot resolve small updates."""
    compile: MayChange[AutoOrFlag] = "auto"
    """torch.compile of each decoder layer, in training and scoring (FSDP2 only). It costs a minute or two at the start
    of each stage that trains or scores. ``auto`` is on for GPUs and off for CPUs."""
    deterministic: MayChange[bool] = False
    """Use of kernels that sum in a fixed order, so that a resumed training has the same bits on GPUs too. Slower on
    GPUs; CPUs always do so."""
    gradient_checkpointing: AutoOrFlag = "auto"
    """Recomputation of activations in the backward pass: a third slower, far less memory, the same numbers. ``auto``:
    on GPUs whose memory cannot hold all activations, by the arithmetic of ``spin-ray plan``."""
    sharding: MayChange[Literal["full", "shard_grad_op"]] = "full"
    """Sharding of the weights. ``full`` (ZeRO-3) gathers each layer in each forward and backward pass.
    ``shard_grad_op`` (ZeRO-2) gathers once per optimizer step: less traffic, but each worker holds all weights."""
    mesh: MayChange[AutoOrOne[Mesh]] = "auto"
    """Grid of the workers (FSDP2 only), e.g. ``{replicate: 2, shard: 8}`` for two nodes of eight. ``auto`` on one node:
    one copy over all workers. ``auto`` on several nodes: one copy in each node if a copy fits there, else one copy over
    all. ``auto`` splits layers only if a pack or a layer does not fit on a GPU, or a batch has fewer pairs than there
    are GPUs."""
    reduce_every_pack: MayChange[AutoOrFlag] = "auto"
    """Summing of gradients over the workers after each pack, not only after each step. This needs more traffic, beside
    the backward pass. But no worker holds whole gradients, which take 4 bytes per parameter. ``auto`` is on for GPUs
    and off for CPUs."""
    offload: MayChange[bool] = False
    """Storage of weights, gradients and optimizer state in CPU memory. Slower; for models that do not fit otherwise. A
    quantised base (``lora.base``) stays on the GPU, and so do the weights with DeepSpeed and ``shard_grad_op``."""
    checkpoint_every_steps: MayChange[Count] = 200
    """Optimizer steps between checkpoints: the most that a killed worker can lose."""
    max_failures: MayChange[CountOrZero] = 3
    """Restarts of the workers in one training, evaluation or scoring before the run fails."""
    start_timeout_s: MayChange[Positive] = 600
    """Longest wait for the workers to be placed and connected, in seconds."""
    stall_timeout_s: MayChange[Positive] = 86_400
    """Longest time without a finished step, in seconds, before workers count as stuck. A whole evaluation is one step,
    so the default is a day."""

    @property
    def reduces_every_pack(self) -> bool:
        """The value of ``reduce_every_pack``, with ``auto`` resolved."""
        return self.resources.gpus > 0 if self.reduce_every_pack == "auto" else self.reduce_every_pack


class SftConfig(Section):
    """The optional warm-up: supervised fine-tuning of a base model on the same rows, which gives θ_0."""

    epochs: Count = 1
    """Passes over the rows. SPIN is meant for a model that another pass would not improve."""
    learning_rate: Positive = 2e-5
    """Highest learning rate. Paper's start model (zephyr-7b-sft-full): 2e-5."""
    global_batch_rows: Count = 64
    """Rows per optimizer step, over all workers."""
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", schedule="cosine")
    """Optimizer; AdamW with cosine decay is usual here."""


class ReviserConfig(SftConfig):
    """The reviser of SEFT: a model that writes ``[keep]``, ``[minor]`` or ``[major]`` and a better answer.

    It is fine-tuned from θ_0, on θ_0's answers to labelled prompts and the human responses.
    """

    minor_from: Fraction = 0.5
    """Smallest similarity (0 to 1, by tokens) of answer and human response for a minor revision. In the paper a reward
    model decides."""


class SdftConfig(Section):
    """Self-distillation: the teacher is θ_t with the human response in its prompt."""

    demonstration: str = "{prompt}\n\nHere is a good response:\n{response}\n\nNow give a response of your own."
    """Last message of the user as the teacher reads it; ``{prompt}`` is the message, ``{response}`` the human
    response."""
    top_k: Count = 20
    """Number of likeliest tokens of the teacher that are stored at each position; all other tokens count as one."""

    @field_validator("demonstration")
    @classmethod
    def _shows_the_response(cls, template: str) -> str:
        if lacking := [name for name in ("{prompt}", "{response}") if name not in template]:
            raise ValueError(f"sdft.demonstration: lacks {' and '.join(lacking)}")
        return template


class HealthConfig(Section):
    """Limits at which a run stops because training destroys the model. ``null`` switches one off.

    A loss or gradient that is not finite always stops training, which is tried again from the last checkpoint,
    ``train.max_failures`` times.
    """

    steps: Count = 5
    """Number of last steps over whose mean loss, margin and log p(y) are checked."""
    max_loss: Positive | None = None
    """Highest loss, except of SFT. The logistic loss starts at ln 2. Off by default: a collapse may lower the loss."""
    max_margin: Positive | None = 30.0
    """Largest absolute margin. Healthy iterations end with a few nats times beta."""
    max_real_logp_drop: Positive | None = 0.5
    """Largest fall of log p(y) within an iteration, as a fraction of its absolute value: at 0.5, -100 nats may become
    -150. Not checked without a reference (T-SPIN), as only that says what log p(y) was."""
    max_length_change: Annotated[float, Field(gt=1, allow_inf_nan=False), _number] | None = 4.0
    """Largest factor by which the mean length of y′ may grow or shrink against θ_0's."""
    max_engine_difference: Positive | None = 0.1
    """Largest difference, in nats a token, between log p of y′ by the engine and by the model that is trained. A few
    responses of each iteration are compared. Not checked for adapters on a quantised base."""


class EvaluationConfig(Section):
    """The measurement of each iterate on the held-out rows."""

    answer_extractor: Literal["none", "equals", "hashes"] = "none"
    """Way to read the number in a response, for rows with an ``answer``: after the last ``=`` (``equals``) or ``####``
    (``hashes``)."""
    grade: NameOrPath[GradeName] = "number"
    """Grader of responses to rows with an ``answer``. ``number`` compares numbers, read by ``answer_extractor``;
    ``exact`` whole texts; ``multiple_choice`` letters; ``json`` values. ``regex`` takes ``answer`` as a pattern. Or the
    import path of a function of response and answer, both texts, ``my_package.mine:grade``, which returns 0 to 1."""
    max_rows: Count | None = None
    """Number of held-out rows that are measured, from the first. The others are not trained on, either. Not set: all.
    Not for several sources, which have ``rows``."""
    samples: Count = 1
    """Responses to each held-out row. All are graded (``answer_accuracy`` is their pass@1); other measures use the
    first response."""
    examples: CountOrZero = 0
    """Number of held-out rows, from the first, that each iterate answers once more for people to read. 0: the first
    samples are shown."""
    examples_temperature: NonNegative = 0.7
    """Temperature of ``examples``. No measure reads them."""


class ServingConfig(Section):
    """The endpoint of ``spin-ray serve``."""

    not_of_engines: ClassVar[tuple[str, ...]] = (
        "models", "host", "port", "keys", "requests_per_minute", "max_tokens", "max_body_bytes", "body_timeout_s",
        "ingress_replicas", "follow_interval_s", "start_timeout_s", "retry_failed_s", "drain_grace_s", "log_prompts",
        "votes",
    )  # fmt: skip
    """Fields that no engine reads. A change of the others replaces a RayService's engines."""
    models: Words = ("sft", "latest")
    """Iterates that have an engine: ``sft``, ``iter-0``, …, ``latest`` (follows RUN/LATEST), or ``all``."""
    host: str = "127.0.0.1"
    """Address to listen at. An address that other machines reach needs ``keys`` and Ray's token authentication."""
    port: Annotated[int, Field(ge=0, le=65535), _number] = 8000
    """TCP port. 0: a free one, which is printed."""
    keys: str | None = None
    """File of hashed API keys, one line of ``spin-ray serve-key`` each. Not set: all who reach the port may ask."""
    requests_per_minute: Count | None = None
    """Requests a minute per key; a key's own line overrides it. Without ``keys``: of all clients together. Not set: no
    limit."""
    max_concurrent: Count = 64
    """Requests that one ingress replica answers at the same time. Further requests get status 503 with Retry-After."""
    max_tokens: Count = 1024
    """Longest answer in tokens, and the limit for a request that names none."""
    max_body_bytes: Count = 2**20
    """Largest body of a request, in bytes."""
    body_timeout_s: Positive = 30
    """Longest wait for a request's whole body, in seconds."""
    request_timeout_s: Positive = 600
    """Longest time for an answer, and for running streams to end when their engine stops, in seconds."""
    stream_interval_s: NonNegative = 0.1
    """Seconds between two pieces of a stream. Each piece costs Ray Serve milliseconds of CPU."""
    replicas: Count = 1
    """Engines per iterate."""
    max_replicas: Count = 1
    """Most engines per iterate; above ``replicas``, Ray Serve adds them under load."""
    target_ongoing_requests: Count = 32
    """Requests per engine that autoscaling aims at."""
    ingress_replicas: Count = 1
    """Processes that check, route and stream requests, behind Ray Serve's proxies. With 1 and no cluster, ``spin-ray
    serve`` does this itself. Rates and ``max_concurrent`` apply to each process."""
    resources: ResourcesConfig = ResourcesConfig()
    """Resources of one engine. While ``latest`` moves to a new iterate, there must be room for one more engine."""
    engine: EngineConfig | None = None
    """Arguments of the engines. Not set: ``generation.engine``."""
    follow_interval_s: Positive = 2
    """Seconds between two looks at RUN/LATEST."""
    start_timeout_s: Positive = 900
    """Longest wait for an engine's first answer, in seconds."""
    retry_failed_s: Positive = 60
    """Seconds before a new attempt at an iterate that could not be served."""
    drain_grace_s: NonNegative = 5
    """Seconds between the last new request to an old engine and its shutdown."""
    log_prompts: bool = False
    """Writing of messages and prompts, which may be private, to the access log."""
    votes: str | None = None
    """Database URL (SQLAlchemy's) of the arena's votes, without its password (docs/arena.md). Not set:
    ``RUN/votes.sqlite``, which works only for ingress replicas on one machine."""

    @property
    def most_engines(self) -> int:
        """Most engines of one iterate."""
        return max(self.replicas, self.max_replicas)


class ProbeConfig(Section):
    """The measurement, before iteration 0, of what is left to learn from θ_0 (docs/probe.md)."""

    prompts: Annotated[int, Field(ge=2), _number] = 256
    """Prompts that θ_0 answers. Half are trained on. The others, of ``data.heldout`` if there is one, are measured."""
    epochs: Count = 2
    """Passes over the trained half, by SPIN and by SFT."""
    global_batch_pairs: Count = 16
    """Pairs per step, at most those of ``train``. Few, so that a few hundred rows give enough steps."""
    learning_rate: Positive | None = None
    """Highest learning rate of both trainings. Not set: iteration 0's."""
    sft: bool = True
    """SFT on the same rows, which tells whether it still helps."""
    stop: bool = False
    """End of the run if the verdict is to stop. Off: the verdict is printed and kept, and the run continues."""


class StopConfig(Section):
    """The rule that ends a run early: the opponent's held-out distance from the data no longer falls.

    The distance is ``jsd_lower_bound``: the difference that this model can detect after one iteration of training.
    """

    patience: Count = 1
    """Number of iterations in a row without a new lowest distance."""
    min_fall: NonNegative = 0.0
    """Nats by which a new lowest distance must be below the last one."""


class MlflowConfig(Section):
    """Logging to MLflow. Needs the package mlflow or mlflow-skinny (extra ``mlflow``)."""

    uri: str | None = None
    """Tracking server or folder. Not set: ``mlruns`` in the run folder, without a server. MLflow reads a password from
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "spin_ray"
    """Name of the MLflow experiment; each run folder is one run in it."""


class WandbConfig(Section):
    """Logging to Weights & Biases. Needs the package wandb (extra ``wandb``)."""

    project: str = "spin_ray"
    """Name of the W&B project; each run folder is one run in it."""
    mode: Literal["offline", "online"] = "offline"
    """``offline`` writes to ``RUN/wandb`` for ``wandb sync``. ``online`` needs WANDB_API_KEY in the environment."""


class TrackingConfig(Section):
    """The trackers that receive the numbers of a run."""

    tensorboard: bool = True
    """Event files in ``RUN/tensorboard``."""
    mlflow: MlflowConfig | None = None
    """MLflow. ``{}`` takes its defaults. Not set: off."""
    wandb: WandbConfig | None = None
    """Weights & Biases. ``{}`` takes its defaults. Not set: off."""


class StorageConfig(Section):
    """The run folder: its lease, and the files that are kept."""

    lease_timeout_s: Positive = 60
    """Seconds without renewal after which another driver may take over the run. On the same host, the lease ends with
    the driver's process."""
    keep_checkpoints: bool = False
    """Training checkpoints of finished iterations. Off: they are deleted, because each takes 8 bytes per parameter or
    more."""


class ClusterConfig(Section):
    """The Ray cluster that the run uses."""

    address: str | None = None
    """Address of a running Ray cluster; ``auto`` finds one. Not set: the Ray that this process is connected to, else
    $RAY_ADDRESS, else a new Ray on this machine."""
    local_cpus: Count | None = None
    """Logical CPUs of a new Ray. Not set: all that this process may use."""
    wait_for_nodes_s: NonNegative = 0
    """Longest wait, in seconds, for an autoscaling cluster to grow. The nodes of all stages are asked for. They stay up
    until the run ends, when the request is withdrawn. A killed driver's request ends after three minutes."""


class Settings(Section):
    """Every setting of a run, section by section."""

    model: ModelConfig
    """Start model: fine-tuned, or a base model for ``sft``."""
    data: DataConfig
    """Training, held-out and unlabelled data."""
    iterations: MayChange[Count] = 4
    """Number of iterations, T of Algorithm 1. A finished run goes on if raised. Paper: 4."""
    algorithm: NameOrPath[AlgorithmName] = "spin"
    """Algorithm (docs/algorithms.md), or the import path of a class, ``my_package.mine:Algorithm``."""
    seed: CountOrZero = 0
    """Seed of every random choice."""
    sft: SftConfig | None = None
    """Warm-up before iteration 0. ``{}`` takes its defaults. Not set: the start model is θ_0."""
    scorer: ScorerConfig | None = None
    """Preference model; ``sppo`` needs it."""
    self_filter: SelfFilterConfig | None = None
    """Filter of the model's own answers in ``self_reinforcement``. Not set: the model learns from all answers."""
    reviser: ReviserConfig | None = None
    """Reviser; ``seft`` needs it."""
    sdft: SdftConfig | None = None
    """Teacher of ``sdft``. Not set: its defaults."""
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
    probe: MayChange[ProbeConfig | None] = None
    """Probe before iteration 0 of what is left to learn. ``{}`` takes its defaults. Not set: none."""
    stop_when: MayChange[StopConfig | None] = None
    """Rule that ends the run early. ``{}`` takes its defaults. Not set: all ``iterations`` are done."""
    tracking: MayChange[TrackingConfig] = TrackingConfig()
    """Trackers of the run's numbers."""
    serving: MayChange[ServingConfig] = ServingConfig()
    """Endpoint of ``spin-ray serve``; a run does not read it."""
    storage: MayChange[StorageConfig] = StorageConfig()
    """Lease and kept files of the run folder."""
    cluster: MayChange[ClusterConfig] = ClusterConfig()
    """Ray cluster."""

    @property
    def trainings(self) -> dict[str, TrainConfig | SftConfig]:
        """The sections that train a model, each with its optimizer, by name."""
        sections = {"train": self.train, "sft": self.sft, "reviser": self.reviser}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def serving_engine(self) -> EngineConfig:
        """Settings of the endpoint's engines: their own, or those of generation."""
        return self.serving.engine or self.generation.engine
