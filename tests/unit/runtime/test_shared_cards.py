"""Engines that share a card start one after another."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from spin_ray.errors import StageError
from spin_ray.runtime.shared_cards import alone_on_card


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@contextmanager
def on(card: str, share: float = 0.5) -> Iterator[None]:
    """Starts an engine in a process that Ray gave ``card``."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", card)
        held = ExitStack()
        held.enter_context(alone_on_card(share, "generation", timeout_s=0))
    with held:
        yield


def test_two_engines_of_one_card_do_not_start_together():
    with (
        on("3"),
        pytest.raises(
            StageError, match=r"^generation\.start_timeout_s: after 0 s another engine .* on GPU 3.*gpus 0\.5"
        ),
        on("3"),
    ):
        pass
    with on("3"):
        """The first has started."""


def test_engines_of_other_cards_and_those_with_a_card_of_their_own_wait_for_nobody():
    with on("0"), on("1"), on("MIG-41b3359c-e721-56e5-8009-12e5797ed514"), on("0", share=1), on("", share=0):
        pass


def test_a_process_that_an_engine_forks_does_not_keep_the_lock():
    """Forked while the engine starts, it lives on with the file of the lock."""
    goes, stops = os.pipe()
    with on("0"):
        child = os.fork()
        if not child:
            os.close(stops)
            os.read(goes, 1)
            os._exit(0)
    try:
        with on("0"):
            pass
    finally:
        os.close(stops)
        os.waitpid(child, 0)
