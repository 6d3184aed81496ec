"""Values that torch, vLLM, Ray or a card would refuse only once a stage has begun."""

import pytest

from spin_ray.config.load import parse_config
from spin_ray.errors import ConfigError
from tests.support.fakes import MINIMAL


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"generation": {"replicas": 2, "resources": {"gpus": 0.5}}},
            "generation.engine.gpu_memory_utilization: 2 engines of generation.resources.gpus 0.5 share a card; "
            "0.9 of its memory each leaves none to CUDA; lower it to 0.45 or ask for a GPU each",
        ),
        (  # three of the four find room on a card
            {"generation": {"replicas": 4, "resources": {"gpus": 0.3}, "engine": {"gpu_memory_utilization": 0.34}}},
            "generation.engine.gpu_memory_utilization: 3 engines of generation.resources.gpus 0.3 share a card",
        ),
        ({"serving": {"resources": {"gpus": 0.5}}}, "utilization: 2 engines of serving.resources.gpus 0.5 share"),
        (
            {"serving": {"models": ["latest"], "resources": {"gpus": 0.5}, "engine": {}}},
            "serving.engine.gpu_memory_utilization: 2 engines of serving.resources.gpus 0.5 share a card",
        ),
        (  # sft and two iterates
            {
                "iterations": 2,
                "serving": {"models": ["all"], "resources": {"gpus": 0.25}, "engine": {"gpu_memory_utilization": 0.4}},
            },
            "serving.engine.gpu_memory_utilization: 3 engines of serving.resources.gpus 0.25 share a card",
        ),
        (
            {"serving": {"engine": {"extra": {"max_num_batched_tokens": 128}}}},
            "serving.engine.max_num_seqs: 256 is more than the 128 tokens of a batch of vLLM's",
        ),
        (
            {"generation": {"resources": {"gpus": 1}, "engine": {"gpu_memory_utilization": 1}}},
            "generation.engine.gpu_memory_utilization: 1 of its memory each leaves none to CUDA; lower it to 0.9",
        ),
        ({"train": {"optimizer": {"betas": [0.9, 1]}}}, "train.optimizer.betas: [0.9, 1.0]: torch takes decay rates"),
        ({"sft": {"optimizer": {"betas": [1, 0.9]}}}, "sft.optimizer.betas: [1.0, 0.9]: torch takes decay rates"),
        (
            {"generation": {"sampling": {"temperature": 0.001}}},
            "generation.sampling.temperature: 0.001: vLLM would sample at 0.01; give 0",
        ),
        ({"evaluation": {"examples_temperature": 2.5}}, "evaluation.examples_temperature: 2.5: vLLM refuses more"),
        ({"serving": {"resources": {"gpus": 1.5}}}, "serving.resources.gpus: 1.5: Ray divides no more than one GPU"),
        (
            {"train": {"resources": {"custom": {"GPU": 1}}}},
            "train.resources.custom.GPU: is a resource of Ray's own; use",
        ),
        ({"train": {"resources": {"custom": {"a": 1e-5}}}}, "train.resources.custom.a: 1e-05: Ray counts in steps of"),
        (  # max(2048, model.max_length) tokens, as prompts are prefilled whole on CPUs
            {"generation": {"engine": {"max_num_seqs": 4096}}},
            "generation.engine.max_num_seqs: 4096 is more than the 2048 tokens of a batch of vLLM's",
        ),
        ({"train": {"stall_timeout_s": 1e12}}, "train.stall_timeout_s: 1e+12 s are more than Python can wait"),
    ],
)
def test_what_would_fail_late_is_refused(sections, problem):
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL | sections, source="r.yaml")
    assert problem in str(caught.value)


def test_engines_may_share_a_gpu():
    config = parse_config(MINIMAL | {"generation": {"resources": {"gpus": 0.5}}}, source="r.yaml")
    assert config.generation.resources.bundle == {"CPU": 1, "GPU": 0.5}


@pytest.mark.parametrize(
    "sections",
    [
        {"generation": {"replicas": 2, "resources": {"gpus": 0.5}, "engine": {"gpu_memory_utilization": 0.49}}},
        {"generation": {"replicas": 2, "resources": {"gpus": 0.6}}},  # a card has room for one
        {"serving": {"models": ["iter-0"], "resources": {"gpus": 0.5}}},
        {"generation": {"engine": {"extra": {"max_num_batched_tokens": 128}}}},  # max_num_seqs is lowered to it
        {"serving": {"resources": {"gpus": 0.5}}, "train": {"lora": {"merge": False}}},  # one engine for all adapters
        {"generation": {"sampling": {"temperature": 0}}, "evaluation": {"examples_temperature": 0.01}},
        {"generation": {"resources": {"gpus": 1}, "engine": {"max_num_seqs": 4096}}},
    ],
)
def test_values_at_the_limits_of_vllm_and_of_a_card_are_taken(sections):
    parse_config(MINIMAL | sections, source="r.yaml")
