"""The algorithms by name, and the checks of a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager

from spin_ray.config.packages import check_installed
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh, ObjectiveConfig
from spin_ray.errors import ConfigError, first_line
from spin_ray.inputs.graders import find_grader, graders_of
from spin_ray.learner.backends import check_backend
from spin_ray.learner.import_path import import_object
from spin_ray.learner.losses import LOSSES, Loss, resolve_loss
from spin_ray.learner.optimizers import find_optimizer
from spin_ray.learner.step import Objective
from spin_ray.learner.trials import try_loss, try_optimizer
from spin_ray.loop.algorithms.base import Algorithm
from spin_ray.loop.algorithms.continued_sft import ContinuedSft
from spin_ray.loop.algorithms.declarations import check_declarations, problems_of
from spin_ray.loop.algorithms.dpo import Dpo
from spin_ray.loop.algorithms.objectives import unusable
from spin_ray.loop.algorithms.sdft import Sdft
from spin_ray.loop.algorithms.seft.algorithm import Seft
from spin_ray.loop.algorithms.self_reinforcement import SelfReinforcement
from spin_ray.loop.algorithms.spin import Spin
from spin_ray.loop.algorithms.sppo.algorithm import Sppo
from spin_ray.loop.algorithms.tspin import Tspin
from spin_ray.runtime.engine_names import check_engine
from spin_ray.runtime.gpu import check_builds, check_compiler, runs_elsewhere

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
    found = import_object(name, "algorithm", ALGORITHMS, on_workers=False)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError(f"algorithm: {name} is no subclass of spin_ray.loop.algorithms.base.Algorithm")
    try:
        return found()
    except Exception as error:  # the class's own code
        raise ConfigError(
            f"algorithm: {name} cannot be made without arguments ({type(error).__name__}: {first_line(error)})"
        ) from error


def check_algorithm(config: SpinConfig) -> None:
    """Checks the recipe's settings, its import paths and the installed packages.

    Raises:
        ConfigError: a setting is missing or unused, an import path is wrong, or a package is missing.
    """
    check_settings(config)
    check_packages(config)
    try_own_objects(config)


def try_own_objects(config: SpinConfig) -> None:
    """Tries the losses and optimizers that the recipe gives by import path on a few numbers.

    Raises:
        ConfigError: one fails, or does not what training needs.
    """
    algorithm = find_algorithm(config.algorithm)
    on_gpus, adapters = bool(config.train.resources.gpus), config.train.lora is not None
    evaluates = config.data.holds_out and config.objective.reference_alpha == 1
    tried: list[tuple[Objective, bool]] = []
    for iteration in range(config.iterations):
        objective = algorithm.objective(config, iteration)
        in_fp64 = evaluates and objective.is_of_log_ratios()
        if objective.loss is not None and objective.loss not in LOSSES and (objective, in_fp64) not in tried:
            tried.append((objective, in_fp64))
            with _named(config.algorithm, iteration):
                loss = objective.resolve()
                try_loss(loss, objective.loss, objective.beta, in_fp64=in_fp64, on_gpus=on_gpus)
    for section in config.trainings.values():
        try_optimizer(
            section.optimizer,
            matrices_only=adapters and section is config.train,
            on_gpus=on_gpus,
            backend=config.train.backend,
            workers=config.train.workers,
        )


def imported_by_workers(config: SpinConfig) -> list[tuple[str, str]]:
    """Returns setting and import path of each loss, optimizer and backend that train workers import."""
    algorithm = find_algorithm(config.algorithm)
    losses = [algorithm.objective(config, iteration).loss or "" for iteration in range(config.iterations)]
    named = [
        *(("objective.loss", loss) for loss in losses),
        ("train.backend", config.train.backend),
        *(("optimizer.name", section.optimizer.name) for section in config.trainings.values()),
    ]
    return [(setting, path) for setting, path in dict.fromkeys(named) if ":" in path]


def check_packages(config: SpinConfig) -> None:
    """Checks the packages that the recipe needs; on a cluster, not those of the workers alone.

    Raises:
        ConfigError: one is not installed.
    """
    if config.train.lora:
        check_installed("train.lora", "lora")
        if config.train.lora.is_quantised:
            check_installed(f"train.lora.base: {config.train.lora.base}", "quantised")
    for section in config.trainings.values():
        if section.optimizer.name == "adamw_8bit":
            check_installed("optimizer.name: adamw_8bit", "quantised")
    for tracker in ("mlflow", "wandb"):
        if getattr(config.tracking, tracker):
            check_installed(f"tracking.{tracker}", tracker)
    if runs_elsewhere(config):
        return
    if config.train.backend == "deepspeed":
        check_installed("train.backend: deepspeed", "deepspeed")
    if _starts_engines(config):
        check_installed("generation", "gpu" if config.generation.resources.gpus else "cpu")


def check_machine(config: SpinConfig) -> None:
    """Checks the builds, vLLM's arguments and the compilers of this machine, as far as the run stays on it.

    Raises:
        ConfigError: one is not what the recipe needs.
    """
    check_builds(config)
    if _starts_engines(config):
        check_engine(config)
    check_compiler(config)


def _starts_engines(config: SpinConfig) -> bool:
    """Returns True if a model answers prompts or held-out prompts."""
    return type(find_algorithm(config.algorithm)).plays is not Algorithm.plays or config.data.holds_out


def check_settings(config: SpinConfig) -> None:
    """Raises ConfigError as ``check_algorithm`` does, without looking at installed packages."""
    algorithm = find_algorithm(config.algorithm)
    check_declarations(algorithm, config.algorithm)
    problems = list(_problems(config, algorithm))
    if problems:
        raise ConfigError("; ".join(problems))
    mesh = config.train.mesh if isinstance(config.train.mesh, Mesh) else None
    check_backend(config.train.backend, mesh, algorithm.backend_methods)
    _check_objectives(config, algorithm)
    for setting, grade in graders_of(config).items():
        find_grader(grade, setting)
    for section in config.trainings.values():
        find_optimizer(section.optimizer)


def _check_objectives(config: SpinConfig, algorithm: Algorithm) -> None:
    """Raises ConfigError if an algorithm given by its path has no usable objective in an iteration."""
    name = config.algorithm
    for iteration in range(0 if name in ALGORITHMS else config.iterations):
        own = f"algorithm: {name}: its objective of iteration {iteration}"
        try:
            objective = algorithm.objective(config, iteration)
        except Exception as error:  # the algorithm's own code
            raise ConfigError(f"{own} fails ({type(error).__name__}: {first_line(error)})") from error
        if not isinstance(objective, Objective):
            raise ConfigError(f"{own} is a {type(objective).__name__}; expected a spin_ray.learner.step.Objective")
        with _named(name, iteration):
            loss = objective.resolve()
        is_mixed = config.mixes_references(iteration) and objective.loss is not None  # continued_sft keeps SPIN's α
        alpha = config.objective.reference_alpha if is_mixed else 1.0
        if wrong := next(_unserved(objective, loss, alpha, algorithm), None):
            raise ConfigError(f"{own} has {wrong}")


def _unserved(objective: Objective, loss: Loss, alpha: float, algorithm: Algorithm) -> Iterator[str]:
    """Yields what an algorithm's objective has but neither its rows nor its loss can use."""
    if loss.needs_wins and not algorithm.makes_wins:
        yield (
            f"the loss {objective.loss}, which needs win probabilities; commit iter_NNN/wins and set makes_wins, or "
            "take another"
        )
    if objective.top_k and not (algorithm.makes_teacher_rows and "read" in algorithm.backend_methods):
        yield (
            f"top_k {objective.top_k}, which needs rows for a teacher; commit iter_NNN/teacher_rows, set "
            "makes_teacher_rows and name read in backend_methods, or leave it out"
        )
    for field, reason in unusable(objective, loss, alpha):
        yield f"{field} {getattr(objective, field, alpha)}: {reason}"


@contextmanager
def _named(name: str, iteration: int) -> Iterator[None]:
    """Says in errors about a loss which iteration of an algorithm from outside has it."""
    try:
        yield
    except ConfigError as error:
        if name in ALGORITHMS:
            raise
        raise ConfigError(f"algorithm: {name}: its objective of iteration {iteration}: {error}") from error


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
        if _is_given(config, optional) and optional not in (*algorithm.needs, *algorithm.reads):
            yield f"{optional}: is for algorithm {' and '.join(names)}, not for {name}; leave it out"
    yield from _unread_fields(config, algorithm)
    if "loss" in algorithm.objective_fields:
        given, loss = config.objective, resolve_loss(config.objective.loss)
        if loss.needs_wins and not algorithm.makes_wins:
            yield f"objective.loss: {given.loss} needs win probabilities, which algorithm {name} does not make"
        for field, reason in unusable(given, loss, given.reference_alpha):
            yield f"objective.{field}: {reason}"
    yield from problems_of(algorithm, config)


def _unread_fields(config: SpinConfig, algorithm: Algorithm) -> Iterator[str]:
    given, default, name = config.objective, ObjectiveConfig(), config.algorithm
    for field in ObjectiveConfig.model_fields:
        value = getattr(given, field)
        if field in algorithm.objective_fields or value == getattr(default, field):
            continue
        if (field, value) == ("window", 1):
            continue  # what every algorithm but SPIN does
        readers = " and ".join(reader for reader, its in ALGORITHMS.items() if field in its.objective_fields)
        cure = "leave it out" if name in ALGORITHMS else f"leave it out, or name it in objective_fields of {name}"
        yield f"objective.{field}: is for algorithm {readers}, not for {name}; {cure}"


def _is_given(config: SpinConfig, name: str) -> bool:
    section, _, field = name.partition(".")
    value = getattr(config, section)
    return (getattr(value, field) if field and value is not None else value) is not None
