"""What vLLM would refuse after a warm-up is told at the start."""

import dataclasses
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spin_ray.config import compilers
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError
from spin_ray.runtime import engine_names, gpu
from spin_ray.runtime.engine_names import argument_names, check_engine, check_serving_engine


def recipe(**sections: Any) -> SpinConfig:
    return SpinConfig.model_validate({"model": {"path": "m"}, "data": {"train": "d"}} | sections)


@pytest.mark.parametrize(
    ("place", "name", "hint"),
    [
        ("generation", "max_num_batched_token", r" \(did you mean max_num_batched_tokens\?\)"),
        ("generation", "enable_log_requests", ".*"),
        ("generation", "zzz", ""),
        ("serving", "kv_cache_dtyp", r" \(did you mean kv_cache_dtype\?\)"),
    ],
)
def test_an_argument_that_vllm_lacks_is_named_with_the_nearest(place: str, name: str, hint: str) -> None:
    said = rf"^{place}\.engine\.extra\.{name}: vLLM has no such argument{hint}$"
    with pytest.raises(ConfigError, match=said):
        check_engine(recipe(**{place: {"engine": {"extra": {name: 1}}}}))


def test_arguments_that_vllm_has_pass_and_a_cluster_has_a_vllm_of_its_own() -> None:
    check_engine(recipe(generation={"engine": {"extra": {"kv_cache_dtype": "fp8", "block_size": 32}}}))
    check_engine(recipe(serving={"engine": {"extra": {"enable_auto_tool_choice": True, "kv_cache_dtype": "fp8"}}}))
    check_engine(recipe(generation={"engine": {"extra": {"zzz": 1}}}, cluster={"address": "head:6379"}))


def test_a_server_reads_the_names_of_its_own_engines_alone() -> None:
    unknown = {"engine": {"extra": {"zzz": 1}}}
    check_serving_engine(recipe(generation=unknown, serving={"engine": {}}))
    with pytest.raises(ConfigError, match=r"^generation\.engine\.extra\.zzz: vLLM has no such argument"):
        check_serving_engine(recipe(generation=unknown))


def test_without_vllm_or_with_one_that_keeps_its_arguments_elsewhere_no_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for found in (None, SimpleNamespace(submodule_search_locations=[str(tmp_path)])):
        argument_names.cache_clear()
        monkeypatch.setattr(engine_names, "find_spec", lambda name, found=found: found)
        check_engine(recipe(generation={"engine": {"extra": {"zzz": 1}}}))
    argument_names.cache_clear()


@pytest.mark.slow
def test_the_names_are_the_fields_of_vllms_own_classes() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    def names(*kinds: Any) -> set[str]:
        return {field.name for kind in kinds for field in dataclasses.fields(kind)}

    assert argument_names(serving=False) == names(EngineArgs) | {"chat_template"}
    assert argument_names(serving=True) == names(AsyncEngineArgs, FrontendArgs)


def test_a_missing_compiler_is_told_before_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CXX", "CC", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError,
        match=r"^generation\.engine\.enforce_eager: .* needs a C\+\+ compiler \(g\+\+\) \(apt-get install g\+\+\)",
    ):
        check_engine(recipe())
    check_engine(recipe(generation={"engine": {"enforce_eager": True}}))
    with pytest.raises(
        ConfigError,
        match=r"^generation\.resources\.gpus: .* lacks a C compiler \(gcc or clang\) \(apt-get install gcc\)",
    ):
        check_engine(recipe(generation={"resources": {"gpus": 1}}))
    with pytest.raises(ConfigError, match=r"^serving\.resources\.gpus: .* lacks a C compiler"):
        check_serving_engine(recipe(serving={"resources": {"gpus": 1}}))
    check_engine(recipe(cluster={"address": "head:6379"}))
    with pytest.raises(ConfigError, match=r"^train\.compile: needs a C\+\+ compiler \(g\+\+\)"):
        gpu.check_compiler(recipe(train={"compile": True}))
    with pytest.raises(ConfigError, match=r"^train\.compile: needs a C compiler \(gcc or clang\)"):
        gpu.check_compiler(recipe(train={"compile": True, "resources": {"gpus": 1}}))
    gpu.check_compiler(recipe(train={"compile": "auto"}))


def test_missing_headers_of_python_are_told_before_an_engine_of_a_gpu_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A distribution's Python has them in a package of their own."""
    gpus = recipe(generation={"resources": {"gpus": 1}})
    monkeypatch.setenv("CC", sys.executable)
    check_engine(gpus)
    monkeypatch.setattr(compilers.sysconfig, "get_path", lambda *_: str(tmp_path))
    minor = sys.version_info.minor
    with pytest.raises(ConfigError) as told:
        check_engine(gpus)
    assert str(told.value) == (
        "generation.resources.gpus: vLLM on GPUs compiles with Triton, for which "
        f"{socket.gethostname()} lacks {tmp_path}/Python.h (apt-get install python3.{minor}-dev, or take a "
        "Python that brings its headers, as uv's and conda's do)"
    )
    check_engine(recipe(generation={"resources": {"gpus": 1}}, cluster={"address": "head:6379"}))
