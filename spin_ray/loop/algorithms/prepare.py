"""All that an iteration's training reads: what the algorithm commits, and θ_0's scores."""

from collections.abc import Iterator

from spin_ray.errors import ConfigError, NotCommittedError
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import Algorithm, Turn
from spin_ray.loop.stages import base_scores


def prepare_training(turn: Turn, algorithm: Algorithm) -> Objective:
    """Commits what training reads, and returns the objective.

    Raises:
        ConfigError: an algorithm given by its path has not committed what its objective needs.
    """
    config, iteration = turn.config, turn.iteration
    try:
        algorithm.make_pairs(turn)
    except NotCommittedError as error:
        if ":" not in config.algorithm:
            raise
        raise ConfigError(f"algorithm: {config.algorithm}: its make_pairs {_reads(turn, algorithm, error)}") from error
    objective = algorithm.objective(config, iteration)
    if lacking := next(_lacking(turn, objective), None):
        raise ConfigError(f"algorithm: {config.algorithm}: its make_pairs {lacking}")
    if objective.resolve().needs_reference and config.mixes_references(iteration):
        base_scores.run(turn.run, config, iteration, turn.initial)
    return objective


def _reads(turn: Turn, algorithm: Algorithm, error: NotCommittedError) -> str:
    if error.path == turn.run.generations(turn.iteration).path and algorithm.plays(turn.run) is None:
        return f"reads {error.path}, but nobody answers: let plays return the prompts, e.g. run.prompts"
    return f"reads {error.path}, which is not committed"


def _lacking(turn: Turn, objective: Objective) -> Iterator[str]:
    run, iteration = turn.run, turn.iteration
    pairs, wins, teacher_rows = run.pairs(iteration), run.wins(iteration), run.teacher_rows(iteration)
    if not pairs.is_committed:
        yield f"has not committed {pairs.path}; call stages.pairs.make"
    if objective.resolve().needs_wins and not wins.is_committed:
        yield f"has not committed {wins.path}, which the loss {objective.loss} needs"
    if objective.top_k and not teacher_rows.is_committed:
        yield f"has not committed {teacher_rows.path}, which top_k needs"
    if objective.history_weight and "initial_ids" not in next(pairs.tables()).column_names:
        yield f"commits {pairs.path} without y_0 (initial_ids), which history_weight needs"
