"""SPIN (Chen et al. 2024, arXiv 2401.01335), α-SPIN and fictitious play."""

from spin_ray.config.recipe import SpinConfig
from spin_ray.loop.algorithms.base import SPIN_FIELDS, Algorithm, Turn
from spin_ray.loop.stages import pairs
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.run_dir import RunDir


class Spin(Algorithm):
    """The human response against a response of θ_t, equation 4.7.

    ``objective.window: all`` is fictitious play; ``objective.reference_alpha`` below 1 is α-SPIN.
    """

    objective_fields = SPIN_FIELDS
    costs_are_known = True

    def plays(self, run: RunDir) -> Artefact:
        return run.prompts

    def opponents(self, config: SpinConfig, iteration: int) -> int:
        return config.objective.opponents(iteration)

    def make_pairs(self, turn: Turn) -> None:
        pairs.run(turn.run, turn.config, turn.iteration)
