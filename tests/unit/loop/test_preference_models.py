"""Preference models: their probabilities against the same computed by hand from the models' own outputs."""

import copy
from datetime import datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Model

from spin_ray.config.sections import ScorerConfig
from spin_ray.errors import ModelError
from spin_ray.inputs.template_variables import TemplateVariables
from spin_ray.loop.algorithms.sppo import preference_models, preferences
from spin_ray.loop.algorithms.sppo.preference_models import RewardScorer, load_scorer
from tests.support.preference_models import save_pairrm, save_reward_model

torch.set_num_threads(1)
PROMPT = [{"role": "user", "content": "2 + 2 = ?"}]
RESPONSES = ["2 + 2 = 4", "5", "why do you ask"]
NO_VARIABLES = TemplateVariables({}, datetime(2024, 7, 26))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory):
    return save_pairrm(tmp_path_factory.mktemp("pairrm"))


def scorer_of(folder, kind, device="cpu"):
    return load_scorer(ScorerConfig(path=str(folder), kind=kind), folder, torch.device(device), NO_VARIABLES)


@pytest.mark.parametrize("kind", ["reward", "pairrm"])
def test_probabilities_of_both_sides_add_up_to_1(kind, reward, pairrm):
    wins = scorer_of({"reward": reward, "pairrm": pairrm}[kind], kind).wins(PROMPT, RESPONSES)
    torch.testing.assert_close(wins + wins.T, torch.ones(3, 3))
    assert wins.diagonal().tolist() == [0.5] * 3
    assert (wins - 0.5).abs().max() > 0.01, "a judge without an opinion would make the test empty"


@torch.no_grad()
def test_a_reward_model_judges_the_whole_chat_by_the_difference_of_its_outputs(reward):
    tokenizer, model = AutoTokenizer.from_pretrained(reward), AutoModelForSequenceClassification.from_pretrained(reward)
    rewards = []
    for response in RESPONSES[:2]:
        chat = [*PROMPT, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        rewards.append(model(input_ids=ids).logits.item())
    found = scorer_of(reward, "reward").wins(PROMPT, RESPONSES)[0, 1]
    assert found.item() == pytest.approx(torch.sigmoid(torch.tensor(rewards[0] - rewards[1])).item(), abs=1e-6)


def test_a_reward_models_template_reads_the_recipes_variables_and_the_runs_date(reward):
    variables = TemplateVariables({"think": False}, datetime(2024, 7, 26))
    scorer = load_scorer(ScorerConfig(path=str(reward), kind="reward"), reward, torch.device("cpu"), variables)
    scorer._tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{% if think %}?{% endif %}"
    assert scorer._tokenizer.decode(scorer._encode(PROMPT, "4")["input_ids"]) == "26 Jul 2024"


@pytest.mark.parametrize("on_cpu", [True, False])
@torch.no_grad()
def test_rewards_of_a_bf16_model_are_not_rounded_to_bf16(reward, tmp_path, on_cpu):
    """The truth is transformers' fp64; elsewhere than on a CPU only the layers before the last compute in bf16."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.bfloat16)
    model.score.weight.mul_(64)  # rewards of tens, where bf16 has steps of 0.125
    model.save_pretrained(tmp_path)
    tokenizer, body = AutoTokenizer.from_pretrained(reward), copy.deepcopy(model.model)
    scorer: Any = RewardScorer(tmp_path, tokenizer, 64, NO_VARIABLES, on_cpu=on_cpu)
    row, model = scorer._encode(PROMPT, "4"), model.double()
    ids = torch.tensor([row["input_ids"]])
    state = (model.model if on_cpu else body)(input_ids=ids).last_hidden_state[0, -1].double()
    truth, found = (state @ model.score.weight[0]).item(), scorer._rewards([row]).item()
    assert abs(truth - torch.tensor(truth).bfloat16().item()) > 0.01, "rounding would not show"
    assert found == pytest.approx(truth, abs=1e-3)


@torch.no_grad()
def test_pairrm_compares_the_states_at_its_marks_in_both_orders(pairrm):
    """s = mean over tasks of head([source; first]) − head([source; second]); P = ½[σ(s₀₁) + σ(−s₁₀)]."""
    from safetensors.torch import load_file

    tokenizer, weights = AutoTokenizer.from_pretrained(pairrm), load_file(pairrm / "model.safetensors")
    body = DebertaV2Model.from_pretrained(
        None, config=DebertaV2Model.config_class.from_pretrained(pairrm),
        state_dict={name.partition(".")[2]: value for name, value in weights.items() if "head" not in name},
    ).eval()  # fmt: skip

    def head(states):
        hidden = torch.tanh(states @ weights["head_layer.1.weight"].T + weights["head_layer.1.bias"])
        return hidden @ weights["head_layer.4.weight"].T + weights["head_layer.4.bias"]

    def score(first, second):
        text = f"<|source|>{PROMPT[0]['content']}<|candidate1|>{first}<|candidate2|>{second}"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        states = body(input_ids=ids).last_hidden_state[0]
        marks = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("source", "candidate1", "candidate2")]
        source, one, other = (states[(ids[0] == mark).nonzero().item()] for mark in marks)
        return (head(torch.cat([source, one])) - head(torch.cat([source, other]))).mean()

    expected = (torch.sigmoid(score(*RESPONSES[:2])) + torch.sigmoid(-score(RESPONSES[1], RESPONSES[0]))) / 2
    assert scorer_of(pairrm, "pairrm").wins(PROMPT, RESPONSES)[0, 1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_text_that_is_too_long_is_cut_and_keeps_the_marks(pairrm):
    scorer = load_scorer(
        ScorerConfig(path=str(pairrm), kind="pairrm", max_length=40), pairrm, torch.device("cpu"), NO_VARIABLES
    )
    wins = scorer.wins([{"role": "user", "content": "why " * 200}], ["a " * 200, "b " * 200])
    assert wins.isfinite().all()


@pytest.mark.parametrize("kind", ["reward", "pairrm"])
@pytest.mark.parametrize("has_template", [True, False])
def test_responses_that_lose_their_end_are_counted(kind, has_template, reward, pairrm):
    """Once each, however many it is compared with; so are all whose prompt loses its end."""
    folder = {"reward": reward, "pairrm": pairrm}[kind]
    scorer: Any = load_scorer(
        ScorerConfig(path=str(folder), kind=kind, max_length=80), folder, torch.device("cpu"), NO_VARIABLES
    )
    if not has_template:
        scorer._tokenizer.chat_template = None
    scorer.wins(PROMPT, RESPONSES)
    assert scorer.cut == 0
    scorer.wins(PROMPT, ["a " * 200, "5", "b " * 200])
    assert scorer.cut == 2
    scorer.wins([{"role": "user", "content": "why " * 200}], ["a", "b", "c"])
    assert scorer.cut == 5


@pytest.mark.parametrize("kind", ["reward", "pairrm"])
def test_a_model_of_another_kind_is_named(kind, reward, pairrm):
    other = {"reward": pairrm, "pairrm": reward}[kind]
    with pytest.raises(ModelError, match=f"is no {kind} model"):
        scorer_of(other, kind)


# Devices and batches


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda"), (0.25, "cuda")])
def test_a_model_is_loaded_on_the_device_that_its_actor_reserved(reward, monkeypatch, gpus, device):
    asked: list[torch.device] = []
    monkeypatch.setattr(preferences, "load_scorer", lambda config, folder, device, variables: asked.append(device))
    here: Any = SimpleNamespace(here=lambda: reward)
    config = ScorerConfig.model_validate({"path": str(reward), "resources": {"gpus": gpus}})
    _ = preferences._Comparing(cast(Any, SimpleNamespace(scorer=config, preference_model=here, variables={})))._scorer
    assert asked == [torch.device(device)]


@pytest.mark.parametrize("kind", ["reward", "pairrm"])
def test_weights_and_texts_meet_on_the_device(kind, reward, pairrm):
    """The device ``meta`` refuses a product with a tensor of any other, as a GPU does."""
    scorer: Any = scorer_of({"reward": reward, "pairrm": pairrm}[kind], kind, "meta")
    assert {weight.device.type for weight in scorer._model.parameters()} == {"meta"}
    if kind == "reward":
        scorer._model.set_attn_implementation("eager")  # the other one looks at the values of the mask
        found = scorer._rewards([scorer._encode(PROMPT, response) for response in RESPONSES])
    else:
        found = scorer._scores([scorer._encode(PROMPT[0]["content"], one, "5") for one in RESPONSES])
    assert (found.device.type, found.shape) == ("meta", (3,))


@pytest.mark.parametrize("kind", ["reward", "pairrm"])
def test_a_batch_of_texts_of_unequal_lengths_is_judged_as_one_by_one(kind, reward, pairrm, monkeypatch):
    """The reward model defines no padding token, as chat models seldom do."""
    scorer = scorer_of({"reward": reward, "pairrm": pairrm}[kind], kind)
    responses = [*RESPONSES, "so " * 20, "7 " * 3, "", "no"]
    together = scorer.wins(PROMPT, responses)
    monkeypatch.setattr(preference_models, "ROWS_AT_A_TIME", 1)
    torch.testing.assert_close(together, scorer.wins(PROMPT, responses), atol=1e-5, rtol=0)


def test_a_reward_model_reads_as_many_texts_at_a_time_as_a_batch_holds(reward):
    scorer: Any = scorer_of(reward, "reward")
    sizes: list[int] = []
    scorer._model.register_forward_pre_hook(
        lambda _, __, texts: sizes.append(len(texts["input_ids"])), with_kwargs=True
    )
    scorer.wins(PROMPT, ["a"] * 11)
    assert sizes == [8, 3]


def test_a_text_that_names_a_mark_is_compared_at_the_real_ones(pairrm):
    scorer: Any = scorer_of(pairrm, "pairrm")
    row = scorer._encode("<|candidate1|> is a mark", "<|candidate2|>", "5")
    assert [row.ids[place] for place in row.marks] == scorer._mark_ids
    assert row.marks[1] > row.ids.index(scorer._mark_ids[1])
    assert scorer.wins([{"role": "user", "content": "<|candidate1|>"}], RESPONSES).isfinite().all()
