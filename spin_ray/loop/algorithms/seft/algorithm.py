"""SEFT (Chen et al. 2024, arXiv 2406.10813): fine-tuning on the policy's own answers after a revision."""

from collections import Counter
from typing import Any

from spin_ray.config.sections import SpinConfig
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import Turn
from spin_ray.loop.algorithms.seft import revision
from spin_ray.loop.stages import pairs
from spin_ray.loop.stages.generation.shards import Job
from spin_ray.loop.stages.training import stage as training
from spin_ray.run_dir.run_dir import Artefact, RunDir, folder_digest, iteration_name


class Seft:
    """The reviser is fine-tuned once, from θ_0; then in each iteration θ_t answers the questions (the prompts, where
    there are none), the reviser keeps or revises, and θ_t is fine-tuned on the result.
    """

    def plays(self, run: RunDir) -> Artefact:
        return run.questions if run.questions.is_committed else run.prompts

    def make_pairs(self, turn: Turn) -> None:
        run, config, iteration = turn.run, turn.config, turn.iteration
        tokenizer = load_tokenizer(
            str(turn.start.model.path), config.model.chat_template, config.model.trust_remote_code
        )
        renderer = ChatRenderer(tokenizer)
        reviser = _reviser(turn, renderer, tokenizer)
        prompts, answers = self.plays(run), run.generations(iteration)
        asked = run.artefact(f"{iteration_name(iteration)}/revision_prompts")
        revisions = run.artefact(f"{iteration_name(iteration)}/revisions")
        revision.revision_prompts(run, config, renderer, tokenizer, prompts, answers, asked)
        turn.play(reviser, [Job(asked, revisions, reviser.name, reviser.digest)])
        longest, dropped = config.model.max_length, Counter[str]()
        rows = revision.revised_rows(renderer, tokenizer, asked, revisions, iteration, longest, dropped)
        inputs = {artefact.path: artefact.manifest().digest for artefact in (asked, revisions)}
        fresh = pairs.Fresh(rows, inputs, {"max_length": longest}, paired=False, dropped=dropped)
        pairs.make(run, config, iteration, fresh)

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        return Objective(loss=None)


def _reviser(turn: Turn, renderer: ChatRenderer, tokenizer: Any) -> ModelFolder:
    """Its folder; made in iteration 0, when θ_0 is at hand, and only opened later."""
    run, config, first = turn.run, turn.config, turn.first
    assert config.reviser is not None
    target = run.artefact("reviser/model")
    if turn.iteration == 0:
        answers, rows = run.artefact("reviser/answers"), run.artefact("reviser/rows")
        turn.play(first, [Job(run.prompts, answers, first.name, first.digest)])
        revision.training_rows(run, config, renderer, tokenizer, answers, rows)
        training.fine_tune(run, config, config.reviser, first, rows, target)
    files = target.verify().files
    return ModelFolder(target.local_folder(), folder_digest(files), "reviser", first.pad_id, source=target)
