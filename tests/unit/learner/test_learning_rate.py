"""The schedule of the learning rate, by hand."""

from typing import Any

import pytest

from spin_ray.learner.backends.base import learning_rate_at


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant", [1 / 3, 2 / 3, *[1.0] * 8]),
    ],
)
def test_learning_rate_by_hand(schedule: Any, expected: list[float]) -> None:
    """10 steps, 20 % warm-up: two rising steps at 1/3 and 2/3 of the peak (never 0), the third at the peak, then
    1 − (step−2)/8, which would be 0 at step 10.
    """
    given = {"peak": 4.0, "total_steps": 10, "warmup_fraction": 0.2, "schedule": schedule}
    assert [learning_rate_at(step, **given) / 4 for step in range(10)] == pytest.approx(expected)
    assert schedule != "linear" or learning_rate_at(10, **given) == 0


def test_cosine_learning_rate_by_hand() -> None:
    """4 steps, no warm-up: (1 + cos(π·t/4))/2 = 1, (2+√2)/4, 1/2, (2−√2)/4; and 0 after the last."""
    given = {"peak": 1.0, "total_steps": 4, "warmup_fraction": 0.0, "schedule": "cosine"}
    found = [learning_rate_at(step, **given) for step in range(5)]
    assert found == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0])
