"""Values that torch, vLLM, Ray or a card would refuse, or change, only once a stage has begun."""

from __future__ import annotations

from collections.abc import Iterator

from spin_ray.config.sections import EngineConfig, ResourcesConfig, Section, Settings

LONGEST_S = 1e9
"""Longest time of a setting, in seconds; Python's waits end at 9.2e9."""
TEMPERATURES = (0.01, 2.0)
"""Least and greatest temperature of vLLM but 0; less becomes the least, with a warning in the engine's log."""
LEAST_AMOUNT = 0.0001
"""Ray's resolution of resources."""


def limit_problems(config: Settings) -> Iterator[str]:
    yield from _beta_problems(config)
    yield from _temperature_problems(config)
    yield from _amount_problems(config)
    yield from _memory_problems(config)
    yield from _batch_problems(config)
    yield from _wait_problems(config)


def _beta_problems(config: Settings) -> Iterator[str]:
    for place, section in config.trainings.items():
        betas = section.optimizer.betas
        if betas and max(betas) >= 1:
            yield f"{place}.optimizer.betas: {list(betas)}: torch takes decay rates below 1; lower them, e.g. to 0.999"


def _temperature_problems(config: Settings) -> Iterator[str]:
    least, most = TEMPERATURES
    for name, value in (
        ("generation.sampling.temperature", config.generation.sampling.temperature),
        ("evaluation.examples_temperature", config.evaluation.examples_temperature),
    ):
        if 0 < value < least:
            yield f"{name}: {value:g}: vLLM would sample at {least:g}; give 0 (the likeliest token) or {least:g}"
        if value > most:
            yield f"{name}: {value:g}: vLLM refuses more than {most:g}; lower it"


def _amount_problems(config: Settings) -> Iterator[str]:
    for place, resources in _resources(config):
        for key in sorted({"CPU", "GPU", "memory", "object_store_memory"} & resources.custom.keys()):
            cure = f"use {place}.resources.{key.lower()}s" if key.isupper() else "leave it out"
            yield f"{place}.resources.custom.{key}: is a resource of Ray's own; {cure}"
        if place in ("scorer", "serving") and resources.gpus > 1 and resources.gpus % 1:
            yield f"{place}.resources.gpus: {resources.gpus:g}: Ray divides no more than one GPU; give a whole number"
        amounts = {"cpus": resources.cpus, "gpus": resources.gpus}
        for name, amount in (amounts | {f"custom.{name}": it for name, it in resources.custom.items()}).items():
            if 0 < amount < LEAST_AMOUNT:
                yield f"{place}.resources.{name}: {amount:g}: Ray counts in steps of {LEAST_AMOUNT:g}; raise it"


def parts_of_a_gpu(part: float) -> int:
    """Returns how many requests for so much of a GPU one GPU holds. Ray takes a part from a single GPU."""
    return int(1 / part + 1e-6)


def _memory_problems(config: Settings) -> Iterator[str]:
    """Each engine waits for its share of a card, of which driver and processes hold some besides."""
    for place, resources, setting, engine in _engines(config):
        gpus, asked = resources.gpus, engine.gpu_memory_utilization
        together = min(_side_by_side(config, place), parts_of_a_gpu(gpus)) if 0 < gpus < 1 else 1
        if gpus and together * asked >= 1:
            said = f"{together} engines of {place}.resources.gpus {gpus:g} share a card; " if together > 1 else ""
            cure = f"lower it to {0.9 / together:.2g}" + (" or ask for a GPU each" if said else "")
            yield f"{setting}.gpu_memory_utilization: {said}{asked:g} of its memory each leaves none to CUDA; {cure}"


def _side_by_side(config: Settings, place: str) -> int:
    """Returns the number of engines; ``latest`` has two while it moves, and all adapters have one."""
    serving, lora = config.serving, config.train.lora
    if place == "generation":
        return config.generation.replicas
    named = set(serving.models)
    iterates = config.iterations + 1 if "all" in named else len(named) + ("latest" in named)
    return (1 if lora and not lora.merge else iterates) * serving.most_engines


def _batch_problems(config: Settings) -> Iterator[str]:
    for place, resources, setting, engine in _engines(config):
        if place not in setting:
            continue  # the endpoint has generation's settings, which may be meant for GPUs alone
        if place == "generation" and "max_num_seqs" not in engine.model_fields_set:
            continue  # settle_sizes lowers it
        on_cpu = None if resources.gpus else max(config.model.max_length, 2048)  # see runtime.engine._whole_prefill
        tokens = engine.extra.get("max_num_batched_tokens", on_cpu)
        if isinstance(tokens, int) and tokens < engine.max_num_seqs:
            yield (
                f"{setting}.max_num_seqs: {engine.max_num_seqs} is more than the {tokens} tokens of a batch of vLLM's "
                "(extra.max_num_batched_tokens); lower it or raise them"
            )


def _wait_problems(section: Section, place: str = "") -> Iterator[str]:
    for name, value in section:
        if isinstance(value, Section):
            yield from _wait_problems(value, f"{place}{name}.")
        elif name.endswith("_s") and value > LONGEST_S:
            yield f"{place}{name}: {value:g} s are more than Python can wait; give at most {LONGEST_S:g}"


def _resources(config: Settings) -> Iterator[tuple[str, ResourcesConfig]]:
    yield "generation", config.generation.resources
    yield "train", config.train.resources
    if config.scorer:
        yield "scorer", config.scorer.resources
    yield "serving", config.serving.resources


def _engines(config: Settings) -> Iterator[tuple[str, ResourcesConfig, str, EngineConfig]]:
    """Yields stage, resources, place of the engine's settings, and these settings."""
    generation, serving = config.generation, config.serving
    yield "generation", generation.resources, "generation.engine", generation.engine
    place = "serving.engine" if serving.engine else "generation.engine"
    yield "serving", serving.resources, place, config.serving_engine
