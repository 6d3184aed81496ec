"""Conversations -> token ids, once, by the model's own chat template.

The ids of prompt and response are those of the whole conversation, cut where the assistant begins to speak. They are
made here and nowhere else, so that generation, scoring, training and serving see the same ones.

A tokenizer may join the end of the prompt to the beginning of the response: after ``Assistant:␣`` the text ``Yes`` is
the one token ``␣Yes``. The cut is then earlier: the prompt keeps only the tokens that no response changes, and the
response begins with the rest. So a model speaks from ids after which it was trained to speak.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import Any, NamedTuple

from jinja2 import TemplateError

from spin_ray.errors import ModelError, first_line
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.guard import Guard, Written, any_of
from spin_ray.inputs.templates import Skeletons

_PROBE = "spin-ray-probe"
_OPENINGS = (
    *ascii_letters, *digits, *punctuation, *"éñßЖяαعא中の한ก😀“«–•",
    "The", "I'm", "In", "Yes,", "No", "To", "Hello!", "Sure", "As an", "Here", "It is", "1.", "10", "2024", "**", "##",
    "```", "- ", "...", "--", "</", "$x$",
)  # fmt: skip
"""Beginnings of responses, to see which tokens of a prompt stay as they are whatever follows."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one row: the prompt up to where the assistant speaks, the response with its end-of-turn token.

    ``prompt_ids + real_ids`` are the ids of the conversation as transformers' ``apply_chat_template`` gives them, up to
    the end of the turn.
    """

    prompt_ids: list[int]
    real_ids: list[int]


class RenderError(ValueError):
    """The conversation cannot be rendered: the template refuses it, or its ids cannot be cut before the response."""


class _Parts(NamedTuple):
    """What the template wrote: all before the response, and the response with what ends it."""

    prompt: Written
    response: str

    def after(self, end: str) -> Written:
        """The response behind ``end``, the end of the prompt or all of it."""
        return Written(end + self.response, self.prompt.set_aside)


class _Ending(NamedTuple):
    """The end of a prompt from its last added token on. Added tokens part a text: what stands before has no say."""

    text: str
    ids: list[int]


class ChatRenderer:
    r"""Applies a tokenizer's chat template.

    Example (ChatML): ``[user "hi", assistant "hello"]`` gives prompt
    ``<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n`` and real ``hello<|im_end|>``.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Reads the template by a few plain exchanges.

        Raises:
            ModelError: there is no chat template, it does not mark the end of a turn, or it asks for an answer with
                other words than those that stand before an answer.
        """
        self._name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise ModelError(
                f"{self._name}: its tokenizer has no chat template; set model.chat_template to a file with one"
            )
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._added_ids = {str(token): token_id for token_id, token in added if str(token).strip()}
        prompt, self._responses = self._probe()
        tail = self._responses[0].rpartition(_PROBE)[2]
        self.end_of_turn_id, self._end_of_turn, self.writes_end_of_turn = self._find_end_of_turn(tail)
        # Added tokens that are neither special nor the template's own (say <think>) are words that data may use.
        control = {str(token) for _, token in added if token.special and str(token)} | {self._end_of_turn}
        control |= {name for name in self._added_ids if name in prompt}
        self._guard = Guard(tokenizer, control)
        self._constant = _common_end(prompt, self._ask([{"role": "user", "content": "x 1."}], True) or "")
        self._held_back = self._count_held_back(Written(prompt))
        self._ending = self._find_ending(prompt)
        self._skeletons = Skeletons.of(tokenizer.chat_template, self._ask)

    def render(self, messages: Conversation) -> Rendered:
        """Returns the token ids of a conversation whose last message is the assistant's response.

        Raises:
            RenderError: the conversation cannot be rendered.
        """
        (rendered,) = self.render_all([messages])
        if isinstance(rendered, RenderError):
            raise rendered
        return rendered

    def render_prompt(self, messages: Conversation) -> list[int]:
        """Returns the token ids of a conversation up to where the assistant speaks: ``prompt_ids`` of ``render``.

        Raises:
            RenderError: the conversation cannot be rendered.
        """
        (ids,) = self.render_prompts([messages])
        if isinstance(ids, RenderError):
            raise ids
        return ids

    def render_prompts(self, conversations: Sequence[Conversation]) -> list[list[int] | RenderError]:
        """Renders many prompts at once; a RenderError stands in the place of one that cannot be rendered."""
        guarded = [self._guard.set_aside(messages) for messages in conversations]
        prompts = self._apply([messages for messages, _ in guarded], add_generation_prompt=True)
        written = [
            prompt if isinstance(prompt, RenderError) else Written(prompt, names)
            for prompt, (_, names) in zip(prompts, guarded, strict=True)
        ]
        ids = iter(self._guard.encode([text for text in written if isinstance(text, Written)]))
        return [text if isinstance(text, RenderError) else self._cut_prompt(text, next(ids)) for text in written]

    def render_all(self, conversations: Sequence[Conversation]) -> list[Rendered | RenderError]:
        """Renders many conversations at once; a RenderError stands in the place of one that cannot be rendered."""
        guarded = [self._guard.set_aside(messages) for messages in conversations]
        written = self._write_all(guarded)
        texts = [
            text
            for parts in written
            if not isinstance(parts, RenderError)
            for text in (parts.prompt, parts.after(self._end_of(parts.prompt)))
        ]
        ids = iter(self._guard.encode(texts))
        return [
            parts if isinstance(parts, RenderError) else self._cut(parts, next(ids), next(ids)) for parts in written
        ]

    def names_control_tokens(self, messages: Conversation) -> bool:
        """Tells whether a message has the name of a control token, which transformers would take for the token."""
        return bool(self._guard.set_aside(messages)[1])

    def _end_of(self, prompt: Written) -> str:
        """The end of ``prompt`` that decides how a response is tokenised: from its last added token on, else all."""
        return self._ending.text if self._ending and prompt.text.endswith(self._ending.text) else prompt.text

    def _cut_prompt(self, prompt: Written, ids: list[int] | None) -> list[int] | RenderError:
        return _unspeakable(prompt) if ids is None else ids[: len(ids) - self._held_back_of(prompt)]

    def _cut(self, parts: _Parts, prompt: list[int] | None, after: list[int] | None) -> Rendered | RenderError:
        """Cuts ``after``, the ids of the prompt's end and the response, where the assistant begins to speak."""
        if prompt is None or after is None:
            return _unspeakable(parts.prompt)
        end = prompt
        if self._ending and parts.prompt.text.endswith(self._ending.text):
            end = self._ending.ids
            if prompt[-len(end) :] != end:
                raise AssertionError(f"{self._name}: an added token does not part the text before it")
        held_back = self._held_back_of(parts.prompt)
        kept = len(end) - held_back
        if after[:kept] != end[:kept]:
            return RenderError(
                f"its tokenizer joins the beginning of the response ({parts.response[:20]!r}) to the end of the prompt "
                f"({parts.prompt.text[-20:]!r}); take away what the response begins with"
            )
        response = after[kept:] if self.writes_end_of_turn else [*after[kept:], self.end_of_turn_id]
        return Rendered(prompt[: len(prompt) - held_back], response)

    def _held_back_of(self, prompt: Written) -> int:
        """Counts the last tokens of ``prompt`` that a response may change; most templates write the same end always."""
        if self._constant and prompt.text.endswith(self._constant):
            return self._held_back
        return self._count_held_back(prompt)

    def _count_held_back(self, prompt: Written) -> int:
        alone, *followed = self._guard.encode(
            [prompt, *(Written(prompt.text + response, prompt.set_aside) for response in self._responses)]
        )
        assert alone is not None
        return len(alone) - min(len(commonprefix([alone, ids])) for ids in followed if ids is not None)

    def _find_ending(self, prompt: str) -> _Ending | None:
        """Returns the end of every prompt from its last added token on, if responses are tokenised alike behind it."""
        starts = [match.start() for match in any_of(self._added_ids).finditer(prompt)]
        if not starts:
            return None
        text = prompt[starts[-1] :]
        beginnings = [prompt, *(prompt + response for response in self._responses)]
        behind = [text, *(text + response for response in self._responses)]
        whole, short = (self._guard.encode([Written(each) for each in texts]) for texts in (beginnings, behind))
        before = len(whole[0] or []) - len(short[0] or [])
        alike = all(long and long[before:] == part for long, part in zip(whole, short, strict=True))
        return _Ending(text, short[0] or []) if alike and self._held_back < len(short[0] or []) else None

    def _write_all(self, guarded: Sequence[tuple[Conversation, list[str]]]) -> list[_Parts | RenderError]:
        """Has the template write each conversation; it is asked only where roles do not decide what it writes."""
        known = [self._skeletons.write(messages) for messages, _ in guarded]
        unknown = [messages for (messages, _), found in zip(guarded, known, strict=True) if not found]
        prompts = self._apply([messages[:-1] for messages in unknown], add_generation_prompt=True)
        wholes = self._apply(unknown, add_generation_prompt=False)
        asked = (_split(*texts) for texts in zip(prompts, wholes, strict=True))
        written = (found or next(asked) for found in known)
        return [
            texts if isinstance(texts, RenderError) else self._end_turn(*texts, names)
            for texts, (_, names) in zip(written, guarded, strict=True)
        ]

    def _end_turn(self, prompt: str, rest: str, names: list[str]) -> _Parts | RenderError:
        """Cuts what the template wrote behind the end of the turn."""
        if not self.writes_end_of_turn:
            return _Parts(Written(prompt, names), rest)
        response, end, _ = rest.partition(self._end_of_turn)
        if not end:
            return RenderError(f"its chat template does not end the response with {self._end_of_turn}")
        return _Parts(Written(prompt, names), response + end)

    def _ask(self, messages: Conversation, add_generation_prompt: bool) -> str | None:
        (text,) = self._apply([messages], add_generation_prompt)
        return None if isinstance(text, RenderError) else text

    def _apply(self, conversations: list[Conversation], add_generation_prompt: bool) -> list[str | RenderError]:
        """Makes one call for all of them, and one for each where the template refuses any."""
        if not conversations:
            return []
        try:
            return self._tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            if len(conversations) == 1:
                return [RenderError(f"the chat template refuses it: {error}")]
            return [text for each in conversations for text in self._apply([each], add_generation_prompt)]

    def _probe(self) -> tuple[str, list[str]]:
        """Returns a plain prompt, and what the template writes behind it for some responses, ``_PROBE`` first."""
        user = {"role": "user", "content": "?"}
        answered = [[user, {"role": "assistant", "content": text}] for text in (_PROBE, *_OPENINGS)]
        (prompt,) = self._apply([[user]], add_generation_prompt=True)
        wholes = self._apply(answered, add_generation_prompt=False)
        for written in (prompt, wholes[0]):
            if isinstance(written, RenderError):
                raise ModelError(f"{self._name}: its chat template fails on a plain exchange ({written})") from written
        texts = [whole for whole in wholes if isinstance(whole, str)]
        if _PROBE not in texts[0]:
            raise ModelError(f"{self._name}: its chat template does not write what the assistant says")
        prompt = str(prompt)
        if not texts[0].startswith(prompt):
            shared = len(commonprefix([prompt, texts[0]]))
            raise ModelError(
                f"{self._name}: its chat template asks for an answer with {prompt[shared:][:60]!r}, where a "
                f"conversation that has one goes on with {texts[0][shared:][:60]!r}; no row can train the model to "
                "speak from there. Set model.chat_template to a file that writes both alike"
            )
        return prompt, [text.removeprefix(prompt) for text in texts if text.startswith(prompt)]

    def _find_end_of_turn(self, tail: str) -> tuple[int, str, bool]:
        """Returns id and name of the first added token that the template writes after an assistant's message.

        Where it writes none, the tokenizer's end of text takes its place, and the third value is False.
        """
        found = any_of(self._added_ids).search(tail)
        if found:
            return self._added_ids[found.group()], found.group(), True
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"{self._name}: neither its chat template nor its tokenizer marks the end of a turn")
        return self._tokenizer.eos_token_id, self._tokenizer.eos_token, False


def _split(prompt: str | RenderError, whole: str | RenderError) -> tuple[str, str] | RenderError:
    """Prompt, and what the template wrote after it."""
    for each in (prompt, whole):
        if isinstance(each, RenderError):
            return each
    prompt, whole = str(prompt), str(whole)
    if not whole.startswith(prompt):
        shared = len(commonprefix([prompt, whole]))
        return RenderError(
            f"the chat template writes {prompt[shared:][:40]!r} when it asks for the answer, and "
            f"{whole[shared:][:40]!r} once the answer follows"
        )
    return prompt, whole.removeprefix(prompt)


def _unspeakable(text: Written) -> RenderError:
    return RenderError(f"its text has {text.set_aside[0]}, which this kind of tokenizer takes for the control token")


def _common_end(one: str, other: str) -> str:
    return commonprefix([one[::-1], other[::-1]])[::-1]


def load_tokenizer(path: str, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, with the chat template of ``chat_template`` (a file) if one is given."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing more specific for a damaged file
        raise ModelError(f"{path}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{chat_template}: cannot be read ({error})") from error
    return tokenizer
