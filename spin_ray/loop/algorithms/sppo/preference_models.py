"""The preference models of SPPO."""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spin_ray.config.sections import ScorerConfig
from spin_ray.errors import ModelError, first_line
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.template_variables import TemplateVariables
from spin_ray.learner.tokenizer_file import open_tokenizer
from spin_ray.learner.weights import weight_files

Row = TypeVar("Row")
ROWS_AT_A_TIME = 8


class PreferenceScorer(Protocol):
    cut: int
    """Number of responses, so far, that lost their end or the end of their prompt to ``scorer.max_length``."""

    def wins(self, prompt: Conversation, responses: list[str]) -> Float[Tensor, "responses responses"]:
        """Returns P(row beats column) on the CPU; 1/2 on the diagonal, [i, j] + [j, i] = 1."""
        ...


def load_scorer(
    config: ScorerConfig, folder: Path, device: torch.device, variables: TemplateVariables
) -> PreferenceScorer:
    """Loads the preference model, with ``variables`` for its chat template.

    Raises:
        ModelError: the folder holds no model of the configured kind.
    """
    try:
        tokenizer = open_tokenizer(folder)
        scorer = (
            RewardScorer(folder, tokenizer, config.max_length, variables, on_cpu=device.type == "cpu")
            if config.kind == "reward"
            else PairRmScorer(folder, tokenizer, config.max_length)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"scorer.path {folder}: is no {config.kind} model ({first_line(error)})") from error
    return scorer.to(device)


class RewardScorer:
    """Reward model, a classifier with one output r(x, y): P(y beats y′) = σ(r − r′).

    It computes in fp32 on a CPU; elsewhere in its stored dtype, with the last layer in fp32.
    """

    def __init__(
        self, folder: Path, tokenizer: Any, max_length: int, variables: TemplateVariables, *, on_cpu: bool
    ) -> None:
        from transformers import AutoModelForSequenceClassification

        self.cut = 0
        self._tokenizer, self._max_length, self._variables = tokenizer, max_length, variables
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32 if on_cpu else "auto"
        ).eval()
        if self._model.config.num_labels != 1:
            raise ValueError(f"it has {self._model.config.num_labels} outputs, a reward model has one")
        _compute_head_in_fp32(self._model)
        self._text_config = self._model.config.get_text_config()
        self._pad_id: int | None = self._text_config.pad_token_id

    def to(self, device: torch.device) -> Self:
        self._model.to(device)
        return self

    @torch.no_grad()
    def wins(self, prompt: Conversation, responses: list[str]) -> Float[Tensor, "responses responses"]:
        rows = [self._encode(prompt, response) for response in responses]
        rewards = torch.cat([self._rewards(batch) for batch in _batches(rows)]).cpu()
        return torch.sigmoid(rewards[:, None] - rewards[None, :])

    def _encode(self, prompt: Conversation, response: str) -> dict[str, list[int]]:
        if self._tokenizer.chat_template:
            chat = [*prompt, {"role": "assistant", "content": response}]
            arguments = self._variables.arguments(self._tokenizer)
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, **arguments)
            tokens = partial(self._tokenizer, text, add_special_tokens=False)
        else:
            tokens = partial(self._tokenizer, _instruction(prompt), response)
        whole = tokens(verbose=False)
        if len(whole["input_ids"]) <= self._max_length:
            return whole
        self.cut += 1
        return tokens(truncation=True, max_length=self._max_length)

    def _rewards(self, rows: list[dict[str, list[int]]]) -> Float[Tensor, "rows"]:
        """Returns the output at each row's last token.

        transformers finds that token by the padding id, so a model without one gets an id that no row holds.
        """
        pad_id = self._pad_id
        if pad_id is None:
            held = {token for row in rows for token in row["input_ids"]}
            pad_id = next(token for token in itertools.count() if token not in held)
            self._text_config.pad_token_id = pad_id
        inputs = {name: [row[name] for row in rows] for name in rows[0]}
        padded = {
            name: _padded(values, pad_id if name == "input_ids" else 0, self._model.device)
            for name, values in inputs.items()
        }
        return self._model(**padded).logits[:, 0].float()


def _compute_head_in_fp32(model: nn.Module) -> None:
    """Makes the last layer with one output compute in fp32: bf16 has steps of 0.125 at a reward of 25."""
    heads = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.out_features == 1]
    for head in heads[-1:]:
        head.float().register_forward_pre_hook(lambda _, states: (states[0].float(),))


class MarkedRow(NamedTuple):
    ids: list[int]
    marks: list[int]
    """Positions of the three marks; the texts may hold the same tokens."""
    is_cut: bool
    """Whether the prompt or the first response lost its end."""


class PairRmScorer:
    """PairRM (Jiang et al. 2023, arXiv 2306.02561) as in llm-blender/PairRM-hf.

    DeBERTa-v3 reads ``<|source|>x<|candidate1|>y<|candidate2|>y′``, and a head compares the states at the marks.
    The order changes the score s, so both are read: P = ½[σ(s(y, y′)) + σ(−s(y′, y))].
    """

    marks = ("<|source|>", "<|candidate1|>", "<|candidate2|>")

    def __init__(self, folder: Path, tokenizer: Any, max_length: int) -> None:
        from safetensors.torch import load_file
        from transformers import DebertaV2Config, DebertaV2Model

        self.cut = 0
        self._tokenizer, self._max_length = tokenizer, max_length
        raw = json.loads((folder / "config.json").read_text())
        self._mark_ids = [raw[f"{name}_prefix_id"] for name in ("source", "cand1", "cand2")]
        config = DebertaV2Config.from_pretrained(folder)
        hidden = config.hidden_size
        # Layers 0 and 3 are dropout, which has no weights.
        head = {"1": nn.Linear(2 * hidden, hidden), "2": nn.Tanh(), "4": nn.Linear(hidden, raw["n_tasks"])}
        self._model = nn.ModuleDict({"pretrained_model": DebertaV2Model(config), "head_layer": nn.ModuleDict(head)})
        weights = {}
        for file in weight_files(folder):
            weights |= load_file(file)
        self._model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        self._model.eval()

    def to(self, device: torch.device) -> Self:
        self._model.to(device)
        return self

    @torch.no_grad()
    def wins(self, prompt: Conversation, responses: list[str]) -> Float[Tensor, "responses responses"]:
        count = len(responses)
        orders = list(itertools.permutations(range(count), 2))
        rows = [self._encode(_instruction(prompt), responses[one], responses[other]) for one, other in orders]
        self.cut += len({one for (one, _), row in zip(orders, rows, strict=True) if row.is_cut})
        first_wins = torch.full((count, count), 0.5)
        if orders:
            scores = torch.cat([self._scores(batch) for batch in _batches(rows)]).cpu()
            for (one, other), score in zip(orders, scores, strict=True):
                first_wins[one, other] = torch.sigmoid(score)
        return (first_wins + 1 - first_wins.T) / 2

    def _encode(self, source: str, first: str, second: str) -> MarkedRow:
        prompt, cut_prompt = self._tokens(self.marks[0] + source, self._max_length * 3 // 5)
        room = (self._max_length - len(prompt)) // 2
        one, cut_one = self._tokens(self.marks[1] + first, room)
        other, _ = self._tokens(self.marks[2] + second, room)
        row = MarkedRow([], [], cut_prompt or cut_one)
        for piece, mark in zip((prompt, one, other), self._mark_ids, strict=True):
            row.marks.append(len(row.ids) + piece.index(mark))
            row.ids.extend(piece)
        return row

    def _tokens(self, text: str, length: int) -> tuple[list[int], bool]:
        """Returns at most ``length`` tokens, and whether these are not all."""
        whole = self._tokenizer.encode(text, verbose=False)
        if len(whole) <= length:
            return whole, False
        return self._tokenizer.encode(text, truncation=True, max_length=length), True

    def _scores(self, rows: list[MarkedRow]) -> Float[Tensor, "rows"]:
        device = next(self._model.parameters()).device
        padded = {
            "input_ids": _padded([row.ids for row in rows], self._tokenizer.pad_token_id, device),
            "attention_mask": _padded([[1] * len(row.ids) for row in rows], 0, device),
        }
        states = self._model["pretrained_model"](**padded).last_hidden_state
        places = torch.tensor([row.marks for row in rows], device=device)
        source, one, other = states[torch.arange(len(rows), device=device)[:, None], places].unbind(dim=1)
        return (self._head(source, one) - self._head(source, other)).mean(dim=-1)

    def _head(self, source: Tensor, candidate: Tensor) -> Tensor:
        head: Any = self._model["head_layer"]
        return head["4"](head["2"](head["1"](torch.cat([source, candidate], dim=-1))))


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    return (rows[start : start + ROWS_AT_A_TIME] for start in range(0, len(rows), ROWS_AT_A_TIME))


def _padded(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)


def _instruction(prompt: Conversation) -> str:
    spoken = [message for message in prompt if message["content"]]
    if len(spoken) == 1:
        return spoken[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in spoken)
