"""Checks of the engine's arguments before anything runs. They import no vLLM, which takes seconds."""

import ast
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from spin_ray.config.compilers import missing_tools
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import EngineConfig
from spin_ray.errors import ConfigError
from spin_ray.runtime.gpu import check_triton, runs_elsewhere

_OF_GENERATION = {"engine/arg_utils.py": ("EngineArgs",)}
"""Classes whose fields are the arguments, by file."""
_OF_SERVING = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "entrypoints/launchers/cli_args.py": ("BaseFrontendArgs", "FrontendArgs"),
}
_OF_LLM = {"chat_template"}
"""Arguments of ``vllm.LLM`` alone."""


def check_engine(config: SpinConfig) -> None:
    """Checks what this machine's vLLM would refuse; the nodes of a cluster have their own.

    Raises:
        ConfigError: an argument in ``extra`` is unknown, or there is nothing to compile kernels with.
    """
    if runs_elsewhere(config):
        return
    engine = config.generation.engine
    _refuse_unknown("generation", engine, serving=False)
    if config.serving.engine:
        _refuse_unknown("serving", config.serving.engine, serving=True)
    if config.generation.resources.gpus:
        check_triton("generation.resources.gpus")
        return
    compiles = not (engine.enforce_eager or "compilation_config" in engine.extra)
    if compiles and (missing := missing_tools(cxx=True)):
        raise ConfigError(
            f"generation.engine.enforce_eager: false compiles for the CPU, which needs {missing}; install it or set "
            "true"
        )


def check_serving_engine(config: SpinConfig) -> None:
    """Raises ConfigError if the local vLLM lacks an argument in ``extra``, or tools that engines on GPUs need."""
    _refuse_unknown("serving" if config.serving.engine else "generation", config.serving_engine, serving=True)
    if config.serving.resources.gpus:
        check_triton("serving.resources.gpus")


def _refuse_unknown(section: str, engine: EngineConfig, *, serving: bool) -> None:
    known = argument_names(serving=serving) if engine.extra else None
    for name in engine.extra if known else ():
        if known and name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{section}.engine.extra.{name}: vLLM has no such argument{hint}")


@cache
def argument_names(*, serving: bool) -> frozenset[str] | None:
    """Returns the names that the local vLLM takes; None if it is not installed, or has them elsewhere."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = set[str](() if serving else _OF_LLM)
    for file, classes in (_OF_SERVING if serving else _OF_GENERATION).items():
        path = Path(spec.submodule_search_locations[0]) / file
        names = set(_fields(path, classes)) if path.is_file() else set()
        if not names:
            return None
        found |= names
    return frozenset(found)


def _fields(path: Path, classes: tuple[str, ...]) -> Iterator[str]:
    for definition in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(definition, ast.ClassDef) and definition.name in classes:
            for line in definition.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id
