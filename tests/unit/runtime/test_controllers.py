"""Ray Train's controllers in one process; groups and deaths: tests/ray."""

import os

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from spin_ray.errors import ConfigError, StageError, TransientError
from spin_ray.runtime import controllers
from spin_ray.runtime.mailbox import Mailbox


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


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StageError("the disk is full; see to that"), False),
        (ConfigError("bad"), False),
        (TransientError("a file did not arrive"), True),
        (RuntimeError("nobody expected this"), True),
    ],
)
def test_workers_start_again_unless_an_error_has_a_cure(error, again):
    policy = controllers._SaidOnce(FailureConfig(max_failures=3), Mailbox("none"))
    decision = policy.make_decision(WorkerGroupError("failed", {0: error}))
    assert decision == (FailureDecision.RETRY if again else FailureDecision.RAISE)


def test_of_several_failures_that_of_a_rank_that_lost_no_other_is_told():
    cut_off = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    cause = RuntimeError("CUDA out of memory")
    assert controllers.own_failure(WorkerGroupError("failed", {0: cut_off, 1: cause})) is cause
    assert controllers.own_failure(WorkerGroupError("failed", {0: cut_off})) is cut_off
    assert controllers.own_failure(cause) is cause


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (KeyError("optimizer"), "KeyError: 'optimizer'"),
        (
            RuntimeError("CUDA error: unspecified launch failure\nadvice"),
            "RuntimeError: CUDA error: unspecified launch failure",
        ),
        (RuntimeError(), "RuntimeError"),
        (TransientError("s3://b/c: did not arrive"), "s3://b/c: did not arrive"),
        (
            UserExceptionWithTraceback(ValueError("x"), 'Traceback:\n  File "a.py", line 1\nValueError: x'),
            "ValueError: x",
        ),
    ],
)
def test_a_cause_has_its_type_unless_it_is_a_sentence(failure, told):
    assert controllers.cause_of(WorkerGroupError("failed", {0: failure})) == told
