"""Step 7: a 7B model with adapters on one card, with gradient checkpointing."""

from collections.abc import Iterator

from gpu_steps.child import Context, Item
from gpu_steps.clock import peak_gb, seconds_of
from gpu_steps.learner import BEST, Learner, as_variant, group_of, one_rank
from gpu_steps.rows import Measure
from gpu_steps.sizes import CHAT, model_folder, pairs_of, sizes_of


def adapters(context: Context) -> Iterator[Measure]:
    with one_rank(group_of(context)), as_variant(BEST):
        rows = pairs_of(context, CHAT, count=sizes_of(context).pairs // 2, model="7B")
        learner = Learner(
            context, model_folder(context, "7B"), rows, per_step=len(rows), variant=BEST, lora=True, checkpointing=True
        )
        learner.score()
        spent = seconds_of(context, learner.step, warm_up=1, times=1)
        yield Measure(id=f"7B with adapters, {CHAT}", value=len(rows) / spent, unit="pairs/s")
        yield Measure(id=f"7B with adapters, {CHAT}: peak memory", value=peak_gb(context), unit="GB", target="<= 78")


ITEMS: dict[str, Item] = {"adapters": adapters}
