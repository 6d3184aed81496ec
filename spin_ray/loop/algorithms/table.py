"""The algorithms by name, and the check of a recipe."""

from collections.abc import Iterator

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh
from spin_ray.errors import ConfigError
from spin_ray.inputs.graders import find_grader
from spin_ray.learner.backends import find_backend
from spin_ray.learner.import_path import import_object
from spin_ray.learner.losses import resolve_loss
from spin_ray.learner.optimizers import find_optimizer
from spin_ray.loop.algorithms.base import Algorithm
from spin_ray.loop.algorithms.continued_sft import ContinuedSft
from spin_ray.loop.algorithms.dpo import Dpo
from spin_ray.loop.algorithms.seft.algorithm import Seft
from spin_ray.loop.algorithms.self_reinforcement import SelfReinforcement
from spin_ray.loop.algorithms.spin import Spin
from spin_ray.loop.algorithms.sppo.algorithm import Sppo

ALGORITHMS: dict[str, Algorithm] = {
    "spin": Spin(),
    "continued_sft": ContinuedSft(),
    "dpo": Dpo(),
    "sppo": Sppo(),
    "self_reinforcement": SelfReinforcement(),
    "seft": Seft(),
}


def find_algorithm(name: str) -> Algorithm:
    """Returns the algorithm of a name or import path ``my_pkg.mine:Mine``.

    Raises:
        ConfigError: there is none.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    found = import_object(name, "algorithm", ALGORITHMS)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError(f"algorithm: {name} is no subclass of spin_ray.loop.algorithms.base.Algorithm")
    return found()


def check_algorithm(config: SpinConfig) -> None:
    """Checks the recipe against its algorithm, and follows its import paths.

    Raises:
        ConfigError: a setting is missing or has no reader, or a path leads nowhere.
    """
    problems = list(_problems(config, find_algorithm(config.algorithm)))
    if problems:
        raise ConfigError("; ".join(problems))
    find_backend(config.train.backend, config.train.mesh if isinstance(config.train.mesh, Mesh) else None)
    if config.evaluation.grade != "number":
        find_grader(config.evaluation.grade)
    for section in (config.train, config.sft, config.reviser):
        if section is not None:
            find_optimizer(section.optimizer)


def _problems(config: SpinConfig, algorithm: Algorithm) -> Iterator[str]:
    name = config.algorithm
    for needed in algorithm.needs:
        if not _is_given(config, needed):
            yield f"{needed}: algorithm {name} needs it"
    readers: dict[str, list[str]] = {}
    for reader, its in ALGORITHMS.items():
        for optional in its.needs + its.reads:
            readers.setdefault(optional, []).append(reader)
    readers.pop("sft", None)  # goes with every algorithm
    for optional, names in readers.items():
        if _is_given(config, optional) and optional not in algorithm.needs + algorithm.reads:
            yield f"{optional}: is for algorithm {' and '.join(names)}, not for {name}; leave it out"
    loss = resolve_loss(config.objective.loss)
    if loss.needs_wins and not algorithm.makes_wins:
        yield f"objective.loss: {config.objective.loss} needs win probabilities, which algorithm {name} does not make"
    if not loss.needs_reference and config.objective.reference_alpha < 1:
        yield f"objective.reference_alpha: the loss {config.objective.loss} has no reference; leave it out"
    yield from algorithm.problems(config)


def _is_given(config: SpinConfig, name: str) -> bool:
    section, _, field = name.partition(".")
    value = getattr(config, section)
    return (getattr(value, field) if field else value) is not None
