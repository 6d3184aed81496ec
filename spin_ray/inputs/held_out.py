"""Held-out conversations of the training data (``data.heldout_fraction``)."""

import hashlib
import json
from itertools import dropwhile, takewhile
from typing import Literal

from spin_ray.errors import DataError
from spin_ray.inputs.messages import Conversation

Part = Literal["trained", "held out"]


def part_of(conversation: Conversation, fraction: float) -> Part:
    """Returns the part of the data that a conversation belongs to.

    A digest of the first question decides, so that conversations that begin with the same one stay together. Order,
    other rows, system message and ``data.turns`` change nothing.
    """
    asked = dropwhile(lambda message: message["role"] != "user", conversation)
    question = [message["content"] for message in takewhile(lambda message: message["role"] != "assistant", asked)]
    drawn = hashlib.blake2b(json.dumps(question).encode(), digest_size=8).digest()
    return "held out" if int.from_bytes(drawn, "big") < fraction * 2**64 else "trained"


def none_held_out(fraction: float, source: str) -> DataError:
    """Returns the error of data without a usable held-out conversation."""
    return DataError(
        f"data.heldout_fraction: {fraction:g} holds no conversation of {source} out (those that begin with the same "
        "question stay together); raise it, or name other rows as data.heldout"
    )
