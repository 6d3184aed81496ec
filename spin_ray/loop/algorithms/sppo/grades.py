"""Win probabilities of SPPO from a grader, in place of a preference model."""

from collections import defaultdict

import numpy as np
import pyarrow as pa

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import tokenizer_of
from spin_ray.loop.algorithms.sppo.preferences import PREFERENCE_SCHEMA
from spin_ray.report.grading import answers_of, grade_all
from spin_ray.run_dir.run_dir import RunDir


def run(run_dir: RunDir, config: SpinConfig, iteration: int, policy: ModelFolder) -> None:
    """Commits ``iter_NNN/preferences``.

    Raises:
        DataError: the grader fails on a row.
    """
    assert config.scorer is not None
    generations, target = run_dir.generations(iteration), run_dir.preferences(iteration)
    inputs = {"generations": generations.manifest().digest}
    settings = {"kind": "grade", "grade": config.scorer.path}
    if target.already_made(inputs, settings):
        return
    with run_dir.stage(target.path) as counted:
        tokenizer = tokenizer_of(policy.whole.path, config.model)
        answers, entries = answers_of(run_dir.prompts), {}
        target.discard_parts()
        for name, entry in sorted(generations.manifest().files.items()):
            played = generations.read_part(name, entry)
            texts = tokenizer.batch_decode(played["token_ids"].to_pylist(), skip_special_tokens=True)
            entries[name] = target.write_part(name, win_table(played, texts, answers, config.scorer.path, config))
        counted |= {"rows": sum(entry.rows or 0 for entry in entries.values())}
        target.commit(entries, inputs, settings)


def win_table(played: pa.Table, texts: list[str], answers: dict[str, str], grade: str, config: SpinConfig) -> pa.Table:
    """Returns PREFERENCE_SCHEMA rows in the order of ``played``.

    A sample of grade r wins with the mean of (1 + r − r′) / 2 over its prompt's samples. If the prompt has no
    answer or a sample has no grade, all its samples have 1/2 and make no pair.
    """
    prompt_ids = played["prompt_id"].to_pylist()
    rows = [row for row, prompt_id in enumerate(prompt_ids) if prompt_id in answers]
    asked = [(texts[row], answers[prompt_ids[row]], prompt_ids[row]) for row in rows]
    found = grade_all(grade, asked, config, "scorer.path")
    groups: dict[str, list[tuple[int, float | None]]] = defaultdict(list)
    for row, each in zip(rows, found, strict=True):
        groups[prompt_ids[row]].append((row, each))
    wins = np.full(len(texts), 0.5, np.float32)
    for group in groups.values():
        grades = [each for _, each in group if each is not None]
        if len(grades) == len(group):
            for (row, _), each in zip(group, grades, strict=True):
                wins[row] = (1 + each - np.mean(grades)) / 2
    return pa.table([played["prompt_id"], played["sample"], pa.array(wins)], schema=PREFERENCE_SCHEMA)
