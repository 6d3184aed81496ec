"""The quality experiment's bookkeeping: recipes differ only in the arm, compute is matched, intervals are paired."""

import json
from dataclasses import replace
from pathlib import Path

import analyse
import numpy as np
import pytest
import torch
from arms import ARMS, SETTINGS, SFT, WARM_UP, arms_of, is_finished, plateau, recipe_of, split_files
from measure import answer_batch, draw
from run import Experiment, NotYet, with_seeds
from transformers import AutoModelForCausalLM

from spin_ray.config.recipe import SpinConfig, flatten
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import Rendered

DATA = {role: f"{role}.jsonl" for role in ("train", "dev", "test", "seed", "questions")}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.name)
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_recipe_on_every_setting(setting, arm):
    config = SpinConfig.model_validate(recipe_of(setting, arm, DATA, None if arm.from_base else "theta-0", seed=1))
    assert config.seed == 1
    assert (config.model.path == "theta-0") == (not arm.from_base)


def test_arms_of_spin_differ_from_it_in_what_their_name_says():
    setting = SETTINGS["word_problems"]
    recipes = {arm.name: flatten(recipe_of(setting, arm, DATA, "theta-0", 0)) for arm in ARMS}

    def differing(arm: str) -> dict[str, object]:
        spin = recipes["spin"]
        return {key: value for key, value in recipes[arm].items() if spin.get(key) != value}

    assert differing("alpha_spin") == {"objective.reference_alpha": 0.9}
    assert differing("fictitious_play") == {"objective.window": "all"}
    assert differing("spin_beta_5") == {"objective.beta": 5.0, "iterations": 1}
    assert differing("spin_flat_1.5") == {"generation.sampling.temperature": 1.5, "generation.sampling.top_k": 8}


def test_a_setting_may_run_fewer_arms_and_seeds():
    assert arms_of(SETTINGS["word_problems"]) == ARMS
    few = arms_of(replace(SETTINGS["word_problems"], arms=("spin", SFT), most_seeds=2))
    assert [(arm.name, arm.seeds) for arm in few] == [(SFT, 2), ("spin", 2)]


def test_an_arm_that_became_longer_is_not_finished():
    setting = SETTINGS["word_problems"]
    spin = next(arm for arm in ARMS if arm.name == "spin")
    run = run_of("spin", [iterate(number, 10, [WRONG]) for number in (1, 2, 3)])
    assert is_finished(setting, spin, run)
    assert not is_finished(setting, spin, run | {"complete": False})
    assert not is_finished(setting, spin, None)
    longer = replace(spin, changes=spin.changes | {"iterations": 4})
    assert not is_finished(setting, longer, run)
    assert is_finished(replace(setting, most_iterations=3), longer, run)


def test_dev_rows_are_neither_trained_on_nor_of_the_test_file(tmp_path):
    train, test = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train.write_text("".join(json.dumps({"row": i}) + "\n" for i in range(1000)))
    test.write_text('{"row": "te\u2028st\u0085"}\n', encoding="utf-8")  # JSON allows these ends of lines within a text

    def rows(file: str) -> list[object]:
        return [json.loads(line)["row"] for line in Path(file).read_text().splitlines()]

    files = split_files(SETTINGS["word_problems"], train, test, tmp_path / "data")
    assert (rows(files["train"]), rows(files["dev"])) == (list(range(700)), list(range(700, 1000)))
    assert rows(files["test"]) == ["te\u2028st\u0085"]
    assert rows(files["seed"]) + rows(files["questions"]) == rows(files["train"])  # of 700, 500 and the other 200
    few = split_files(replace(SETTINGS["word_problems"], question_rows=50), train, test, tmp_path / "data")
    assert rows(few["questions"]) == list(range(500, 550))


def test_a_seed_is_run_by_the_arms_that_have_it_wherever_it_stands():
    arms = [arm for arm in ARMS if arm.name in (WARM_UP, SFT, "spin")]
    several = [arm.name for arm in arms if arm.seeds > 1]
    assert WARM_UP not in several
    assert [(seed, arm.name) for seed, arm in with_seeds([1], arms)] == [(1, name) for name in several]
    assert {arm.name for seed, arm in with_seeds([2, 0], arms) if seed == 0} == {arm.name for arm in arms}
    with pytest.raises(SystemExit, match="--seeds 7: no arm has them; the most is 2"):
        with_seeds([7], arms)


@pytest.mark.parametrize(
    ("logps", "expected"), [([-20, -18, -19], 2), ([-20, -18], 2), ([-30, -31], 1), ([-20, -20], 1)]
)
def test_theta_0_is_where_held_out_responses_get_no_likelier(logps, expected):
    iterates = [{"iterate": number, "dev": {"real_logp": [logp]}} for number, logp in enumerate(logps, start=1)]
    assert plateau({"iterates": iterates}) == expected


@pytest.fixture(scope="module")
def tiny():
    """With the attention that measure.py registers, whose path for one token is then compared with whole passes."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        resolve("embedded:tiny-llama"), dtype=torch.float32, attn_implementation="in_groups"
    )


PROMPTS = [Rendered([1, 50, 60], [70, 80, 2]), Rendered([1, 40, 41, 42, 43, 44], [9, 2])]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_answers_that_share_a_prompt_are_those_of_one_sequence_at_a_time(tiny, temperature):
    """Log p(y), the greedy answer and each sample against whole forward passes without padding or cache; two samples
    of a row part after four tokens; an answer ends with the stop token (the greedy answer's third token here, so that
    one row ends before the others) or is cut at 6.
    """
    uniform = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0))
    uniform[:, 1, :4] = uniform[:, 0, :4]
    free = answer_batch(tiny, PROMPTS, uniform, tiny.config.vocab_size - 1, temperature)[0]
    stop = free[0][0][2]
    answers, logps = answer_batch(tiny, PROMPTS, uniform, stop, temperature)
    assert all(found[1][:4] == found[2][:4] and found[1] != found[2] for found in answers)
    for row, found, logp, numbers in zip(PROMPTS, answers, logps, uniform, strict=True):
        whole = tiny(torch.tensor([row.prompt_ids + row.real_ids])).logits[0].log_softmax(-1)
        places = range(len(row.prompt_ids) - 1, len(row.prompt_ids) + len(row.real_ids) - 1)
        by_hand = sum(whole[place, token].item() for place, token in zip(places, row.real_ids, strict=True))
        assert logp == pytest.approx(by_hand, abs=1e-4)
        for answer, quantiles in zip(found, [[-1.0] * 6, *numbers.tolist()], strict=True):
            ids: list[int] = []
            for quantile in quantiles:
                logits = tiny(torch.tensor([row.prompt_ids + ids])).logits[:, -1] / temperature
                ids.append(draw(logits, torch.tensor([quantile])).item())
                if ids[-1] == stop:
                    break
            assert answer == ids
    assert answers[0][0][-1] == stop and len(answers[0][0]) <= 3


def test_draws_have_the_probabilities_of_the_softmax():
    """200 tokens, of which the likeliest 64 have about half: both ways of looking for a quantile are used."""
    logits = torch.linspace(0, 1, 200)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = torch.bincount(draw(logits.expand(20_000, -1), uniform), minlength=200) / 20_000
    torch.testing.assert_close(drawn, logits.softmax(0), rtol=0, atol=1.01 / 20_000)


def iterate(number: int, tokens: int, sampled: list[list[bool]], seconds: float = 0, dev=None) -> dict:
    def measured(of_rows: list[list[bool]]) -> dict:
        return {
            "greedy": [row[0] for row in of_rows], "sampled": of_rows, "real_logp": [-2.0] * len(of_rows),
            "real_tokens": [4] * len(of_rows), "generated_length": 5.0, "distinct_1": 0.5, "distinct_2": 0.6,
        }  # fmt: skip

    return {
        "iterate": number, "train_tokens": tokens, "compute": tokens, "seconds": seconds, "steps": 1, "evaluation": {},
        "test": measured(sampled), "dev": measured(sampled if dev is None else dev),
    }  # fmt: skip


def run_of(arm: str, iterates: list[dict], seed: int = 0) -> dict:
    is_spin = not arm.startswith((SFT, WARM_UP))
    recipe = {"iterations": max((each["iterate"] for each in iterates), default=0)}
    return {
        "arm": arm, "seed": seed, "iterates": iterates, "is_spin": is_spin, "recipe": recipe, "complete": True,
    }  # fmt: skip


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


def write(folder: Path, run: dict) -> None:
    path = folder / "smoke" / f"{run['arm']}.seed-{run['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))


@pytest.mark.slow
def test_the_arm_is_chosen_on_dev_rows_and_its_difference_taken_on_test_rows(tmp_path):
    """``good_on_dev`` is right on dev and, on test, on one row of two; SFT on none. ``good_on_test`` must not win."""
    for arm, dev, test in [("good_on_dev", RIGHT, [RIGHT, WRONG]), ("good_on_test", WRONG, [RIGHT, RIGHT])]:
        write(tmp_path, run_of(arm, [iterate(1, 100, test, dev=[dev])]))
    write(tmp_path, run_of(SFT, [iterate(1, 100, [WRONG] * 2)]))
    write(tmp_path, run_of(WARM_UP, [iterate(1, 900, [WRONG] * 2)]))
    found = analyse.analyse(tmp_path, "smoke")
    assert found["chosen_on_dev_rows"] == {"arm": "good_on_dev", "iterate": 1}
    assert found["spin_minus_sft"]["value"] == 0.5
    assert (found["spin_minus_sft"]["low"], found["spin_minus_sft"]["high"]) == (0.0, 1.0)
    assert found["continued_sft_arm"] == SFT
    text = analyse.markdown(found)
    assert "+0.500 (+0.000 to +1.000)" in text
    analyse.plot(found, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<polyline") == 6


@pytest.mark.slow
def test_sft_gets_its_rate_from_the_dev_rows_too(tmp_path):
    """The low rate is better on dev rows, so it is what SPIN must beat on test rows, where it is level: 0, not +1."""
    low = f"{SFT}_rate_5e-6"
    for arm, dev, test in [(SFT, WRONG, WRONG), (low, RIGHT, RIGHT), ("spin", RIGHT, RIGHT)]:
        write(tmp_path, run_of(arm, [iterate(1, 100, [test], dev=[dev])]))
    found = analyse.analyse(tmp_path, "smoke")
    assert (found["continued_sft_arm"], found["spin_minus_sft"]["value"]) == (low, 0.0)


@pytest.mark.slow
def test_an_iteration_is_compared_with_the_one_before_in_the_same_seed(tmp_path):
    write(tmp_path, run_of("spin", [iterate(1, 100, [WRONG, RIGHT]), iterate(2, 200, [RIGHT, RIGHT])]))
    write(tmp_path, run_of(SFT, [iterate(1, 100, [WRONG] * 2), iterate(2, 200, [WRONG] * 2)]))
    assert analyse.analyse(tmp_path, "smoke")["second_iteration_minus_first"]["value"] == 0.5


def test_what_is_missing_is_said_and_no_arm_is_claimed(tmp_path):
    write(tmp_path, run_of("spin", [iterate(1, 100, [RIGHT])]))
    found = analyse.analyse(tmp_path, "smoke")
    assert found["spin_minus_sft"] is None
    assert found["spin_minus_sft_missing_because"] == "no arm of continued SFT has an iterate yet"
    assert "spin, seed 0" not in found["still_to_run"] and f"{SFT}, seed 1" in found["still_to_run"]
    assert "No comparison yet" in analyse.markdown(found)
    write(tmp_path, run_of(SFT, [iterate(1, 50, [RIGHT])]))
    found = analyse.analyse(tmp_path, "smoke")
    assert found["spin_minus_sft"] is None and "training tokens" in found["spin_minus_sft_missing_because"]


def test_the_page_says_what_an_iterate_gives_at_lower_temperatures(tmp_path):
    start = iterate(1, 10, [WRONG])
    start["test_at_0.5"] = start["test"] | {"sampled": [[True, True, True, False]]}
    write(tmp_path, run_of(WARM_UP, [start]))
    write(tmp_path, run_of("spin", [iterate(1, 10, [WRONG])]))
    page = analyse.markdown(analyse.analyse(tmp_path, "smoke"))
    assert f"| {WARM_UP} | 1 | 0 | 0.000 | 0.750 | 0.000 |" in page.partition("## By temperature")[2]
    assert "| spin | 1 | 0 |" not in page


def test_an_arm_after_sft_starts_from_its_own_seed_and_pays_for_it(tmp_path):
    arms = {arm.name: arm for arm in ARMS}
    experiment = Experiment(SETTINGS["smoke"], tmp_path, tmp_path / "runs", tmp_path)
    with pytest.raises(NotYet, match=f"{SFT}.seed-1.json.* run the arm {SFT} first"):
        experiment.start_model(arms["spin_flat_1.5_after_sft"], 1)
    for seed, tokens in enumerate([100, 200]):
        write(tmp_path, run_of(SFT, [iterate(1, tokens, [WRONG], seconds=tokens / 10)], seed))
    spent = experiment.spent_before(arms["spin_flat_1.5_after_sft"], 1)
    assert spent == {"train_tokens": 200, "compute": 200, "seconds": 20}
    assert experiment.earlier(arms["spin_flat_1.5_after_sft"], 1)[:2] == (arms[SFT], 1)
    assert experiment.spent_before(arms["spin"], 1) == {}
    with pytest.raises(NotYet, match=f"run the arm {WARM_UP} first"):
        experiment.start_model(arms["spin"], 1)


def test_arms_are_compared_by_the_seeds_that_all_of_them_have(tmp_path):
    """In the seed of both ``steady`` is better, in the mean of its own seeds worse."""
    for seed, dev in enumerate([RIGHT, WRONG]):
        write(tmp_path, run_of("steady", [iterate(1, 100, [RIGHT], dev=[dev])], seed))
    write(tmp_path, run_of("lucky", [iterate(1, 100, [RIGHT], dev=[[True, True, True, False]])]))
    assert analyse.best_on_dev(analyse.load(tmp_path / "smoke"), ["lucky", "steady"]) == ("steady", 1)
