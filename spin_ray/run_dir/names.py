"""Names of iterates, iterations, parts and pairs: made and parsed here alone.

θ_0 is called ``sft``, on disk and by the API. θ_t with t ≥ 1 is ``iter_{t-1:03d}`` on disk, after the iteration that
made it, and ``iter-{t-1}`` by the API.
"""

import re

LATEST = "latest"
"""The newest iterate, for the API and the command line."""


def part_name(number: int) -> str:
    """Returns the name of a part: ``7 -> part-00007.parquet``."""
    return f"part-{number:05d}.parquet"


def iteration_name(iteration: int) -> str:
    """Returns the folder of an iteration: ``0 -> iter_000``."""
    return f"iter_{iteration:03d}"


def iterate_name(iterate: int) -> str:
    """Returns the folder of an iterate: ``0 -> sft``, ``1 -> iter_000``, as iteration t makes θ_{t+1}."""
    return "sft" if iterate == 0 else iteration_name(iterate - 1)


def iterate_number(name: str) -> int:
    """Inverts ``iterate_name``: ``sft -> 0``, ``iter_000 -> 1``."""
    return 0 if name == "sft" else int(name.removeprefix("iter_")) + 1


def is_iterate_name(name: str) -> bool:
    """Tells whether ``name`` is an iterate's on disk, e.g. ``iter_012``; zeros may be missing."""
    return re.fullmatch(r"sft|iter_[0-9]+", name) is not None


def is_iterate(name: str) -> bool:
    """Tells whether ``name`` is an iterate's in the API: ``iter-12`` is, ``iter-012`` is not."""
    number = name.removeprefix("iter-")
    return name == "sft" or (name != number and number.isascii() and number.isdigit() and str(int(number)) == number)


def age(name: str) -> int:
    """Inverts ``api_name``: ``sft -> 0``, ``iter-0 -> 1``."""
    return 0 if name == "sft" else int(name.removeprefix("iter-")) + 1


def api_name(iterate: int) -> str:
    """Returns the name of an iterate in the API: ``0 -> sft``, ``1 -> iter-0``."""
    return "sft" if iterate == 0 else f"iter-{iterate - 1}"


def pair_id(prompt_id: str, iteration: int, sample: int) -> str:
    """Returns the id of a prompt's pair with one sample of an iteration: ``("9f2c", 1, 0) -> 9f2c/001/0``."""
    return f"{prompt_id}/{iteration:03d}/{sample}"


def revision_id(answer_id: str, iteration: int) -> str:
    """Returns the id of a row that SEFT made of an answer: ``("9f2c/0", 1) -> 9f2c/0/001``."""
    return f"{answer_id}/{iteration:03d}"


def prompt_of(pair_id: str) -> str:
    """Returns the prompt of a pair: ``9f2c/001/0 -> 9f2c``."""
    return pair_id.partition("/")[0]


SELF, OPPONENT = "self", "opponent"
"""Whose sample a held-out pair has: the iterate's or its opponent's."""


def heldout_pair_id(prompt_id: str, whose: str) -> str:
    """Returns the id of a held-out prompt's pair: ``("9f2c", SELF) -> 9f2c/self``."""
    return f"{prompt_id}/{whose}"


def is_sample_of(pair_id: str, whose: str) -> bool:
    """Tells whether a held-out pair has the sample of ``whose``: SELF or OPPONENT."""
    return pair_id.endswith(f"/{whose}")
