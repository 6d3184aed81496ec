"""What a worker on a GPU is started with, and what its card must be able to do."""

import pytest
import torch

from spin_ray.errors import ResourceError
from spin_ray.runtime import gpu


def test_memory_segments_grow_unless_the_user_chose_an_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert gpu.environment() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert gpu.environment() == {}
    assert gpu.environment(deterministic=True) == {"TORCHINDUCTOR_DETERMINISTIC": "1"}


def test_bf16_on_a_card_without_it_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is told by torch alone; here its answers are a Tesla T4's."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ResourceError, match=r"^train\.precision: bf16 is not computed by Tesla T4; set fp32"):
        gpu.check(torch.device("cuda", 0), "bf16")
    gpu.check(torch.device("cuda", 0), "fp32")
    gpu.check(torch.device("cpu"), "bf16")
