"""Names of iterates, iterations, parts and pairs: made and parsed here alone.

θ_0 is called ``sft``, on disk and by the API. θ_t with t ≥ 1 is ``iter_{t-1:03d}`` on disk, after the iteration that
made it, and ``iter-{t-1}`` by the API.
"""

import re

LATEST = "latest"
"""The newest iterate, for the API and the command line."""


def part_name(number: int) -> str:
    """``7 -> part-00007.parquet``."""
    return f"part-{number:05d}.parquet"


def iteration_name(iteration: int) -> str:
    """``0 -> iter_000``: the first SPIN iteration."""
    return f"iter_{iteration:03d}"


def iterate_name(iterate: int) -> str:
    """``0 -> sft`` (θ_0), ``1 -> iter_000``: iteration t turns θ_t into θ_{t+1} and keeps it in its own folder."""
    return "sft" if iterate == 0 else iteration_name(iterate - 1)


def iterate_number(name: str) -> int:
    """``sft -> 0``, ``iter_000 -> 1``: the inverse of ``iterate_name``."""
    return 0 if name == "sft" else int(name.removeprefix("iter_")) + 1


def is_iterate(name: str) -> bool:
    """Whether ``name`` is how an iterate is called, e.g. ``iter-12``; ``iter-012`` is not."""
    number = name.removeprefix("iter-")
    return name == "sft" or (name != number and number.isascii() and number.isdigit() and str(int(number)) == number)


def age(name: str) -> int:
    """``sft -> 0``, ``iter-0 -> 1``: the number of the iterate."""
    return 0 if name == "sft" else int(name.removeprefix("iter-")) + 1


def api_name(iterate: int) -> str:
    """``0 -> sft``, ``1 -> iter-0``: the inverse of ``age``."""
    return "sft" if iterate == 0 else f"iter-{iterate - 1}"


def is_iterate_name(name: str) -> bool:
    """Tells whether ``name`` is that of an iterate on disk, e.g. ``iter_012``; zeros may be missing."""
    return re.fullmatch(r"sft|iter_[0-9]+", name) is not None


def pair_id(prompt_id: str, iteration: int, sample: int) -> str:
    """``("9f2c", 1, 0) -> 9f2c/001/0``: the pair of a prompt and one sample of that iteration's opponent."""
    return f"{prompt_id}/{iteration:03d}/{sample}"


def revision_id(answer_id: str, iteration: int) -> str:
    """``("9f2c/0", 1) -> 9f2c/0/001``: the row of an answer that was kept or revised."""
    return f"{answer_id}/{iteration:03d}"


def prompt_of(pair_id: str) -> str:
    """``9f2c/001/0 -> 9f2c``."""
    return pair_id.partition("/")[0]


SELF, OPPONENT = "self", "opponent"


def heldout_pair_id(prompt_id: str, whose: str) -> str:
    """``("9f2c", SELF) -> 9f2c/self``: the pair of a held-out prompt and a sample of the iterate or its opponent."""
    return f"{prompt_id}/{whose}"


def is_sample_of(pair_id: str, whose: str) -> bool:
    """Tells whether the sample of a held-out pair is the iterate's (SELF) or its opponent's (OPPONENT)."""
    return pair_id.endswith(f"/{whose}")
