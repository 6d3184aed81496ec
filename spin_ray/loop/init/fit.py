"""Settings that fit the model's positions, the rows' lengths and the machines' memory."""

import sys
from collections.abc import Collection, Iterator, Sequence
from itertools import product
from math import ceil

from spin_ray.config.load import parse_config
from spin_ray.config.recipe import SpinConfig, is_within
from spin_ray.errors import ResourceError
from spin_ray.loop.algorithms.table import find_algorithm
from spin_ray.loop.init.look import MOST_CPUS, Look, Machines
from spin_ray.loop.init.settings import Setting, Settings, tree_of
from spin_ray.planning.cluster import places
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.plan import Given, check_memory, read_work
from spin_ray.planning.rows import settle
from spin_ray.planning.run_cost import Phase
from spin_ray.planning.work import Work
from spin_ray.runtime.precision import with_precision

LONGEST_PROMPT_AND_RESPONSE, LONGEST_RESPONSE = 0.99, 0.95
"""Fractions of the rows that fit ``model.max_length`` and ``max_tokens``."""
LEAST_STEPS = 10
"""Fewest optimizer steps of a pass over the rows. Few rows get a smaller batch than the paper's."""
PAPER_BATCH = 64
PACK = {"cpu": 1024, "gpu": 4096}
"""Tokens per pack, unless rows are longer. On CPU a pack takes seconds."""
HELDOUT_ROWS = 500
LONGEST_UNSEEN, UNSEEN_TOKENS, UNSEEN_ROWS = 2048, 256, 50_000
"""Lengths and rows of the paper, for data that is not on this machine."""
_ADAPTER_RATE = Setting(5e-6, "ten times the paper's, as adapters want 10 to 100 times")
_ROUND = 64
_ROUND_RESPONSE = 32


def fit(
    given: Settings, seen: Look, machines: Machines, kept: Collection[str] = ()
) -> tuple[Settings, list[Phase], str]:
    """Returns the given and fitted settings, the run's phases, and the reason if nothing fits in memory.

    Settings whose places are ``kept`` stay as given.
    Phases and reason are empty if the model's shape is unknown. The first change that fits is taken: none, smaller
    packs, adapters, adapters on 4 bits, weights in the CPU's memory. All are tried with one GPU per engine, then more.
    """
    lengths = given | _lengths(given, seen)
    base = _machines(lengths, machines) | _batch(given, seen) | _evaluation(given) | _rate(given) | lengths
    base = _without(base, kept) | {place: given[place] for place in kept}
    if seen.shape is None:
        return base, [], ""
    work, misfit = _work(seen, parse_config(tree_of(base), source="the settings given")), ""
    for changes in _ladder(base, machines, seen.shape):
        settings = base | _without(changes, kept)
        try:
            config = with_precision(parse_config(tree_of(settings), source="the settings given"))
            sized, algorithm = settle(config, work.rows), find_algorithm(config.algorithm)
            phases = check_memory(sized, seen.shape, machines.cluster, work, algorithm)
        except ResourceError as error:
            misfit = misfit or str(error)
        else:
            return settings, phases, ""
    return base, [], misfit


def _without(settings: Settings, kept: Collection[str]) -> Settings:
    return {place: setting for place, setting in settings.items() if not is_within(place, kept)}


def _lengths(given: Settings, seen: Look) -> Settings:
    whole = [length for each in seen.train for length in each.lengths]
    responses = [length for each in seen.train for length in each.responses]
    place, most = "model.max_length", seen.positions or sys.maxsize
    wanted = given.get(place)
    if wanted is None:
        longest = _rounded(quantile(whole, LONGEST_PROMPT_AND_RESPONSE), _ROUND) if whole else LONGEST_UNSEEN
        wanted = Setting(longest)
    if wanted.value > most:
        wanted = Setting(most, f"{wanted.why}, lowered to the model's positions".removeprefix(", "))
    if whole:
        why = f"holds {_share(whole, wanted.value)} of the rows, median {quantile(whole, 0.5)} tokens"
        wanted = Setting(wanted.value, f"{wanted.why}; {why}" if wanted.why else why)
    tokens = Setting(max(1, min(UNSEEN_TOKENS, wanted.value // 2)))
    if responses:
        most = min(_rounded(quantile(responses, LONGEST_RESPONSE), _ROUND_RESPONSE), wanted.value - 1)
        held = f"holds {_share(responses, most)} of the human responses, median {quantile(responses, 0.5)} tokens"
        tokens = Setting(most, held)
    return {place: wanted, "generation.sampling.max_tokens": tokens}


def _evaluation(given: Settings) -> Settings:
    # data.heldout_fraction says how many; each of several sources says how many it gives
    if "data.heldout" not in given or not isinstance(given["data.heldout"].value, str):
        return {}
    return {"evaluation.max_rows": Setting(HELDOUT_ROWS, "the first rows; leave it out to measure on all")}


def _rate(given: Settings) -> Settings:
    return {"train.learning_rate": _ADAPTER_RATE} if "train.lora.rank" in given else {}


def _share(lengths: Sequence[int], limit: int) -> str:
    return f"{sum(length <= limit for length in lengths) / len(lengths):.1%}"


def quantile(lengths: Sequence[int], part: float) -> int:
    """Returns the smallest length that holds the fraction ``part`` of the rows."""
    ordered = sorted(lengths)
    return ordered[max(0, ceil(part * len(ordered)) - 1)]


def _rounded(length: int, step: int) -> int:
    return ceil(length / step) * step


def _machines(lengths: Settings, machines: Machines) -> Settings:
    tree = SpinConfig.model_validate(tree_of(lengths | _NO_CHECK))
    least = find_algorithm(tree.algorithm).least_pack(tree)
    if not machines.gpus:
        return {
            "generation.resources.cpus": Setting(machines.cpus, "every core of this machine"),
            "generation.engine.enforce_eager": Setting(True, "saves a minute of start-up"),
            "train.resources.cpus": Setting(machines.cpus),
            "train.pack_length": Setting(max(least, PACK["cpu"]), "tokens of one micro-batch"),
        }
    cpus = max(1, min(MOST_CPUS, machines.cpus // machines.cluster.gpus_per_node))
    return {
        "generation.replicas": Setting(machines.gpus, "one engine for each GPU"),
        "generation.resources.cpus": Setting(cpus),
        "generation.resources.gpus": Setting(1),
        "train.workers": Setting(machines.gpus, "one worker for each GPU"),
        "train.resources.cpus": Setting(cpus),
        "train.resources.gpus": Setting(1),
        "train.pack_length": Setting(max(least, PACK["gpu"]), "tokens of one micro-batch"),
        "serving.resources.gpus": Setting(1),
        **({"serving.models": Setting(["latest"], "an engine takes the card")} if machines.gpus == 1 else {}),
    }


_NO_CHECK: Settings = {"train.pack_length": Setting(2**30)}
"""A pack length that passes every check, until the real one is known."""


def _batch(given: Settings, seen: Look) -> Settings:
    if seen.rows is None:
        return {}
    fitting = 1
    while 2 * fitting <= min(PAPER_BATCH, seen.rows / LEAST_STEPS):
        fitting *= 2
    if fitting == PAPER_BATCH:
        return {}
    why = f"{seen.rows:,} rows make {seen.rows // fitting} steps; the paper's is {PAPER_BATCH}"
    batches = {"train.global_batch_pairs": Setting(fitting, why)}
    if any(place.startswith("sft.") for place in given):
        batches["sft.global_batch_rows"] = Setting(fitting)
    return batches


def _ladder(base: Settings, machines: Machines, shape: ModelShape) -> Iterator[Settings]:
    """Yields changes of settings, the least harmful first."""
    config = parse_config(tree_of(base), source="the settings given")
    least = find_algorithm(config.algorithm).least_pack(config)
    small = {"train.pack_length": Setting(least, "the least that holds a prompt with both responses")}
    if not machines.gpus:
        for cache, packs in product((2, 4, 8, 16), ({}, small)):
            yield packs | ({"generation.engine.cpu_kv_cache_gib": Setting(cache)} if cache > 2 else {})
        return
    adapters = {
        "train.lora.rank": Setting(16, "adapters: all weights do not fit in training"),
        "train.learning_rate": _ADAPTER_RATE,
    }
    if "train.lora.rank" in base:
        adapters = {}
    elif "train.learning_rate" in base:
        rate, why = base["train.learning_rate"]
        adapters["train.learning_rate"] = Setting(
            float(f"{10 * rate:.3g}"), f"ten times {why}, as adapters want 10 to 100 times"
        )
    quantised = {
        "train.lora.base": Setting("nf4", "frozen weights of 4 bits (extra `quantised`): those of 16 do not fit"),
        "train.lora.merge": Setting(False, "a run commits adapters on quantised weights as they are"),
    }
    if "train.lora.base" in base:
        quantised = {}
    offload = {"train.offload": Setting(True, "weights stay in the CPU's memory: they do not fit the card")}
    lean = small | adapters
    rungs: list[Settings] = [{}, small, adapters, lean, lean | quantised, lean | offload, small | offload]
    most, sizes = machines.cluster.gpus_per_node, shape.engine_sizes
    for parallel, rung in product((1, 2, 4, 8), rungs):
        if parallel <= most and not sizes.why_not(parallel):
            yield rung | (_shared_by(parallel, machines) if parallel > 1 else {})


def _shared_by(parallel: int, machines: Machines) -> Settings:
    why = "the model does not fit one card with its cache"
    return {
        "generation.engine.tensor_parallel_size": Setting(parallel, why),
        "generation.resources.gpus": Setting(parallel),
        "serving.resources.gpus": Setting(parallel),
        "generation.replicas": Setting(machines.cluster.nodes * places(parallel, machines.cluster.gpus_per_node)),
    }


def _work(seen: Look, config: SpinConfig) -> Work:
    """Returns the plan's rows and lengths. Those of data that is not on this machine are assumed."""
    if seen.train:
        return read_work(config, Given())
    half, heldout = config.model.max_length / 2, HELDOUT_ROWS if config.data.holds_out else 0
    generated = min(half / 2, config.generation.sampling.max_tokens)
    return Work(rows=UNSEEN_ROWS, prompt=half / 2, real=half / 2, generated=generated, heldout_rows=heldout)
