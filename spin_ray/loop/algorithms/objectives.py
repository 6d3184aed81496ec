"""Fields of an objective that its loss cannot use."""

from collections.abc import Iterator

from spin_ray.config.sections import ObjectiveConfig
from spin_ray.learner.losses import Loss, MarginLoss, SpaceLoss
from spin_ray.learner.step import Objective


def unusable(given: ObjectiveConfig | Objective, loss: Loss, alpha: float = 1.0) -> Iterator[tuple[str, str]]:
    """Yields each field that the loss cannot use, with the reason.

    Args:
        given: a recipe's objective, or an algorithm's.
        loss: its loss.
        alpha: the recipe's ``reference_alpha``, if the algorithm reads it.
    """
    name = given.loss or "SFT"
    if given.mu != ObjectiveConfig().mu and not isinstance(loss, SpaceLoss):
        yield "mu", f"is for the loss space, not for {name}; leave it out"
    if given.positive_weight and not isinstance(loss, MarginLoss):
        yield "positive_weight", f"the loss {name} is no function of the margin; leave it out"
    if alpha < 1 and not loss.needs_reference:
        yield "reference_alpha", f"the loss {name} has no reference; leave it out"
    elif alpha < 1 and (given.positive_weight or isinstance(loss, SpaceLoss)):
        other = "objective.positive_weight" if given.positive_weight else "the loss space"
        yield (
            "reference_alpha",
            f"{other} takes the log-ratio of y alone, in which the normaliser of the geometric reference does not "
            "cancel; leave one out",
        )
    if given.length_normalised and isinstance(loss, SpaceLoss):
        yield "length_normalised", "the loss space takes log-ratios as they are; leave it out"
    elif given.length_normalised and alpha < 1:
        yield (
            "length_normalised",
            "the normaliser of the geometric reference does not cancel between means; leave it out, or reference_alpha",
        )
    for field in ("sft_weight", "length_normalised") if loss.per == "token" else ():
        if getattr(given, field):
            yield field, f"the loss {name} is one of tokens; leave it out"
    if isinstance(given, Objective):
        yield from _unusable_of_own(given, loss, name)


def _unusable_of_own(given: Objective, loss: Loss, name: str) -> Iterator[tuple[str, str]]:
    """Yields fields that no recipe gives together with ``loss``."""
    if given.history_weight and (loss.needs_reference or loss.needs_wins or loss.per == "token"):
        yield "history_weight", f"its term takes a loss of pairs without a reference, not {name}; leave it out"
    if given.top_k and given.loss is not None:
        yield "top_k", f"the teacher's divergence is minimised in place of the loss {name}; give loss=None"
