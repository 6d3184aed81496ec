"""The quality experiment's bookkeeping: recipes differ only in the arm, compute is matched, intervals are paired."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "quality"))

import analyse
from arms import ARMS, SEARCH, SETTINGS, SFT, WARM_UP, recipe_of, split_files

from spin_ray.config import SpinConfig, flatten

DATA = {role: f"{role}.jsonl" for role in ("train", "heldout", "seed", "questions")}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.name)
@pytest.mark.parametrize("arm", [*ARMS, *SEARCH], ids=lambda arm: arm.name)
def test_every_arm_is_a_recipe_on_every_setting(setting, arm):
    config = SpinConfig.model_validate(recipe_of(setting, arm, DATA, None if arm.from_base else "theta-0", seed=1))
    assert config.seed == 1
    assert (config.model.path == "theta-0") == (not arm.from_base)


def test_alpha_spin_and_fictitious_play_differ_from_spin_in_their_one_setting():
    setting = SETTINGS["word_problems"]
    recipes = {arm.name: flatten(recipe_of(setting, arm, DATA, "theta-0", 0)) for arm in ARMS}

    def differing(arm: str) -> dict[str, object]:
        spin = recipes["spin"]
        return {key: value for key, value in recipes[arm].items() if spin.get(key) != value}

    assert differing("alpha_spin") == {"objective.reference_alpha": 0.9}
    assert differing("fictitious_play") == {"objective.window": "all"}


def test_dev_rows_are_neither_trained_on_nor_of_the_test_file(tmp_path):
    train, test = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train.write_text("".join(json.dumps({"row": i}) + "\n" for i in range(1000)))
    test.write_text('{"row": "test"}\n')

    def rows(file: str) -> list[object]:
        return [json.loads(line)["row"] for line in Path(file).read_text().splitlines()]

    dev = split_files(SETTINGS["word_problems"], train, test, "dev", tmp_path / "dev")
    assert (rows(dev["train"]), rows(dev["heldout"])) == (list(range(700)), list(range(700, 1000)))
    final = split_files(SETTINGS["word_problems"], train, test, "test", tmp_path / "test")
    assert (len(rows(final["train"])), rows(final["heldout"])) == (1000, ["test"])
    assert rows(final["seed"]) + rows(final["questions"]) == rows(final["train"])


def iterate(number: int, tokens: int, sampled: list[list[bool]], seconds: float = 0) -> dict:
    return {
        "iterate": number, "train_tokens": tokens, "seconds": seconds, "steps": 1, "evaluation": {},
        "prompt_ids": [f"p{i}" for i in range(len(sampled))], "greedy": [row[0] for row in sampled], "sampled": sampled,
        "real_logp": [-2.0] * len(sampled), "real_tokens": [4] * len(sampled), "generated_length": 5.0,
        "distinct_1": 0.5, "distinct_2": 0.6,
    }  # fmt: skip


def run_of(arm: str, iterates: list[dict], seed: int = 0) -> dict:
    return {"arm": arm, "seed": seed, "iterates": iterates}


RIGHT, WRONG = [True] * 4, [False] * 4


def test_an_iterate_is_never_compared_with_less_compute_than_its_own():
    sft = run_of(SFT, [iterate(number, 100 * number, [WRONG], seconds=number) for number in range(4)])
    assert analyse.matched(sft, iterate(1, 150, [WRONG]), "train_tokens")["iterate"] == 2
    assert analyse.matched(sft, iterate(1, 200, [WRONG]), "train_tokens")["iterate"] == 2
    assert analyse.matched(sft, iterate(1, 0, [WRONG], seconds=2.5), "seconds")["iterate"] == 3
    assert analyse.matched(sft, iterate(1, 301, [WRONG]), "train_tokens") is None


def test_a_paired_interval_is_narrow_where_all_rows_agree():
    """Rows of very different difficulty, each better by 0.25: the difference has no spread at all."""
    assert analyse.bootstrap(np.full((3, 50), 0.25)) == {"value": 0.25, "low": 0.25, "high": 0.25}


def test_the_interval_of_one_seed_is_the_binomial_one():
    """400 rows, ±1 alike: standard error 1/√400 = 0.05, so 95 % within about ±0.098."""
    found = analyse.bootstrap(np.tile([1.0, -1.0], 200)[None])
    assert (found["low"], found["high"]) == (pytest.approx(-0.098, abs=0.006), pytest.approx(0.098, abs=0.006))


def test_seeds_that_disagree_widen_the_interval():
    found = analyse.bootstrap(np.stack([np.full(50, 1.0), np.full(50, -1.0), np.full(50, 0.0)]))
    assert (found["value"], found["low"], found["high"]) == (0.0, -1.0, 1.0)


def write(folder: Path, split: str, run: dict) -> None:
    path = folder / "smoke" / split / f"{run['arm']}.seed-{run['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))


def test_the_arm_is_chosen_on_dev_rows_and_its_difference_taken_on_test_rows(tmp_path):
    """``good_on_dev`` is right on dev and, on test, on one row of two; SFT on none. ``good_on_test`` must not win."""
    for arm, dev, test in [("good_on_dev", RIGHT, [RIGHT, WRONG]), ("good_on_test", WRONG, [RIGHT, RIGHT])]:
        write(tmp_path, "dev", run_of(arm, [iterate(0, 0, [WRONG]), iterate(1, 100, [dev])]))
        write(tmp_path, "test", run_of(arm, [iterate(0, 0, [WRONG] * 2), iterate(1, 100, test)]))
    write(tmp_path, "test", run_of(SFT, [iterate(0, 0, [WRONG] * 2), iterate(1, 100, [WRONG] * 2)]))
    found = analyse.analyse("smoke", tmp_path)
    assert found["chosen_on_dev_rows"] == {"arm": "good_on_dev", "iterate": 1}
    assert found["spin_minus_sft"]["value"] == 0.5
    assert (found["spin_minus_sft"]["low"], found["spin_minus_sft"]["high"]) == (0.0, 1.0)
    assert found["continued_sft_arm"] == SFT
    text = analyse.markdown(found)
    assert "+0.500 (+0.000 to +1.000)" in text
    analyse.plot(found, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<polyline") == 6


def test_sft_gets_its_rate_from_the_dev_rows_too(tmp_path):
    """The low rate is better on dev rows, so it is what SPIN must beat on test rows, where it is level: 0, not +1."""
    for arm, dev, test in [(SFT, WRONG, WRONG), (f"{SFT}_low_rate", RIGHT, RIGHT), ("spin", RIGHT, RIGHT)]:
        for split, rows in (("dev", dev), ("test", test)):
            write(tmp_path, split, run_of(arm, [iterate(0, 0, [WRONG]), iterate(1, 100, [rows])]))
    found = analyse.analyse("smoke", tmp_path)
    assert (found["continued_sft_arm"], found["spin_minus_sft"]["value"]) == (f"{SFT}_low_rate", 0.0)


def test_without_the_search_no_arm_is_claimed(tmp_path):
    write(tmp_path, "test", run_of("spin", [iterate(0, 0, [WRONG]), iterate(1, 100, [RIGHT])]))
    write(tmp_path, "test", run_of(WARM_UP, [iterate(0, 0, [WRONG])]))
    found = analyse.analyse("smoke", tmp_path)
    assert found["spin_minus_sft"] is None
    assert "No result yet" in analyse.markdown(found)
