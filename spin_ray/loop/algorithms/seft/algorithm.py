"""SEFT (Chen et al. 2024, arXiv 2406.10813)."""

from collections import Counter
from dataclasses import replace

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.model_folder import ModelFolder, open_artefact
from spin_ray.inputs.rendering import ChatRenderer, open_renderer
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import Algorithm, Turn, refuse_no_room, shortest_rows
from spin_ray.loop.algorithms.seft import revision
from spin_ray.loop.stages import pairs
from spin_ray.loop.stages.generation.shards import Job
from spin_ray.run_dir.artefact import Artefact, digests
from spin_ray.run_dir.names import iteration_name
from spin_ray.run_dir.run_dir import RunDir


class Seft(Algorithm):
    """Fine-tuning of θ_t on its own answers, kept or revised by a reviser that is trained once, from θ_0."""

    needs = ("reviser",)
    reads = ("data.questions",)
    objective_fields = ("beta",)

    def check_rows(self, run: RunDir, config: SpinConfig) -> None:
        """Raises DataError if no reviser's prompt of short rows, even with an empty answer, leaves room."""
        renderer = open_renderer(run.description()["start_model"], config.model, run.date())
        lengths = revision.shortest_prompts(renderer, shortest_rows(self.plays(run))["messages"].to_pylist())
        refuse_no_room(lengths, config, "algorithm seft", config.generation.sampling.max_tokens)

    def plays(self, run: RunDir) -> Artefact:
        return run.questions if run.questions.is_committed else run.prompts

    def make_pairs(self, turn: Turn) -> None:
        run, config, iteration = turn.run, turn.config, turn.iteration
        renderer = open_renderer(str(turn.start.model.path), config.model, run.date())
        reviser = _reviser(turn, renderer)
        prompts, answers = self.plays(run), run.generations(iteration)
        asked = run.artefact(f"{iteration_name(iteration)}/revision_prompts")
        revisions = run.artefact(f"{iteration_name(iteration)}/revisions")
        revision.revision_prompts(run, config, renderer, prompts, answers, asked)
        turn.play(reviser, [Job(asked, revisions, reviser, samples=1)])
        longest, dropped = config.model.max_length, Counter[str]()
        rows = revision.revised_rows(renderer, asked, revisions, iteration, longest, dropped)
        inputs = digests(asked, revisions)
        settings = {"max_length": longest}
        fresh = pairs.Fresh(rows, inputs, settings, paired=False, dropped=dropped, dropped_before=asked)
        pairs.make(run, config, iteration, fresh)

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        return Objective(loss=None)


def _reviser(turn: Turn, renderer: ChatRenderer) -> ModelFolder:
    """Returns the reviser under a name of this iteration, so that what it samples does not repeat an earlier one."""
    run, config, initial = turn.run, turn.config, turn.initial
    assert config.reviser is not None
    target = run.artefact("reviser/model")
    if turn.iteration == 0:
        from spin_ray.loop.stages.training import stage as training

        answers, rows = run.artefact("reviser/answers"), run.artefact("reviser/rows")
        turn.play(
            initial, [Job(run.prompts, answers, replace(initial, name="reviser/sft"))]
        )  # iteration 0 asks the same
        revision.training_rows(run, config, renderer, answers, rows)
        training.fine_tune(run, config, config.reviser, initial, rows, target)
    return open_artefact(target, f"{iteration_name(turn.iteration)}/reviser", initial)
