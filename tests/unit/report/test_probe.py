"""Each rule of the probe's verdict at its edge, and the bound that ignores the size of margins."""

import math

import numpy as np
import pandas as pd
import pytest

from spin_ray.report.probe import (
    ANOTHER,
    RULES,
    SFT,
    SPIN,
    STOP,
    as_markdown,
    calibrated_losses,
    decide,
    margin_evidence,
)

NOTHING = {
    "loss": 0.69, "margin": 0.0, "accuracy": 0.5, "jsd_lower_bound": 0.001, "real_logp_drift": 0.0, "sft_gain": -0.1,
    "ngrams": {"accuracy": 0.51, "low": 0.45, "high": 0.57, "groups": 100},
    "real_length": 12.0, "generated_length": 12.5, "length_auc": 0.5, "truncation_rate": 0.0, "identical_share": 0.0,
    "duplicate_share": 0.0, "real_duplicate_share": 0.0, "heldout_is_train": False, "rows": 256,
    "standard_errors": {"jsd_lower_bound": 0.01, "real_logp_drift": 0.01, "sft_gain": 0.1},
}  # fmt: skip
SEEN = {"jsd_lower_bound": 0.02}


def test_nothing_found_is_to_stop_with_its_evidence():
    found = decide(NOTHING)
    assert (found["verdict"], found["rule"], found["something_to_learn"]) == (STOP, "nothing found", False)
    assert found["sentences"][0] == (
        "Verdict: stop, because nothing tells y from y′ (JSD at least 0.001 ± 0.020 nats; n-grams 0.51, 0.45 to 0.57)."
    )
    assert found["cautions"] == []


EDGES = [
    ("saturated", STOP, {"identical_share": 0.5}, {"identical_share": 0.49}),
    ("learns", SPIN, SEEN, {"jsd_lower_bound": 0.019}),
    ("falling log p(y)", ANOTHER, SEEN | {"real_logp_drift": -0.02}, SEEN | {"real_logp_drift": -0.019}),
    ("seen from outside", ANOTHER, {"ngrams": {"accuracy": 0.6, "low": 0.5, "high": 0.7, "groups": 9}},
     {"ngrams": {"accuracy": 0.6, "low": 0.49, "high": 0.7, "groups": 9}}),
    ("SFT still helps", SFT, {"sft_gain": 0.197}, {"sft_gain": 0.19}),
    ("SFT helps too", "", SEEN | {"sft_gain": 0.197}, SEEN | {"sft_gain": 0.19}),
    ("cut", "", {"truncation_rate": 0.05}, {"truncation_rate": 0.04}),
    ("length alone", "", {"length_auc": 0.3}, {"length_auc": 0.31}),
    ("duplicates", "", {"duplicate_share": 0.16}, {"duplicate_share": 0.14}),
    ("no held-out data", "", {"heldout_is_train": True}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "verdict", "beyond", "below"), EDGES, ids=[edge[0] for edge in EDGES])
def test_a_rule_applies_from_its_threshold_on(name, verdict, beyond, below):
    rule = next(rule for rule in RULES if rule.name == name)
    errors = {"standard_errors": {"jsd_lower_bound": 0.02 / 1.96, "real_logp_drift": 0.02 / 1.96, "sft_gain": 0.1}}
    yes, no = decide(NOTHING | errors | beyond), decide(NOTHING | errors | below)
    if verdict:
        assert (yes["verdict"], yes["rule"]) == (verdict, name)
        assert no["rule"] != name
    else:
        assert rule.because(NOTHING | errors | beyond) in yes["cautions"]
        assert no["cautions"] == []
    assert len(yes["sentences"]) == 2 and all(sentence.endswith(".") for sentence in yes["sentences"])


def test_every_rule_is_tested_and_in_the_table():
    assert {rule.name for rule in RULES} == {edge[0] for edge in EDGES} | {"nothing found"}
    assert all(rule.name in as_markdown() for rule in RULES)


def test_without_trained_pairs_the_texts_decide():
    """Too few pairs for a step, and too few rows for n-grams."""
    empty = dict.fromkeys(("loss", "margin", "accuracy", "jsd_lower_bound", "real_logp_drift", "sft_gain", "ngrams"))
    found = decide(NOTHING | empty | {"standard_errors": {}})
    assert found["verdict"] == STOP
    assert "too few pairs to train on; too few rows for n-grams" in found["sentences"][0]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_the_bound_does_not_depend_on_the_size_of_margins(size):
    """Margins of ±1, of which 80 % are right: entropy of 0.8, up to the one more right and wrong margin."""
    margins = np.tile([1.0, 1.0, 1.0, 1.0, -1.0], 200)
    np.random.default_rng(0).shuffle(margins)
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert calibrated_losses(size * margins, range(1000)).mean() == pytest.approx(entropy, abs=0.005)


def test_margins_without_sign_or_size_give_ln_2():
    alone = {f"p{number}": number for number in range(400)}
    noise = pd.Series(np.random.default_rng(0).normal(size=400), list(alone))
    found = margin_evidence(noise, 0 * noise, alone)
    assert found["loss"] == pytest.approx(math.log(2), abs=0.01)
    assert abs(found["jsd_lower_bound"]) < 1.96 * found["standard_errors"]["jsd_lower_bound"] + 0.005
    assert (calibrated_losses(np.zeros(4), range(4)) == math.log(2)).all()


def test_a_conversation_does_not_choose_its_own_scale():
    """Its rows are in one half. In alternate rows, each row would learn its conversation's sign from a neighbour."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=200)
    margins, groups = np.repeat(signs, 2), list(np.repeat(np.arange(200), 2))
    assert calibrated_losses(margins, groups)[0] == calibrated_losses(margins, groups)[1]
    changed = margins.copy()
    changed[1::2] *= 5
    mine, others = calibrated_losses(changed, groups), calibrated_losses(changed, range(400))
    halves = np.repeat(np.arange(200) % 2 == 0, 2)
    expected = calibrated_losses(np.concatenate([changed[halves], changed[~halves]]), [0] * 200 + [1] * 200)
    assert mine[halves] == pytest.approx(expected[:200]) and not np.allclose(mine, others)
