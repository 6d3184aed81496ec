"""Judges of responses for SPPO: P(one response to a prompt beats another), by models of preferences."""

import itertools
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spin_ray.config.sections import ScorerConfig
from spin_ray.errors import ModelError, first_line
from spin_ray.inputs.conversations import Conversation

PAIRS_AT_A_TIME = 8


class PreferenceScorer(Protocol):
    def wins(self, prompt: Conversation, responses: list[str]) -> Float[Tensor, "responses responses"]:
        """P(row beats column), 1/2 on the diagonal; [i, j] and [j, i] add up to 1."""
        ...


def load_scorer(config: ScorerConfig, folder: Path) -> PreferenceScorer:
    """The judge in ``folder``.

    Raises:
        ModelError: it cannot be loaded as what the config says it is.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        kind = {"reward": RewardScorer, "pairrm": PairRmScorer}[config.kind]
        return kind(folder, tokenizer, config.max_length)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"scorer.path {folder}: is no {config.kind} model ({first_line(error)})") from error


class RewardScorer:
    """A sequence classifier with one output r(x, y): P(y beats y') = σ(r − r'), Bradley and Terry's model."""

    def __init__(self, folder: Path, tokenizer: Any, max_length: int) -> None:
        from transformers import AutoModelForSequenceClassification

        self._tokenizer, self._max_length = tokenizer, max_length
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).eval()
        if self._model.config.num_labels != 1:
            raise ValueError(f"it has {self._model.config.num_labels} outputs, a reward model has one")

    @torch.no_grad()
    def wins(self, prompt: Conversation, responses: list[str]) -> Float[Tensor, "responses responses"]:
        rewards = torch.stack([self._reward(prompt, response) for response in responses])
        return torch.sigmoid(rewards[:, None] - rewards[None, :])

    def _reward(self, prompt: Conversation, response: str) -> Float[Tensor, ""]:
        """One row at a time: a decoder finds its last token by the padding, which chat models seldom define."""
        if self._tokenizer.chat_template:
            chat = [*prompt, {"role": "assistant", "content": response}]
            text = self._tokenizer.apply_chat_template(chat, tokenize=False)
            encoded = self._tokenizer(text, add_special_tokens=False, **self._cut())
        else:
            encoded = self._tokenizer(_instruction(prompt), response, **self._cut())
        return self._model(**encoded).logits[0, 0].float()

    def _cut(self) -> dict[str, Any]:
        return {"return_tensors": "pt", "truncation": True, "max_length": self._max_length}


class PairRmScorer:
    """PairRM (Jiang et al. 2023, arXiv 2306.02561) as in llm-blender/PairRM-hf: a DeBERTa-v3 reads
    ``<|source|>x<|candidate1|>y<|candidate2|>y'``, and a head compares the states at the three marks.

    The order of the candidates matters a little to it, so both are read: P = ½[σ(s(y, y')) + σ(−s(y', y))].
    """

    marks = ("<|source|>", "<|candidate1|>", "<|candidate2|>")

    def __init__(self, folder: Path, tokenizer: Any, max_length: int) -> None:
        from safetensors.torch import load_file
        from transformers import DebertaV2Config, DebertaV2Model

        self._tokenizer, self._max_length = tokenizer, max_length
        raw = json.loads((folder / "config.json").read_text())
        self._mark_ids = [raw[f"{name}_prefix_id"] for name in ("source", "cand1", "cand2")]
        config = DebertaV2Config.from_pretrained(folder)
        hidden = config.hidden_size
        # Numbers 0 and 3 are dropout, which has no weights and is never on here.
        head = {"1": nn.Linear(2 * hidden, hidden), "2": nn.Tanh(), "4": nn.Linear(hidden, raw["n_tasks"])}
        self._model = nn.ModuleDict({"pretrained_model": DebertaV2Model(config), "head_layer": nn.ModuleDict(head)})
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        self._model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        self._model.eval()

    @torch.no_grad()
    def wins(self, prompt: Conversation, responses: list[str]) -> Float[Tensor, "responses responses"]:
        count = len(responses)
        orders = list(itertools.permutations(range(count), 2))
        rows = [self._encode(_instruction(prompt), responses[one], responses[other]) for one, other in orders]
        starts = range(0, len(rows), PAIRS_AT_A_TIME)
        scores = [score for start in starts for score in self._scores(rows[start : start + PAIRS_AT_A_TIME])]
        first_wins = torch.full((count, count), 0.5)
        for (one, other), score in zip(orders, scores, strict=True):
            first_wins[one, other] = torch.sigmoid(score)
        return (first_wins + 1 - first_wins.T) / 2

    def _encode(self, source: str, first: str, second: str) -> list[int]:
        """The source gets what it needs of 60 % of the length, the candidates half each of what is left."""

        def cut(text: str, length: int) -> list[int]:
            return self._tokenizer.encode(text, truncation=True, max_length=length)

        ids = cut(self.marks[0] + source, self._max_length * 3 // 5)
        share = (self._max_length - len(ids)) // 2
        return ids + cut(self.marks[1] + first, share) + cut(self.marks[2] + second, share)

    def _scores(self, rows: list[list[int]]) -> Float[Tensor, "rows"]:
        padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        states = self._model["pretrained_model"](**padded).last_hidden_state
        source, one, other = (states[padded["input_ids"] == mark] for mark in self._mark_ids)
        return (self._head(source, one) - self._head(source, other)).mean(dim=-1)

    def _head(self, source: Tensor, candidate: Tensor) -> Tensor:
        head: Any = self._model["head_layer"]
        return head["4"](head["2"](head["1"](torch.cat([source, candidate], dim=-1))))


def _instruction(prompt: Conversation) -> str:
    """A single question as it is; else who said what."""
    spoken = [message for message in prompt if message["content"]]
    if len(spoken) == 1:
        return spoken[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in spoken)
