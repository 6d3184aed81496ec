"""Conversations -> text of prompt and response, by the chat template."""

from collections.abc import Sequence
from os.path import commonprefix
from string import ascii_letters, digits, punctuation
from typing import Any

from jinja2 import TemplateError

from spin_ray.errors import ModelError
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.guard import any_of
from spin_ray.inputs.templates import Skeletons

_PROBE = "spin-ray-probe"
_OPENINGS = (
    *ascii_letters, *digits, *punctuation, *"éñßЖяαعא中の한ก😀“«–•",
    "The", "I'm", "In", "Yes,", "No", "To", "Hello!", "Sure", "As an", "Here", "It is", "1.", "10", "2024", "**", "##",
    "```", "- ", "...", "--", "</", "$x$",
)  # fmt: skip
"""Beginnings of responses, to find the prompt tokens that no response changes."""


class RenderError(ValueError):
    """A conversation that the template refuses or that cannot be cut."""


class ChatTemplate:
    """A tokenizer's chat template, read by a few plain exchanges."""

    def __init__(self, tokenizer: Any) -> None:
        """Reads the template.

        Raises:
            ModelError: it is missing, broken, or cannot be trained on.
        """
        self._name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise ModelError(
                f"{self._name}: its tokenizer has no chat template; set model.chat_template to a file with one"
            )
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.added_ids = {str(token): token_id for token_id, token in added if str(token).strip()}
        """Ids of the added tokens that are no blanks."""
        self.prompt, self.responses = self._probe()
        """A plain prompt, and the texts that follow it for many responses."""
        tail = self.responses[0].rpartition(_PROBE)[2]
        self.end_of_turn_id, self.end_of_turn, self.writes_end_of_turn = self._find_end_of_turn(tail)
        # Added tokens that are neither special nor the template's own (say <think>) are words that data may use.
        control = {str(token) for _, token in added if token.special and str(token)} | {self.end_of_turn}
        self.control_tokens = control | {name for name in self.added_ids if name in self.prompt}
        """Names of the tokens that no message may make."""
        other = self._ask([{"role": "user", "content": "x 1."}], True) or ""
        self.constant = commonprefix([self.prompt[::-1], other[::-1]])[::-1]
        """The end that most prompts have."""
        self._skeletons = Skeletons.of(tokenizer.chat_template, self._ask)

    def write_prompts(self, conversations: Sequence[Conversation]) -> list[str | RenderError]:
        """Writes each conversation up to where the assistant speaks."""
        return self._apply(list(conversations), add_generation_prompt=True)

    def write_all(self, conversations: Sequence[Conversation]) -> list[tuple[str, str] | RenderError]:
        """Writes prompt and response of each conversation; runs the template only where roles do not suffice."""
        known = [self._skeletons.write(messages) for messages in conversations]
        unknown = [messages for messages, found in zip(conversations, known, strict=True) if not found]
        prompts = self._apply([messages[:-1] for messages in unknown], add_generation_prompt=True)
        wholes = self._apply(unknown, add_generation_prompt=False)
        asked = (_split(*texts) for texts in zip(prompts, wholes, strict=True))
        written = [found or next(asked) for found in known]
        return [texts if isinstance(texts, RenderError) else self._end_turn(*texts) for texts in written]

    def _end_turn(self, prompt: str, rest: str) -> tuple[str, str] | RenderError:
        if not self.writes_end_of_turn:
            return prompt, rest
        response, end, _ = rest.partition(self.end_of_turn)
        if not end:
            return RenderError(f"its chat template does not end the response with {self.end_of_turn}")
        return prompt, response + end

    def _ask(self, messages: Conversation, add_generation_prompt: bool) -> str | None:
        (text,) = self._apply([messages], add_generation_prompt)
        return None if isinstance(text, RenderError) else text

    def _apply(self, conversations: list[Conversation], add_generation_prompt: bool) -> list[str | RenderError]:
        """Runs the template once, or for each conversation if it refuses one."""
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
        """Returns id and name of the first added token behind a message, and True; else the end of text and False."""
        found = any_of(self.added_ids).search(tail)
        if found:
            return self.added_ids[found.group()], found.group(), True
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"{self._name}: neither its chat template nor its tokenizer marks the end of a turn")
        return self._tokenizer.eos_token_id, self._tokenizer.eos_token, False


def _split(prompt: str | RenderError, whole: str | RenderError) -> tuple[str, str] | RenderError:
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
