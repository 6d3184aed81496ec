"""log p_0 of the pairs, for the geometric reference of α-SPIN.

Iteration 0 needs none, because its opponent is θ_0. Earlier scores are reused.
"""

import pyarrow as pa

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.loop import scoring
from spin_ray.run_dir.artefact import digests
from spin_ray.run_dir.names import part_name, prompt_of
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, REFERENCE_SCHEMA
from spin_ray.run_dir.storage import ATTEMPTS

Scores = dict[str, float]
"""log p_0 in nats, of y by prompt id and of y′ by pair id."""


def run(run_dir: RunDir, config: SpinConfig, iteration: int, base: ModelFolder) -> None:
    """Commits ``iter_NNN/base_scores`` of ``iteration`` ≥ 1.

    Raises:
        StageError: the workers failed too often.
    """
    pairs, target = run_dir.pairs(iteration), run_dir.base_scores(iteration)
    earlier = [run_dir.reference(0), *(run_dir.base_scores(number) for number in range(1, iteration))]
    inputs = {"pairs": pairs.manifest().digest, "base_model": base.digest}
    inputs |= digests(*earlier)
    settings = {"precision": config.train.precision, "pack_length": config.train.pack_length}
    if target.already_made(inputs, settings):
        return
    with run_dir.stage(target.path) as counted:
        rows = pa.concat_tables(list(pairs.tables()))
        known = known_scores(pa.concat_tables([table for artefact in earlier for table in artefact.tables()]))
        unknown = unknown_responses(rows, known)
        if unknown.num_rows:
            known |= _score(run_dir, config, base, unknown, f"{target.path}-{digest([inputs, settings])[:16]}")
        columns = [
            rows["pair_id"],
            *([known[key] for key in rows[name].to_pylist()] for name in ("prompt_id", "pair_id")),
        ]
        entry = target.replace_part(part_name(0), pa.table(columns, schema=REFERENCE_SCHEMA))
        counted |= {"rows": rows.num_rows, "responses_scored": unknown.num_rows}
        target.commit({part_name(0): entry}, inputs, settings, counts={"responses_scored": unknown.num_rows})


def known_scores(scores: pa.Table) -> Scores:
    known: Scores = {}
    for pair_id, real, generated in zip(*(scores[name].to_pylist() for name in REFERENCE_SCHEMA.names), strict=True):
        known[pair_id] = generated
        known.setdefault(prompt_of(pair_id), real)
    return known


def unknown_responses(pairs: pa.Table, known: Scores) -> pa.Table:
    """Returns each response without a score once, as a row without y′."""
    found = {}
    for row in pairs.to_pylist():
        for key, response in ((row["prompt_id"], row["real_ids"]), (row["pair_id"], row["generated_ids"])):
            if key not in known and key not in found:
                # A prompt id of its own, as equal prompt ids share one y in a pack.
                found[key] = row | {"pair_id": key, "prompt_id": key, "real_ids": response, "generated_ids": []}
    return pa.Table.from_pylist(list(found.values()), PAIR_SCHEMA)


def _score(run_dir: RunDir, config: SpinConfig, base: ModelFolder, rows: pa.Table, name: str) -> Scores:
    """Scores PAIR_SCHEMA rows without y′; returns log p of ``real_ids`` by pair_id."""
    scratch = run_dir.artefact(f"{ATTEMPTS}/{name}/scores")
    inputs = {"base_model": base.digest}
    scores, _ = scoring.score(run_dir, config, scratch, ((base, rows),), inputs, by_token=False)
    run_dir.storage.delete(f"{ATTEMPTS}/{name}")
    return dict(zip(scores["pair_id"].to_pylist(), scores["real_logp"].to_pylist(), strict=True))
