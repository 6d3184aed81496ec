"""The experiment on replies: its rows and arms, its measures by hand, and what is compared with what."""

import copy
import json
from pathlib import Path
from typing import get_args

import numpy as np
import page_replies
import pytest
import torch
from analyse_replies import against_sft, analyse, beyond, load, shared
from arms import SFT, WARM_UP, recipe_of
from likeness import DISCRIMINATORS, mauve, self_bleu, tokens
from measure_replies import replies
from replies import ARMS, SETTINGS
from run import Experiment
from transformers import AutoModelForCausalLM

from spin_ray.config.algorithms import AlgorithmName
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LossName
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import Rendered
from spin_ray.loop.algorithms.table import check_settings
from tests.unit.benchmarks.test_quality_analysis import DATA


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_recipe(arm):
    recipe = recipe_of(SETTINGS["replies"], arm, DATA, None if arm.from_base else "theta-0", seed=1)
    loss = recipe["objective"].get("loss", "logistic")
    if recipe["algorithm"] not in get_args(AlgorithmName) or loss not in get_args(LossName):
        pytest.skip(f"this version has no {arm.name}")
    config = SpinConfig.model_validate(recipe)
    check_settings(config)
    assert (config.data.heldout is None) == (config.algorithm == SFT)


@pytest.mark.slow
def test_no_conversation_is_in_two_splits(tmp_path):
    experiment = Experiment(SETTINGS["replies"], tmp_path, tmp_path / "runs", tmp_path / "results")

    def conversations(role: str) -> list[str]:
        lines = Path(experiment.files[role]).read_text().splitlines()
        return [json.loads(line)["conversation_id"] for line in lines]

    train, dev, test = (set(conversations(role)) for role in ("train", "dev", "test"))
    assert train.isdisjoint(dev) and train.isdisjoint(test) and dev.isdisjoint(test)
    assert len(conversations("train")) > 2500 and len(conversations("dev")) == 600
    assert resolve("embedded:replies-heldout").endswith("replies-heldout.jsonl")


def test_runs_of_two_starts_are_not_compared(tmp_path):
    """The warm-up's best epoch may be another one on another machine. Its own start does not count."""
    for arm, start in ((WARM_UP, "base"), (SFT, "iter_001"), ("spin", "iter_001")):
        run = {"arm": arm, "seed": 0, "recipe": {"model": {"path": start}}}
        (tmp_path / f"{arm}.seed-0.json").write_text(json.dumps(run))
    assert load(tmp_path).keys() == {WARM_UP, SFT, "spin"}
    run = {"arm": "spin", "seed": 1, "recipe": {"model": {"path": "iter_000"}}}
    (tmp_path / "spin.seed-1.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match=r"different models: iter_001 \(.*\); iter_000 \(spin, seed 1\); compare"):
        load(tmp_path)


def test_the_divergence_of_one_distribution_is_near_1_and_of_two_near_0():
    random = np.random.default_rng(0)
    one, same = random.normal(size=(2, 300, 8))
    assert mauve(one, same) > 0.9
    assert mauve(one, same + 6) < 0.1


def test_self_bleu_is_1_where_all_say_the_same_and_counts_a_text_once():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b", "c d"]) == pytest.approx(1e-2)
    # words: half of each text's are elsewhere; pairs: none
    assert self_bleu(["a b", "a c"]) == pytest.approx(np.sqrt(0.5 * 1e-2))


def test_lengths_and_cuts_by_hand():
    found = tokens([[1, 2, 9], [1, 9]], [[1, 2, 3, 4], [1, 9]], stop=9)
    assert (found["generated_length"], found["length_distance"], found["cut"]) == (3, 0.5, 0.5)


def test_replies_at_several_temperatures_are_those_at_one_at_a_time():
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), attn_implementation="in_groups")
    rows = [Rendered([1, 50, 60], [70, 80, 2]), Rendered([1, 40, 41, 42, 43], [9, 2])]
    both, logps = replies(model, rows, 6, 2, [0.5, 1.0])
    for temperature, answers in zip((0.5, 1.0), both, strict=True):
        [alone], same = replies(model, rows, 6, 2, [temperature])
        assert alone == answers and same == pytest.approx(logps)
    assert both[0] != both[1]


def iterate(number: int, tokens: int, dev: dict[str, float], test: dict[str, float]) -> dict:
    def measured(accuracy: dict[str, float]) -> dict:
        at = {
            name: {
                "told": {"ngrams": [value] * 10, "embeddings": [value] * 10}, "mauve": 0.5, "self_bleu": 0.1,
                **dict.fromkeys(("generated_length", "real_length", "length_distance", "cut"), 1.0),
                **dict.fromkeys(("distinct_1", "distinct_2", "real_distinct_2"), 0.5),
            }
            for name, value in accuracy.items()
        }  # fmt: skip
        return {"conversations": 10, "self_bleu": 0.1, "real_logp": [-4.0], "real_tokens": [2], "at": at}

    return {"iterate": number, "train_tokens": tokens, "dev": measured(dev), "test": measured(test)}


def run_of(arm: str, *iterates: dict, seed: int = 0) -> dict:
    return {"arm": arm, "seed": seed, "complete": True, "recipe": {"iterations": 9}, "iterates": list(iterates)}


SFT_RUN = run_of(
    SFT,
    iterate(1, 100, {"0.7": 0.5, "1": 0.5}, {"0.7": 0.5, "1": 0.5}),
    iterate(2, 200, {"0.7": 0.7, "1": 0.8}, {"0.7": 0.7, "1": 0.6}),
    iterate(3, 300, {"0.7": 0.5, "1": 0.5}, {"0.7": 0.5, "1": 0.5}),
)
SPIN_RUN = run_of("spin", iterate(1, 150, {"0.7": 0.6, "1": 0.7}, {"0.7": 0.65, "1": 0.5}))


def test_an_arm_is_compared_at_equal_tokens_and_chosen_on_dev_rows_alone():
    """On test rows temperature 1 is better for both, and so are SFT's other iterates."""
    found = against_sft({0: SPIN_RUN}, {0: SFT_RUN}, DISCRIMINATORS)
    assert (found["iterate"], found["temperature"]) == (1, "0.7")
    assert (found["sft_iterate"], found["sft_temperature"]) == (2, "0.7")
    assert found["value"] == pytest.approx(0.65 - 0.7)
    assert (found["low"], found["high"]) == pytest.approx((-0.05, -0.05))
    assert against_sft({1: SPIN_RUN}, {0: SFT_RUN}, DISCRIMINATORS) is None
    late = run_of("spin", iterate(1, 400, {"1": 0.5}, {"1": 0.5}))
    assert against_sft({0: late}, {0: SFT_RUN}, DISCRIMINATORS) is None and beyond({0: late}, {0: SFT_RUN}) == [1]


def test_an_iterate_that_was_trained_longer_than_sft_is_no_choice_and_is_told():
    further = run_of("spin", *SPIN_RUN["iterates"], iterate(2, 400, {"1": 0.5}, {"1": 0.5}))
    assert against_sft({0: further}, {0: SFT_RUN}, DISCRIMINATORS) == against_sft(
        {0: SPIN_RUN}, {0: SFT_RUN}, DISCRIMINATORS
    )
    assert beyond({0: further}, {0: SFT_RUN}) == [2]


def test_all_runs_are_compared_by_the_discriminators_that_all_of_them_have(tmp_path):
    """SFT has n-grams alone, as where no embeddings are installed: SPIN's embeddings, told at 1, do not count."""
    folder = tmp_path / "replies_first_pass"
    folder.mkdir()
    spin, sft = copy.deepcopy(SPIN_RUN), copy.deepcopy(SFT_RUN)
    for run, embeddings in ((spin, [1.0] * 10), (sft, None)):
        for at in (at for each in run["iterates"] for split in ("dev", "test") for at in each[split]["at"].values()):
            at["told"]["embeddings"] = embeddings
        (folder / f"{run['arm']}.seed-0.json").write_text(json.dumps(run))
    assert shared([spin]) == DISCRIMINATORS and shared([spin, sft]) == ("ngrams",)
    found = analyse(tmp_path, "replies")
    assert found["best_minus_sft"]["value"] == pytest.approx(0.65 - 0.7)
    assert "(by ngrams alone" in page_replies.markdown(found)
    assert page_replies.plot(found).count("<polyline") == 2


def test_the_page_says_what_is_there_and_what_is_not(tmp_path):
    found = analyse(tmp_path, "replies")
    assert found["best_minus_sft"] is None and "No comparison yet" in page_replies.markdown(found)
    folder = tmp_path / "replies_first_pass"
    folder.mkdir()
    warm_up = run_of(WARM_UP, iterate(1, 50, {"1": 0.9}, {"1": 0.9}))
    for run in (warm_up, SFT_RUN, SPIN_RUN):
        (folder / f"{run['arm']}.seed-0.json").write_text(json.dumps(run))
    found = analyse(tmp_path, "replies")
    best = found["best_minus_sft"]
    assert {"measure", "value", "low", "high", "arm", "seeds"} <= best.keys()
    assert (best["arm"], best["seeds"]) == ("spin", [0])
    page = page_replies.markdown(found)
    assert "**A first pass:**" in page and "at most 3 seed(s) and 4 iterates an arm" in page
    assert "Still to run: continued_sft, seed 1; " in page and "; spin_anchored, seed 0; " in page
    assert "-0.050 (-0.050 to -0.050)" in page
    assert page_replies.plot(found).count("<polyline") == 3
