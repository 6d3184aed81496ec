"""The recipe of the probe's trainings."""

import json

import pyarrow as pa
import pytest

from spin_ray.loop.probe import _recipe, halves_of
from tests.support.fakes import config_of


@pytest.mark.parametrize(
    ("conversations", "trained", "measured"),
    [
        ("abcd", "ab", "cd"),
        ("abcab", "aa", "bbc"),
        ("aaab", "aaa", "b"),
        ("baaa", "b", "aaa"),
        ("aaaa", "aa", "aa"),
    ],
)
def test_a_conversation_is_trained_on_or_measured_on(conversations: str, trained: str, measured: str) -> None:
    rows = pa.table(
        {
            "prompt_id": [f"p{number}" for number in range(len(conversations))],
            "messages": [json.dumps([{"role": "user", "content": str(n)}, {}]) for n in range(len(conversations))],
            "conversation_id": list(conversations),
        }
    )
    found = ["".join(half["conversation_id"].to_pylist()) for half in halves_of(rows)]
    assert found == [trained, measured]


def test_only_the_limits_of_training_are_off() -> None:
    health = {"max_engine_difference": None, "max_loss": 2.0, "max_margin": 5.0, "max_length_change": 2.0}
    config = config_of(probe={}, health=health)
    assert config.probe is not None
    found = _recipe(config, config.probe).health
    assert found.max_engine_difference is None
    assert (found.max_loss, found.max_margin, found.max_real_logp_drop, found.max_length_change) == (None,) * 4
    strict = config_of(probe={}, health={"max_engine_difference": 0.01})
    assert strict.probe is not None
    assert _recipe(strict, strict.probe).health.max_engine_difference == 0.01
