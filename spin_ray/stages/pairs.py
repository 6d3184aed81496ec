"""Stage 3: join x, y and y'; add the pairs of earlier iterations in the window; drop what teaches nothing.

generations of t + prompts -> pairs of t
pairs of t-1 whose opponent is still in the window -> copied
"""

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.config import SpinConfig
from spin_ray.errors import DataError, HealthError
from spin_ray.run_dir import Artefact, FileEntry, RunDir, part_name
from spin_ray.types import PAIR_SCHEMA


def run(run_dir: RunDir, config: SpinConfig, iteration: int) -> None:
    """Makes ``iter_NNN/pairs``.

    Raises:
        DataError: too few pairs are left; the opponent says what the data says, and more SPIN would only harm it.
        HealthError: the opponent answers at quite another length than the first one did.
    """
    target, generations = run_dir.pairs(iteration), run_dir.generations(iteration)
    earlier = run_dir.pairs(iteration - 1) if iteration and config.objective.window > 1 else None
    inputs = {"prompts": run_dir.prompts.manifest().digest, "generations": generations.manifest().digest}
    if earlier:
        inputs["earlier_pairs"] = earlier.manifest().digest
    settings = {"window": config.objective.window, "part_rows": config.generation.shard_rows}
    if target.is_current(inputs, settings):
        return
    with run_dir.stage(target.path) as counted:
        _check_lengths(generations, run_dir.generations(0), config.health.max_length_change)
        oldest = iteration - config.objective.window + 1
        entries, counts = build(run_dir.prompts, generations, earlier, target, iteration, oldest)
        counted |= counts
        if counts["rows"] < config.train.global_batch_pairs:
            raise DataError(
                f"{run_dir.storage.path(target.path)}: {counts['rows']} pairs are left after dropping "
                f"{counts['dropped_identical']} with y = y′, fewer than train.global_batch_pairs "
                f"{config.train.global_batch_pairs}: nothing is left to learn from this opponent; "
                "stop here, add prompts, or lower the batch"
            )
        target.commit(entries, inputs, settings, counts={name: float(count) for name, count in counts.items()})


def build(
    prompts: Artefact, generations: Artefact, earlier: Artefact | None, target: Artefact, iteration: int, oldest: int
) -> tuple[dict[str, FileEntry], dict[str, int]]:
    """Writes the parts; one part of each input in memory at a time."""
    counts: Counter[str] = Counter({"dropped_identical": 0, "dropped_empty": 0, "from_earlier": 0, "rows": 0})
    entries: dict[str, FileEntry] = {}
    target.discard_parts()

    def write(table: pa.Table) -> None:
        if table.num_rows:
            name = part_name(len(entries))
            entries[name] = target.write_part(name, table)
            counts["rows"] += table.num_rows

    for joined in _joined(prompts, generations, iteration):
        kept = [
            _verdict(real, generated)
            for real, generated in zip(joined["real_ids"], joined["generated_ids"], strict=True)
        ]
        counts.update(verdict for verdict in kept if verdict)
        write(joined.filter(pa.array([not verdict for verdict in kept], pa.bool_())))
    for table in earlier.tables() if earlier else ():
        still = table.filter(pc.greater_equal(table["iteration"], oldest))
        counts["from_earlier"] += still.num_rows
        write(still)
    return entries, dict(counts)


def _check_lengths(now: Artefact, first: Artefact, limit: float | None) -> None:
    length, before = _mean_length(now), _mean_length(first)
    if limit is not None and not before / limit <= length <= before * limit:
        raise HealthError(
            f"{now.path}: responses have {length:.1f} tokens on average, those of the first opponent had "
            f"{before:.1f}: a change by more than health.max_length_change {limit:g}; the model is being destroyed: "
            "stop here, or redo the iteration before with a lower learning rate"
        )


def _mean_length(generations: Artefact) -> float:
    tokens = sum(pc.sum(pc.list_value_length(table["token_ids"])).as_py() or 0 for table in generations.tables())
    return tokens / max(generations.manifest().rows, 1)


def _verdict(real: pa.ListScalar, generated: pa.ListScalar) -> str:
    """Why a pair is dropped; empty if it is kept."""
    if len(generated.values) == 0:
        return "dropped_empty"
    return "dropped_identical" if real.values.equals(generated.values) else ""


def _joined(prompts: Artefact, generations: Artefact, iteration: int) -> Iterator[pa.Table]:
    """Pairs of each generation shard. Shards keep the order of ``prompts``: both are read once, side by side."""
    upcoming = prompts.tables()
    window = PAIR_SCHEMA.empty_table().select(["prompt_id", "prompt_ids", "real_ids"])
    for answers in generations.tables():
        found = pc.index_in(answers["prompt_id"], value_set=window["prompt_id"])
        while found.null_count:
            following = next(upcoming, None)
            if following is None:
                missing = answers["prompt_id"].filter(pc.is_null(found))[0].as_py()
                raise DataError(
                    f"{generations.path}: prompt {missing} is not in {prompts.path}; "
                    f"remove {generations.path} to redo it"
                )
            window = pa.concat_tables([window, following.select(window.column_names)])
            found = pc.index_in(answers["prompt_id"], value_set=window["prompt_id"])
        rows = window.take(found)
        samples = answers["sample"].to_pylist()
        pair_ids = [
            f"{prompt}/{iteration:03d}/{sample}"
            for prompt, sample in zip(answers["prompt_id"].to_pylist(), samples, strict=True)
        ]
        yield pa.table(
            [
                pair_ids, answers["prompt_id"], pa.array([iteration] * len(pair_ids), pa.int32()),
                rows["prompt_ids"], rows["real_ids"], answers["token_ids"],
            ],
            schema=PAIR_SCHEMA,
        )  # fmt: skip
        window = window.slice(pc.max(found).as_py())  # the next shard starts here or later
