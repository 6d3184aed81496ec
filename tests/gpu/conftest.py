"""Tests of the learner on a CUDA card; ``make gpu-bench`` measures what these only check."""

import pytest
import torch

from tests.support.learner_cases import one_rank


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def card() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA card here (torch {torch.__version__})")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} is older than compute capability 8.0")
    return torch.device("cuda")


@pytest.fixture
def alone(card, tmp_path):
    """Opens a process group for both devices, which FSDP2 needs."""
    with one_rank(tmp_path, "cpu:gloo,cuda:nccl"):
        yield card
