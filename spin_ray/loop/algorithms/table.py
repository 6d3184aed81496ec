"""The algorithms by name, and the checks of a recipe."""

from collections.abc import Iterator

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh, ObjectiveConfig
from spin_ray.errors import ConfigError
from spin_ray.inputs.graders import find_grader, graders_of
from spin_ray.learner.backends import find_backend
from spin_ray.learner.import_path import import_object
from spin_ray.learner.losses import Loss, MarginLoss, SpaceLoss, resolve_loss
from spin_ray.learner.optimizers import find_optimizer
from spin_ray.learner.quantised import check_installed
from spin_ray.loop.algorithms.base import Algorithm
from spin_ray.loop.algorithms.continued_sft import ContinuedSft
from spin_ray.loop.algorithms.dpo import Dpo
from spin_ray.loop.algorithms.sdft import Sdft
from spin_ray.loop.algorithms.seft.algorithm import Seft
from spin_ray.loop.algorithms.self_reinforcement import SelfReinforcement
from spin_ray.loop.algorithms.spin import Spin
from spin_ray.loop.algorithms.sppo.algorithm import Sppo
from spin_ray.loop.algorithms.tspin import Tspin

ALGORITHMS: dict[str, Algorithm] = {
    "spin": Spin(),
    "continued_sft": ContinuedSft(),
    "dpo": Dpo(),
    "sppo": Sppo(),
    "self_reinforcement": SelfReinforcement(),
    "seft": Seft(),
    "tspin": Tspin(),
    "sdft": Sdft(),
}


def find_algorithm(name: str) -> Algorithm:
    """Returns the algorithm with a name or import path, e.g. ``my_pkg.mine:Mine``.

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
    """Checks the recipe's settings, its import paths and the installed packages.

    Raises:
        ConfigError: a setting is missing or unused, or an import path is wrong.
        ModelError: a package is missing.
    """
    check_settings(config)
    check_packages(config)


def check_packages(config: SpinConfig) -> None:
    """Raises ModelError if a package that the recipe needs is not installed."""
    if config.train.lora:
        check_installed("train.lora", "lora")
        if config.train.lora.base != "bf16":
            check_installed(f"train.lora.base: {config.train.lora.base}")
    for section in (config.train, config.sft, config.reviser):
        if section is not None and section.optimizer.name == "adamw_8bit":
            check_installed("optimizer.name: adamw_8bit")


def check_settings(config: SpinConfig) -> None:
    """Raises ConfigError as ``check_algorithm`` does, without looking at installed packages."""
    problems = list(_problems(config, find_algorithm(config.algorithm)))
    if problems:
        raise ConfigError("; ".join(problems))
    backend = find_backend(config.train.backend, config.train.mesh if isinstance(config.train.mesh, Mesh) else None)
    if config.algorithm == "sdft" and not hasattr(backend, "read"):
        raise ConfigError(f"train.backend: {config.train.backend} has no method read, which algorithm sdft needs")
    for setting, grade in graders_of(config).items():
        find_grader(grade, setting)
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
    yield from _loss_problems(config, algorithm, loss)
    yield from algorithm.problems(config)


def _loss_problems(config: SpinConfig, algorithm: Algorithm, loss: Loss) -> Iterator[str]:
    given, default, name = config.objective, ObjectiveConfig(), config.algorithm
    if given.history_weight != default.history_weight and name in ALGORITHMS and name != "tspin":
        yield f"objective.history_weight: is for algorithm tspin, not for {name}; leave it out"
    if algorithm.own_loss:
        for field in ("loss", "mu", "positive_weight"):
            if getattr(given, field) != getattr(default, field):
                yield f"objective.{field}: {name} has a loss of its own; leave it out"
        return
    if given.mu != default.mu and not isinstance(loss, SpaceLoss):
        yield f"objective.mu: is for the loss space, not for {given.loss}; leave it out"
    if given.positive_weight and not isinstance(loss, MarginLoss):
        yield f"objective.positive_weight: the loss {given.loss} is no function of the margin; leave it out"


def _is_given(config: SpinConfig, name: str) -> bool:
    section, _, field = name.partition(".")
    value = getattr(config, section)
    return (getattr(value, field) if field else value) is not None
