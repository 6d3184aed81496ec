"""Pairs of x, y and y′, from this iteration and from earlier ones in the window."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import DataError, HealthError
from spin_ray.run_dir.artefact import Artefact, FileEntry
from spin_ray.run_dir.names import pair_id, part_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, pairs_of


def run(run_dir: RunDir, config: SpinConfig, iteration: int) -> None:
    """Commits SPIN's ``iter_NNN/pairs``, y against y′ of each opponent in the window.

    Raises:
        DataError, HealthError: as ``make`` does.
    """
    generations = run_dir.generations(iteration)
    oldest = config.objective.oldest_iteration(iteration)
    earlier = run_dir.pairs(iteration - 1) if iteration and oldest < iteration else None
    inputs = {"prompts": run_dir.prompts.manifest().digest, "generations": generations.manifest().digest}
    if earlier:
        inputs["earlier_pairs"] = earlier.manifest().digest
    settings: dict[str, Any] = {"window": config.objective.window, "part_rows": config.generation.shard_rows}
    played = joined(run_dir.prompts, generations, iteration)
    make(run_dir, config, iteration, Fresh(played, inputs, settings), earlier, oldest)


@dataclass(frozen=True)
class Fresh:
    """This iteration's pairs, with the digests of their sources."""

    tables: Iterator[pa.Table]
    """PAIR_SCHEMA rows, read only if needed."""
    inputs: dict[str, str]
    settings: dict[str, Any]
    paired: bool = True
    """False for SFT rows, which have no y′."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of rows left out, by reason; complete after ``tables`` is read."""
    dropped_before: Artefact | None = None
    """Artefact that the rows come from and whose manifest counts those left out before."""


def make(
    run_dir: RunDir, config: SpinConfig, iteration: int, fresh: Fresh, earlier: Artefact | None = None, oldest: int = 0
) -> None:
    """Commits ``iter_NNN/pairs``: fresh pairs, and ``earlier`` ones since iteration ``oldest``.

    Raises:
        DataError: fewer rows are left than one step has, or two have the same ``pair_id``.
        HealthError: the mean response length changed too much.
    """
    target, settings = run_dir.pairs(iteration), fresh.settings
    keep_identical = fresh.paired and config.objective.keep_identical
    if keep_identical:
        settings = settings | {"keep_identical": True}
    if target.already_made(fresh.inputs, settings):
        return
    with run_dir.stage(target.path) as counted:
        played = run_dir.generations(iteration)
        if played.is_committed:
            _check_lengths(played, run_dir.generations(0), config.health.max_length_change)
        entries, counts = build(fresh, earlier, target, oldest, keep_identical, algorithm=config.algorithm)
        counted |= counts
        if counts["rows"] < config.train.global_batch_pairs:
            raise DataError(
                f"{run_dir.storage.where(target.path)}: {counts['rows']} pairs are left"
                f"{_after_dropping(fresh, counts)}, fewer than train.global_batch_pairs "
                f"{config.train.global_batch_pairs}; stop here, add prompts, or lower the batch"
            )
        counted_as = {name: float(count) for name, count in counts.items()}
        target.commit(entries, fresh.inputs, settings, counts=counted_as)


def _after_dropping(fresh: Fresh, counts: Mapping[str, int]) -> str:
    """Returns e.g. `` after dropping 9 with y = y′, 2 too_long``, the commonest reason first."""
    before = fresh.dropped_before.manifest().counts if fresh.dropped_before else {}
    found = Counter({name: int(count) for name, count in before.items()}) + Counter(counts)
    reasons = [(name, count) for name, count in found.most_common() if name.startswith("dropped_")]
    said = [f"{count} {_REASONS.get(name, name.removeprefix('dropped_'))}" for name, count in reasons]
    return f" after dropping {', '.join(said)}" if said else ""


_REASONS = {"dropped_identical": "with y = y′"}


def build(
    fresh: Fresh,
    earlier: Artefact | None,
    target: Artefact,
    oldest: int,
    keep_identical: bool = False,
    *,
    algorithm: str,
) -> tuple[dict[str, FileEntry], dict[str, int]]:
    """Writes the parts and returns entries and counts. One part of each input and the names of all pairs are in memory.

    Raises:
        DataError: two rows have the same ``pair_id``, by which scores are matched with pairs.
    """
    found = set[str]()
    counts: Counter[str] = Counter({"dropped_identical": 0, "dropped_empty": 0, "from_earlier": 0, "rows": 0})
    entries: dict[str, FileEntry] = {}
    target.discard_parts()

    def write(table: pa.Table) -> None:
        for each in table["pair_id"].to_pylist():
            if each in found:
                raise DataError(
                    f"{target.storage.where(target.path)}: algorithm {algorithm} makes two pairs with the pair_id "
                    f"{each}, by which their scores are found; number the pairs of a prompt (pair_table's sample)"
                )
            found.add(each)
        if table.num_rows:
            name = part_name(len(entries))
            entries[name] = target.write_part(name, table)
            counts["rows"] += table.num_rows

    for table in fresh.tables:
        if not fresh.paired:
            write(table)
            continue
        verdicts = _verdicts(table, keep_identical)
        counts.update(verdict for verdict in verdicts if verdict)
        write(table.filter(pa.array([not verdict for verdict in verdicts], pa.bool_())))
    counts.update({f"dropped_{reason}": count for reason, count in fresh.dropped.items()})
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


def _verdicts(table: pa.Table, keep_identical: bool) -> list[str]:
    """Returns for each row why it is dropped, or nothing. T-SPIN learns from y = y′ if y_0 differs."""
    names = [name for name in ("real_ids", "generated_ids", "initial_ids") if name in table.column_names]

    def verdict(real: pa.ListScalar, *others: pa.ListScalar) -> str:
        if len(others[0].values) == 0:
            return "dropped_empty"
        identical = all(real.values.equals(other.values) for other in others)
        return "dropped_identical" if identical and not keep_identical else ""

    return [verdict(*row) for row in zip(*(table[name] for name in names), strict=True)]


def joined(prompts: Artefact, generations: Artefact, iteration: int) -> Iterator[pa.Table]:
    """Yields the pairs of each generation shard.

    Both artefacts are read once, as shards keep the order of ``prompts``.

    Raises:
        DataError: a prompt is not in ``prompts``.
    """
    columns = ["prompt_id", "prompt_ids", "real_ids"]
    upcoming = (table.select(columns) for table in prompts.tables())
    rest = PAIR_SCHEMA.empty_table().select(columns)
    for answers in generations.tables():
        played = answers["prompt_id"].unique()
        found, left = [], len(played)
        while True:
            found.append(rest.filter(pc.is_in(rest["prompt_id"], value_set=played)))
            left -= found[-1].num_rows
            if not left:
                break
            rest = next(upcoming, None)
            if rest is None:
                missing = set(played.to_pylist()).difference(*(table["prompt_id"].to_pylist() for table in found))
                raise DataError(
                    f"{generations.path}: prompt {min(missing)} is not in {prompts.path}; "
                    f"remove {generations.path} to redo it"
                )
        rows = pa.concat_tables(found)
        rows = rows.take(pc.index_in(answers["prompt_id"], value_set=rows["prompt_id"]))
        samples = answers["sample"].to_pylist()
        ids = [
            pair_id(prompt, iteration, sample)
            for prompt, sample in zip(answers["prompt_id"].to_pylist(), samples, strict=True)
        ]
        yield pairs_of(ids, iteration, answers["prompt_id"], rows["prompt_ids"], rows["real_ids"], answers["token_ids"])
