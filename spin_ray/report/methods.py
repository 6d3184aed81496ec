"""Descriptions of the algorithms, for a model card."""

from dataclasses import dataclass

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Train, sources_of
from spin_ray.report.redaction import without_folders


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    lesson: str
    """Predicate of the sentence about an iteration, whose subject is the model."""
    tags: tuple[str, ...]
    """Tags of the model card."""


METHODS: dict[str, Method] = {
    "spin": Method(
        "SPIN (self-play fine-tuning, arXiv 2401.01335)",
        "learns to tell the human responses from its own earlier ones",
        ("spin", "self-play"),
    ),
    "continued_sft": Method("continued supervised fine-tuning", "is fine-tuned on the human responses", ("sft",)),
    "dpo": Method(
        "DPO (direct preference optimization, arXiv 2305.18290)",
        "learns to prefer the chosen response of each row to the rejected one",
        ("dpo",),
    ),
    "sppo": Method(
        "SPPO (self-play preference optimization, arXiv 2405.00675)",
        "learns from its own responses alone, the best and the worst by the recipe's scorer",
        ("sppo", "self-play"),
    ),
    "self_reinforcement": Method(
        "self-reinforcement (arXiv 2405.04086)",
        "learns to prefer its own chosen responses to those of the model before fine-tuning",
        ("self-reinforcement", "dpo"),
    ),
    "seft": Method(
        "SEFT (arXiv 2406.10813)",
        "is fine-tuned on its own responses, kept or revised by a reviser that was trained on the human ones",
        ("seft", "sft"),
    ),
    "tspin": Method(
        "T-SPIN (arXiv 2601.08198)",
        "learns to prefer the human responses to its own and, after the first one, its own to those of iteration 0",
        ("t-spin", "self-play"),
    ),
    "sdft": Method(
        "SDFT (self-distillation fine-tuning, arXiv 2601.19897)",
        "learns, on its own responses, to answer as it does with the human response in its prompt",
        ("sdft", "self-distillation"),
    ),
}
"""The package's own algorithms by name."""


def how_made(config: SpinConfig, iterate: int) -> str:
    """Returns the paragraph that says how θ_iterate came from the start model."""
    method, start = _method(config), without_folders(config.model.path)
    data = f"`{public_name_of(config.data.train)}`"
    if iterate and config.data.questions:
        data += f" and the questions of `{public_name_of(config.data.questions)}`"
    steps = [f"{config.sft.epochs} epoch(s) of supervised fine-tuning"] if config.sft else []
    steps += [f"{iterate} iteration(s) of {method.name}"] if iterate else []
    lesson = f"In each iteration the model {method.lesson}. " if iterate else ""
    return (
        f"Made from `{start}` by {' and '.join(steps)} on {data} with spin_ray. {lesson}Nothing else has "
        "aligned it: it copies the errors of what it learned from, and it has not been tested for safety."
    )


def public_name_of(train: Train | None) -> str:
    """Returns the paths of a setting such as ``data.train`` in one line, those of this machine by their names."""
    return ", ".join(without_folders(source.path) for source in sources_of(train))


def tags_of(config: SpinConfig, iterate: int) -> list[str]:
    """Returns the tags of θ_iterate's model card."""
    tags = (("sft",) if config.sft else ()) + (_method(config).tags if iterate else ())
    return [*dict.fromkeys((*tags, "spin_ray"))]


def _method(config: SpinConfig) -> Method:
    """Returns the description; an algorithm from outside has only its import path."""
    other = Method(f"the algorithm `{config.algorithm}`", "learns as that algorithm says", ())
    return METHODS.get(config.algorithm, other)
