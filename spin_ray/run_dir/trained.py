"""Settings that finished trainings took, by the folder of the model: ``{"iter_000": {"objective.beta": 0.5}}``.

The recipe in run.json may change between two calls, but nothing that is finished changes with it.
"""

from collections.abc import Mapping
from typing import Any

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError
from spin_ray.run_dir.names import is_iterate_name, iterate_name, iterate_number

_BETA = "objective.beta"
_LISTS = {
    _BETA: "beta", "train.learning_rate": "learning_rate", "train.epochs": "epochs",
    "train.schedule_epochs": "schedule_epochs",
}  # fmt: skip
"""Names in a manifest of the settings that may have a value for each iteration."""
_OPTIMIZER = ("betas", "eps")
"""Settings of an optimizer that may change between two calls. They have one value for all iterations."""
Trained = Mapping[str, Mapping[str, Any]]


def trained_with(folder: str, settings: Mapping[str, Any], beta: float | None) -> dict[str, Any]:
    """Returns the settings of the recipe that made the model in ``folder``, from those of its manifest.

    Args:
        folder: ``iter_000``, or ``sft`` or ``reviser``, which take an optimizer alone.
        beta: β of the iteration; None if it is unknown.
    """
    found: dict[str, Any] = {}
    if is_iterate_name(folder) and folder != "sft":
        found = {key: settings[name] for key, name in _LISTS.items() if key != _BETA}
        found |= {} if beta is None else {_BETA: beta}
    return found | {f"{_section_of(folder)}.optimizer.{name}": settings["optimizer"][name] for name in _OPTIMIZER}


def refuse_other_values(root: object, trained: Trained, config: SpinConfig) -> None:
    """Refuses a recipe that gives finished iterations other values, or that ends before them.

    Raises:
        RunDirError: names the values then and now, and a list that leaves the finished iterations theirs.
    """
    done = max((iterate_number(folder) for folder in trained if is_iterate_name(folder)), default=0)
    if config.iterations < done:
        raise RunDirError(
            f"{root}: iterations (now {config.iterations}) is less than the {done} that are finished; give {done} or "
            f"more, choose another --out, or remove the folders after {iterate_name(config.iterations)}"
        )
    differing: dict[str, dict[tuple[str, str], list[str]]] = {}
    for folder, then in trained.items():
        for key, now in _values(config, folder).items():
            if key in then and then[key] != now:
                differing.setdefault(key, {}).setdefault((repr(then[key]), repr(now)), []).append(folder)
    if not differing:
        return
    told = "; ".join(
        f"{key} (was {was} for {', '.join(folders)}, now {now})"
        for key, changes in differing.items()
        for (was, now), folders in changes.items()
    )
    lists = _lists_for(trained, config, done, [key for key in differing if key in _LISTS])
    cure = f", give later iterations their own values ({lists})" if lists else ""
    raise RunDirError(
        f"{root}: what is finished was made with other values: {told}; restore them{cure}, or choose another --out"
    )


def _values(config: SpinConfig, folder: str) -> dict[str, Any]:
    """Returns the recipe's values of the settings that ``trained_with`` returns."""
    section = _section_of(folder)
    found = {}
    if section == "train":
        at = config.at(iterate_number(folder) - 1)
        found = {key: getattr(at, name) for key, name in _LISTS.items()}
    if own := getattr(config, section):
        optimizer = own.optimizer.model_dump(mode="json")
        found |= {f"{section}.optimizer.{name}": optimizer[name] for name in _OPTIMIZER}
    return found


def _section_of(folder: str) -> str:
    return folder if folder in ("sft", "reviser") else "train"


def _value(trained: Trained, config: SpinConfig, key: str, iteration: int) -> Any:
    """Returns the value that ``iteration`` took, or else will take by the recipe."""
    then = trained.get(iterate_name(iteration + 1), {})
    if key in then:
        return then[key]
    return getattr(config.at(min(iteration, config.iterations - 1)), _LISTS[key])


def _lists_for(trained: Trained, config: SpinConfig, done: int, keys: list[str]) -> str:
    """Writes lists with the values of finished iterations, then the recipe's; empty if one had none."""
    iterations = max(config.iterations, done + 1)
    values = {key: [_value(trained, config, key, number) for number in range(iterations)] for key in keys}
    lists = [f"{key}: {each!r}" for key, each in values.items() if None not in each]
    return ", ".join([f"iterations: {iterations}"] * (bool(lists) and iterations > config.iterations) + lists)
