"""Answers of vLLM, streamed and whole, in the form of OpenAI's reference."""

from typing import Any

import pytest

from spin_ray.serving.engines import Item
from spin_ray.serving.events import END, event, objects
from spin_ray.serving.openai_form import Change, changed, likeliest, nothing_generated
from tests.support.pieces import pieces_through

SAMPLED = {"token": "rare", "logprob": -7.0}
BEST, SECOND, THIRD = ({"token": token, "logprob": -logprob} for token, logprob in (("a", 0.5), ("b", 1.5), ("c", 2.5)))


def told(pieces: list[Item], change: Change) -> list[Any]:
    out = pieces_through(lambda said: changed(said, change), pieces)
    return [it for piece in out for it in (objects(piece) if isinstance(piece, str) else [piece])]


@pytest.mark.parametrize(
    ("given", "most", "expected"),
    [
        ([SAMPLED, BEST], 1, [BEST]),
        ([SAMPLED, BEST, SECOND], 2, [BEST, SECOND]),
        ([SECOND, BEST, THIRD], 2, [BEST, SECOND]),
        ([BEST, SECOND], 1, [BEST]),
    ],
)
def test_the_likeliest_tokens_are_told_in_order_whatever_was_sampled(
    given: list[Any], most: int, expected: list[Any]
) -> None:
    """vLLM gives the sampled token first, then the likeliest."""
    choice = {"index": 0, "logprobs": {"content": [given[0] | {"top_logprobs": given}, {"token": "?"}]}}
    without = {"index": 1, "delta": {"content": "x"}, "logprobs": None}
    whole, first, last = told(
        [{"choices": [choice]}, event({"choices": [choice]}) + event({"choices": [without]}) + END], likeliest(most)
    )[:3]
    for answer in (whole, first):
        content = answer["choices"][0]["logprobs"]["content"]
        assert [position["top_logprobs"] for position in content] == [expected, []]
    assert last == {"choices": [without]}


def test_an_echo_alone_reports_no_token_of_an_answer() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    whole, chunk, last, end = told(
        [
            {"choices": [], "usage": dict(usage)},
            event({"choices": []}) + event({"choices": [], "usage": dict(usage)}) + END,
        ],
        nothing_generated,
    )
    assert whole["usage"] == last["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert chunk == {"choices": []} and end is None


def test_what_an_engine_refuses_passes_as_it_is() -> None:
    error = {"error": {"message": "no", "code": 400}}
    assert told([error, event(error)], likeliest(1)) == told([error, event(error)], nothing_generated) == [error, error]
