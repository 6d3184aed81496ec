"""Ray Train's controllers in one process; groups and deaths: tests/ray."""

import os

import pytest

from spin_ray.runtime import controllers


@pytest.mark.parametrize("fails", [False, True])
def test_a_controller_leaves_no_variable_to_the_next(monkeypatch, fails):
    seen = []

    class Controller:
        async def run(self):
            seen.append({name: os.environ.get(name) for name in ("RAY_TRAIN_OF_ONE", "RAY_TRAIN_OF_BOTH")})
            if fails:
                raise RuntimeError("the group died")

        def get_result(self):
            return "result"

    monkeypatch.setattr(controllers, "TrainController", Controller)
    monkeypatch.setenv("RAY_TRAIN_OF_BOTH", "the actor's own")
    monkeypatch.delenv("RAY_TRAIN_OF_ONE", raising=False)
    actor = controllers.TrainControllers()
    for environment in ({"RAY_TRAIN_OF_ONE": "1", "RAY_TRAIN_OF_BOTH": "2"}, {}):
        try:
            assert actor.run(environment, {}) == "result"
        except RuntimeError:
            assert fails
    assert seen == [
        {"RAY_TRAIN_OF_ONE": "1", "RAY_TRAIN_OF_BOTH": "2"},
        {"RAY_TRAIN_OF_ONE": None, "RAY_TRAIN_OF_BOTH": "the actor's own"},
    ]
