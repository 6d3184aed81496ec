"""Requests to lm-eval: benchmarks, and the model that is asked."""

from dataclasses import dataclass, field
from typing import Literal

from spin_ray.config.sections import EngineConfig
from spin_ray.inputs.template_variables import TemplateVariables

Backend = Literal["hf", "vllm"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    task: str
    shots: int | None = None
    """Examples before each question. None: the task's own number."""
    metric: str | None = None
    """Metric that is usually quoted, by its name in the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    model: str
    """Folder with weights and tokenizer."""
    name: str
    """Iterate's name, at an endpoint ``iter-0``."""
    benchmarks: tuple[Benchmark, ...]
    backend: Backend = "hf"
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server. None: weights are loaded here."""
    include: str | None = None
    """Folder with more tasks in YAML."""
    limit: int | None = None
    """Number of first rows of each task, for trials. None: all."""
    chat: bool = False
    """True: applies the chat template."""
    variables: TemplateVariables | None = None
    """Variables of the chat template, and its date. None: no variables."""
    chat_template: str | None = None
    """Text of the run's own chat template. None: the tokenizer's."""
    dtype: str = "float32"
    max_length: int | None = None
    """Most tokens; longer questions lose their beginning. None: the model's limit."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    threads: int = 1
    trust_remote_code: bool = False
