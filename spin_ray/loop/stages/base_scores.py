"""log p_0 of the pairs, for the geometric reference of α-SPIN.

Iteration 0 needs none, because its opponent is θ_0. Earlier scores are reused.
"""

from collections.abc import Iterable

import pyarrow as pa

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.learner.packing import response_names
from spin_ray.loop import scoring
from spin_ray.run_dir.artefact import digests
from spin_ray.run_dir.names import part_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, REFERENCE_SCHEMA
from spin_ray.run_dir.storage import ATTEMPTS

Scores = dict[str, float]
"""log p_0 in nats, by the name that ``names_of`` gives a response."""


def run(run_dir: RunDir, config: SpinConfig, iteration: int, base: ModelFolder) -> None:
    """Commits ``iter_NNN/base_scores`` of ``iteration`` ≥ 1.

    Raises:
        StageError: the workers failed too often.
    """
    pairs, target = run_dir.pairs(iteration), run_dir.base_scores(iteration)
    scores_of = [run_dir.reference(0), *(run_dir.base_scores(number) for number in range(1, iteration))]
    earlier = [(run_dir.pairs(number), scores) for number, scores in enumerate(scores_of) if scores.is_committed]
    inputs = {"pairs": pairs.manifest().digest, "base_model": base.digest}
    inputs |= digests(*(scores for _, scores in earlier))
    settings = {"precision": config.train.precision, "pack_length": config.train.pack_length}
    if target.already_made(inputs, settings):
        return
    with run_dir.stage(target.path) as counted:
        rows = pa.concat_tables(list(pairs.tables()))
        known: Scores = {}
        for rows_then, scores in earlier:
            known = known_scores(rows_then.tables(), scores.tables()) | known
        unknown = unknown_responses(rows, known)
        if unknown.num_rows:
            known |= _score(run_dir, config, base, unknown, target.path, digest([inputs, settings])[:16])
        columns = [rows["pair_id"], *([known[name] for name in names] for names in names_of(rows))]
        entry = target.replace_part(part_name(0), pa.table(columns, schema=REFERENCE_SCHEMA))
        counted |= {"rows": rows.num_rows, "responses_scored": unknown.num_rows}
        target.commit({part_name(0): entry}, inputs, settings, counts={"responses_scored": unknown.num_rows})


def names_of(pairs: pa.Table) -> tuple[list[str], list[str]]:
    """Returns the names of y and y′: y is equal in all rows of a prompt that have it, y′ is a pair's own."""
    real, generated = (
        list(response_names(pairs[key].to_pylist(), pairs["prompt_ids"], pairs[column]))
        for key, column in (("prompt_id", "real_ids"), ("pair_id", "generated_ids"))
    )
    return real, generated


def known_scores(pairs: Iterable[pa.Table], scores: Iterable[pa.Table]) -> Scores:
    """Returns the scores of committed pairs. Of a y in several pairs, the first one counts."""
    names = {}
    for table in pairs:
        names |= dict(zip(table["pair_id"].to_pylist(), zip(*names_of(table), strict=True), strict=True))
    known: Scores = {}
    for table in scores:
        for pair_id, *logps in zip(*(table[name].to_pylist() for name in REFERENCE_SCHEMA.names), strict=True):
            for name, logp in zip(names[pair_id], logps, strict=True):
                known.setdefault(name, logp)
    return known


def unknown_responses(pairs: pa.Table, known: Scores) -> pa.Table:
    """Returns each response without a score once, as a row without y′ and with the response's name as ``pair_id``."""
    found = {}
    for row, *names in zip(pairs.to_pylist(), *names_of(pairs), strict=True):
        for name, response in zip(names, (row["real_ids"], row["generated_ids"]), strict=True):
            if name not in known and name not in found:
                found[name] = row | {"pair_id": name, "prompt_id": name, "real_ids": response, "generated_ids": []}
    return pa.Table.from_pylist(list(found.values()), PAIR_SCHEMA)


def _score(
    run_dir: RunDir, config: SpinConfig, base: ModelFolder, rows: pa.Table, stage: str, made_from: str
) -> Scores:
    """Scores PAIR_SCHEMA rows without y′; returns log p of ``real_ids`` by pair_id."""
    folder = f"{ATTEMPTS}/{stage}-{made_from}"
    scratch = run_dir.artefact(f"{folder}/scores")
    inputs = {"base_model": base.digest}
    scores, _ = scoring.score(run_dir, config, scratch, ((base, rows),), inputs, stage=stage, by_token=False)
    run_dir.storage.delete(folder)
    return dict(zip(scores["pair_id"].to_pylist(), scores["real_logp"].to_pylist(), strict=True))
