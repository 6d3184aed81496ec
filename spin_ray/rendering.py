"""Conversations -> token ids, once, by the model's own chat template.

Two rules keep SPIN exact. The text is tokenised here and nowhere else, so that generation, scoring and training see the
same ids. And text of a user can never become a control token: where a message contains the name of one (say
``<|im_end|>``), that piece is set aside while the template is applied and tokenised as plain text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from spin_ray.conversations import Conversation
from spin_ray.errors import ModelError, first_line
from spin_ray.skeletons import Skeletons
from spin_ray.templates import leaves_texts_alone

# Private-use characters: in no template, and set aside themselves where a text has them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_PROBE = "spin-ray-probe"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one row: the prompt up to where the assistant speaks, the response with its end-of-turn token."""

    prompt_ids: list[int]
    real_ids: list[int]


class _Text(NamedTuple):
    written: str
    """What the template wrote, with a numbered marker for each name that was set aside."""
    set_aside: list[str]


class RenderError(ValueError):
    """The chat template refuses the conversation."""


class ChatRenderer:
    r"""Applies a tokenizer's chat template.

    Example (ChatML): ``[user "hi", assistant "hello"]`` gives prompt
    ``<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n`` and real ``hello<|im_end|>``.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises ModelError if the tokenizer has no chat template, or none that can mark the end of a turn."""
        if not tokenizer.chat_template:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template; "
                "set model.chat_template to a file with one"
            )
        self._tokenizer = tokenizer
        self._marker = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
        added = tokenizer.added_tokens_decoder.items()
        self._added_ids = {str(token): token_id for token_id, token in added if str(token).strip()}
        prompt, tail = self._probe()
        self.end_of_turn_id, self._end_of_turn = self._find_end_of_turn(tail)
        # Added tokens that are neither special nor the template's own (say <think>) are words that data may use.
        control = {str(token) for _, token in added if token.special} | {self._end_of_turn}
        control |= {name for name in self._added_ids if name in prompt}
        guarded = [*control, _OPEN, _CLOSE]
        self._guarded = _any_of(guarded)
        self._guarded_begin = sorted({name[0] for name in guarded if name})
        template = tokenizer.chat_template
        self._skeletons = Skeletons(self._ask) if isinstance(template, str) and leaves_texts_alone(template) else None

    def render(self, messages: Conversation) -> Rendered:
        """Token ids of a conversation whose last message is the assistant's response.

        Raises:
            RenderError: the template refuses it (say, two user messages in a row).
        """
        (rendered,) = self.render_all([messages])
        if isinstance(rendered, RenderError):
            raise rendered
        return rendered

    def render_prompt(self, messages: Conversation) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next: ``prompt_ids`` of ``render``.

        Raises:
            RenderError: the template refuses it.
        """
        aside: list[str] = []
        guarded = [message | {"content": self._guard(message["content"], aside)} for message in messages]
        (prompt,) = self._apply([guarded], add_generation_prompt=True)
        if isinstance(prompt, RenderError):
            raise prompt
        return self._tokenise([_Text(prompt, aside)])[0]

    def render_all(self, conversations: Sequence[Conversation]) -> list[Rendered | RenderError]:
        """The same of many, templated and tokenised in one go; a RenderError stands where the template refuses one."""
        set_aside: list[list[str]] = [[] for _ in conversations]
        guarded = [
            [message | {"content": self._guard(message["content"], aside)} for message in messages]
            for messages, aside in zip(conversations, set_aside, strict=True)
        ]
        written = self._write_all(guarded)
        texts = [
            _Text(text, aside)
            for pair, aside in zip(written, set_aside, strict=True)
            if not isinstance(pair, RenderError)
            for text in pair
        ]
        ids = iter(self._tokenise(texts))
        return [
            pair
            if isinstance(pair, RenderError)
            else Rendered(prompt_ids=next(ids), real_ids=[*next(ids), self.end_of_turn_id])
            for pair in written
        ]

    def _write_all(self, conversations: list[Conversation]) -> list[tuple[str, str] | RenderError]:
        """Prompt and response of each, as the template writes them; it is asked only where roles do not decide that."""
        known = [self._skeletons.write(messages) if self._skeletons else None for messages in conversations]
        unknown = [messages for messages, found in zip(conversations, known, strict=True) if not found]
        prompts = self._apply([messages[:-1] for messages in unknown], add_generation_prompt=True)
        wholes = self._apply(unknown, add_generation_prompt=False)
        asked = (self._split(messages, *texts) for messages, *texts in zip(unknown, prompts, wholes, strict=True))
        return [(found[0], found[1].partition(self._end_of_turn)[0]) if found else next(asked) for found in known]

    def _ask(self, messages: Conversation, add_generation_prompt: bool) -> str | None:
        (text,) = self._apply([messages], add_generation_prompt)
        return None if isinstance(text, RenderError) else text

    def _split(
        self, messages: Conversation, prompt: str | RenderError, whole: str | RenderError
    ) -> tuple[str, str] | RenderError:
        """Prompt, and response without the end-of-turn token, of what the template wrote."""
        if isinstance(prompt, RenderError):
            return prompt
        if isinstance(whole, RenderError):
            return whole
        # A template may rewrite the history once an answer follows; then the answer's own text is the response.
        response = whole[len(prompt) :] if whole.startswith(prompt) else messages[-1]["content"]
        return prompt, response.partition(self._end_of_turn)[0]

    def _guard(self, text: str, set_aside: list[str]) -> str:
        for beginning in self._guarded_begin:
            if beginning in text:
                break
        else:  # most texts, told ten times as fast as by the expression
            return text

        def replace(match: re.Match[str]) -> str:
            set_aside.append(match.group())
            return f"{_OPEN}{len(set_aside) - 1}{_CLOSE}"

        return self._guarded.sub(replace, text)

    def _apply(self, conversations: list[Conversation], add_generation_prompt: bool) -> list[str | RenderError]:
        """One call for all of them, and one for each where the template refuses any."""
        if not conversations:
            return []
        try:
            return self._tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            if len(conversations) == 1:
                return [RenderError(str(error))]
            return [text for each in conversations for text in self._apply([each], add_generation_prompt)]

    def _tokenise(self, texts: list[_Text]) -> list[list[int]]:
        """The template writes its own beginning-of-text token, so none is added."""
        pieces = [self._marker.split(text.written) if text.set_aside else [text.written] for text in texts]
        plain = iter(self._encode([piece for split in pieces for piece in split[::2]]))
        return [
            next(plain)
            if len(split) == 1
            else [
                token
                for position, piece in enumerate(split)
                for token in (self._spell(text.set_aside[int(piece)]) if position % 2 else next(plain))
            ]
            for text, split in zip(texts, pieces, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        backend = self._tokenizer.backend_tokenizer  # transformers' own wrapping costs as much again
        backend.no_truncation()  # all three are left as the call before (``_spell``) or tokenizer.json set them
        backend.no_padding()
        backend.encode_special_tokens = False
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _spell(self, name: str) -> list[int]:
        """Ids of the name of a control token as plain text."""
        ids = self._tokenizer.encode(name, add_special_tokens=False, split_special_tokens=True)
        if self._added_ids.get(name) in ids:  # tokens that are not marked special are not split
            parts = (name[:1], name[1:])
            ids = [token for part in parts for token in self._tokenizer.encode(part, add_special_tokens=False)]
        return ids

    def _probe(self) -> tuple[str, str]:
        """A plain prompt, and what the template writes after an assistant's message."""
        user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
        (prompt,) = self._apply([[user]], add_generation_prompt=True)
        (whole,) = self._apply([[user, assistant]], add_generation_prompt=False)
        for written in (prompt, whole):
            if isinstance(written, RenderError):
                raise ModelError(
                    f"{self._tokenizer.name_or_path}: its chat template fails on a plain exchange ({written})"
                ) from written
        return str(prompt), str(whole).rpartition(_PROBE)[2]

    def _find_end_of_turn(self, tail: str) -> tuple[int, str]:
        """The first added token that the template writes after an assistant's message."""
        found = _any_of(list(self._added_ids)).search(tail)
        if found:
            return self._added_ids[found.group()], found.group()
        if self._tokenizer.eos_token_id is None:
            raise ModelError(
                f"{self._tokenizer.name_or_path}: neither its chat template nor its tokenizer marks the end of a turn"
            )
        return self._tokenizer.eos_token_id, self._tokenizer.eos_token


def _any_of(names: list[str]) -> re.Pattern[str]:
    """Matches the longest of ``names``; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


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
