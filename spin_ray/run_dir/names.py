"""Names of iterates, iterations, parts and pairs.

θ_0 is ``sft`` everywhere. θ_t with t ≥ 1 is named after the iteration that made it: ``iter_{t-1:03d}`` on disk,
``iter-{t-1}`` in the API.
"""

import re

LATEST = "latest"
"""Newest iterate, in the API and on the command line."""


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def iteration_name(iteration: int) -> str:
    return f"iter_{iteration:03d}"


def train_log_path(folder: str) -> str:
    """Returns the path of the log of the training whose model is in ``folder``."""
    return f"{folder}/train_log.jsonl"


def iterate_name(iterate: int) -> str:
    """Names an iterate's folder: ``0 -> sft``, ``1 -> iter_000``."""
    return "sft" if iterate == 0 else iteration_name(iterate - 1)


def iterate_number(name: str) -> int:
    """Inverts ``iterate_name`` and ``api_name``."""
    return 0 if name == "sft" else int(name[len("iter_") :]) + 1


def is_iterate_name(name: str) -> bool:
    """Tells whether ``name`` is an iterate's on disk, with or without leading zeros."""
    return re.fullmatch(r"sft|iter_[0-9]+", name) is not None


def read_iterate(word: str) -> int | None:
    """Returns t of θ_t: 0 for ``sft``; 2 for ``iter_001``, ``iter-1`` or ``1``; None for other words."""
    match = re.fullmatch(r"(?:iter[_-])?([0-9]{1,9})", word)
    if match is None:
        return 0 if word == "sft" else None
    return int(match[1]) + 1


def api_name(iterate: int) -> str:
    return "sft" if iterate == 0 else f"iter-{iterate - 1}"


def api_spelling(word: str) -> str:
    """Returns the API's name for any spelling of an iterate; other words unchanged."""
    number = read_iterate(word)
    return word if number is None else api_name(number)


def pair_id(prompt_id: str, iteration: int, sample: int) -> str:
    return f"{prompt_id}/{iteration:03d}/{sample}"


def answer_id(prompt_id: str, sample: int | str) -> str:
    return f"{prompt_id}/{sample}"


def revision_id(answer_id: str, iteration: int) -> str:
    return f"{answer_id}/{iteration:03d}"


def prompt_of(pair_id: str) -> str:
    """Returns the prompt's id from that of a pair or an answer."""
    return pair_id.partition("/")[0]


def sample_of(pair_id: str) -> str:
    return pair_id.rpartition("/")[2]


VOTES = "votes.sqlite"
"""Database of the arena's votes in a run folder."""
SELF, OPPONENT = "self", "opponent"
"""Origins of a held-out sample: the iterate or its opponent."""


def heldout_pair_id(prompt_id: str, whose: str) -> str:
    return f"{prompt_id}/{whose}"


def is_sample_of(pair_id: str, whose: str) -> bool:
    return pair_id.endswith(f"/{whose}")
