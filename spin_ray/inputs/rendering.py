"""Token ids of conversations, by the model's own chat template.

A tokenizer may join prompt and response: ``Assistant:␣`` and ``Yes`` share the token ``␣Yes``. The prompt keeps only
tokens that no response changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from spin_ray.config.sections import ModelConfig
from spin_ray.errors import ModelError, first_line
from spin_ray.inputs.chat_template import ChatTemplate, RenderError
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.guard import Guard, Written, any_of
from spin_ray.inputs.messages import Tools
from spin_ray.learner.tokenizer_file import as_written, open_tokenizer


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a row, as ``apply_chat_template`` gives them, up to the end of the turn."""

    prompt_ids: list[int]
    real_ids: list[int]


class _Parts(NamedTuple):
    prompt: Written
    response: str

    def after(self, end: str) -> Written:
        return Written(end + self.response, self.prompt.set_aside)


class _Guarded(NamedTuple):
    messages: Conversation
    tools: Tools
    names: list[str]


class _Ending(NamedTuple):
    """End of a prompt whose tokens no text before it changes."""

    text: str
    ids: list[int]


class ChatRenderer:
    """Renderer of conversations by a tokenizer's chat template."""

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None, date: datetime | None = None) -> None:
        """Reads the template.

        Args:
            kwargs: variables of the template.
            date: time that the template may write; default: now, then fixed.

        Raises:
            ModelError: the template is missing or unfit for training.
        """
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, kwargs or {}, date or datetime.now())
        self.end_of_turn_id = self.template.end_of_turn_id
        self.end_of_turn = self.template.end_of_turn
        self.writes_end_of_turn = self.template.writes_end_of_turn
        """False if only the tokenizer's end of text ends a turn."""
        self._guard = Guard(tokenizer, self.template.control_tokens)
        self._held_back = self._count_held_back(Written(self.template.prompt))
        self._ending = self._find_ending()

    def render(self, messages: Conversation, tools: Tools = None) -> Rendered:
        """Renders a conversation that ends with a response; raises RenderError."""
        (rendered,) = self.render_all([messages], [tools])
        if isinstance(rendered, RenderError):
            raise rendered
        return rendered

    def render_prompt(self, messages: Conversation) -> list[int]:
        """Renders a conversation without its response; raises RenderError."""
        (ids,) = self.render_prompts([messages])
        if isinstance(ids, RenderError):
            raise ids
        return ids

    def held_back_text(self, messages: Conversation) -> str:
        """Returns the end of the prompt's text whose tokens are left to the response, mostly none.

        Sampled text begins with it.

        Raises:
            RenderError: the conversation cannot be rendered.
        """
        (prompt,) = self._write_prompts([messages], [None])
        if isinstance(prompt, RenderError):
            raise prompt
        held_back = self._held_back_of(prompt)
        if not held_back:
            return ""
        (ids,) = self._guard.encode([prompt])
        if ids is None:
            raise _unspeakable(prompt)
        whole, kept = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[:-held_back]))
        return whole[len(commonprefix([kept, whole])) :]

    def render_prompts(
        self, conversations: Sequence[Conversation], tools: Sequence[Tools] = ()
    ) -> list[list[int] | RenderError]:
        """Renders many prompts; a RenderError replaces one that fails."""
        written = self._write_prompts(conversations, tools)
        ids = iter(self._guard.encode([text for text in written if isinstance(text, Written)]))
        return [text if isinstance(text, RenderError) else self._cut_prompt(text, next(ids)) for text in written]

    def _write_prompts(
        self, conversations: Sequence[Conversation], tools: Sequence[Tools]
    ) -> list[Written | RenderError]:
        guarded = self._set_aside(conversations, tools)
        sound = [each for each in guarded if not isinstance(each, RenderError)]
        found = iter(self.template.write_prompts([each.messages for each in sound], [each.tools for each in sound]))
        return [
            each if isinstance(each, RenderError)
            else text if isinstance(text := next(found), RenderError) else Written(text, each.names)
            for each in guarded
        ]  # fmt: skip

    def _write_all(self, conversations: Sequence[Conversation], tools: Sequence[Tools]) -> list[_Parts | RenderError]:
        guarded = self._set_aside(conversations, tools)
        sound = [each for each in guarded if not isinstance(each, RenderError)]
        found = iter(self.template.write_all([each.messages for each in sound], [each.tools for each in sound]))
        return [
            each if isinstance(each, RenderError)
            else texts if isinstance(texts := next(found), RenderError)
            else _Parts(Written(texts[0], each.names), texts[1])
            for each in guarded
        ]  # fmt: skip

    def _set_aside(self, conversations: Sequence[Conversation], tools: Sequence[Tools]) -> list[_Guarded | RenderError]:
        guarded: list[_Guarded | RenderError] = []
        for messages, offered in zip(conversations, tools or [None] * len(conversations), strict=True):
            try:
                guarded.append(_Guarded(*self._guard.set_aside(self.template.in_its_form(messages), offered)))
            except RenderError as error:
                guarded.append(error)
        return guarded

    def texts(self, messages: Conversation, tools: Tools = None) -> tuple[str, str] | RenderError:
        """Returns the texts of prompt and response, with markers for control tokens' names."""
        (parts,) = self._write_all([messages], [tools])
        return parts if isinstance(parts, RenderError) else (parts.prompt.text, parts.response)

    def render_all(
        self, conversations: Sequence[Conversation], tools: Sequence[Tools] = ()
    ) -> list[Rendered | RenderError]:
        """Renders many conversations; a RenderError replaces one that fails."""
        written = self._write_all(conversations, tools)
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

    def names_control_tokens(self, messages: Conversation, tools: Tools = None) -> bool:
        """Tells whether a message or tool names a control token."""
        return bool(self._guard.set_aside(messages, tools)[2])

    def _ending_of(self, prompt: Written) -> _Ending | None:
        return self._ending if self._ending and prompt.text.endswith(self._ending.text) else None

    def _end_of(self, prompt: Written) -> str:
        ending = self._ending_of(prompt)
        return ending.text if ending else prompt.text

    def _cut_prompt(self, prompt: Written, ids: list[int] | None) -> list[int] | RenderError:
        return _unspeakable(prompt) if ids is None else ids[: len(ids) - self._held_back_of(prompt)]

    def _cut(self, parts: _Parts, prompt: list[int] | None, after: list[int] | None) -> Rendered | RenderError:
        if prompt is None or after is None:
            return _unspeakable(parts.prompt)
        end = prompt
        if ending := self._ending_of(parts.prompt):
            end = ending.ids
            if prompt[-len(end) :] != end:
                return RenderError(f"its tokenizer does not part {ending.text!r} from the text before it")
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
        if self.template.constant and prompt.text.endswith(self.template.constant):
            return self._held_back
        return self._count_held_back(prompt)

    def _count_held_back(self, prompt: Written) -> int:
        alone, *followed = self._guard.encode(
            [prompt, *(Written(prompt.text + response, prompt.set_aside) for response in self.template.responses)]
        )
        assert alone is not None
        return len(alone) - min(len(commonprefix([alone, ids])) for ids in followed if ids is not None)

    def _find_ending(self) -> _Ending | None:
        """Returns the end of every prompt; None if responses are tokenised otherwise behind that end alone."""
        prompt, responses = self.template.prompt, self.template.responses
        found = list(any_of(self.template.added_ids).finditer(prompt))
        starts, ends = [match.start() for match in found], [match.end() for match in found]
        if not starts:
            return None
        text = prompt[starts[-1] :]
        beginnings = [prompt, *(prompt + response for response in responses)]
        behind = [text, *(text + response for response in responses)]
        whole, short = (self._guard.encode([Written(each) for each in texts]) for texts in (beginnings, behind))
        before = len(whole[0] or []) - len(short[0] or [])
        alike = all(long and long[before:] == part for long, part in zip(whole, short, strict=True))
        ending = short[0] or []
        # The mark must be a token here: beside a letter, a ``single_word`` token is text and joins its neighbours.
        parts = ending[:1] == [self.template.added_ids[prompt[starts[-1] : ends[-1]]]]
        return _Ending(text, ending) if parts and alike and self._held_back < len(ending) else None


def _unspeakable(text: Written) -> RenderError:
    return RenderError(f"its text has {text.set_aside[0]}, which this kind of tokenizer takes for the control token")


def open_renderer(folder: str, model: ModelConfig, date: datetime | None = None) -> ChatRenderer:
    """Returns the renderer of a model folder; raises ModelError if it cannot be used."""
    tokenizer = load_tokenizer(folder, model.chat_template, model.trust_remote_code)
    return ChatRenderer(tokenizer, model.chat_template_kwargs, date)


_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tokenization_*.py")
_OF_HUGGING_FACE = ("tokenizer.json", "tokenizer.model")
_TEKKEN_ALONE = (
    "{folder}: has a tokenizer in Mistral's own format alone (tekken.json); convert it once: python -c \"from "
    "transformers.integrations.mistral import convert_tekken_tokenizer as convert; "
    "convert('{folder}/tekken.json').save_pretrained('{folder}')\""
)


def load_tokenizer(path: str, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """Loads the model's tokenizer, with the template of the file ``chat_template`` if given.

    Raises:
        ModelError: a file cannot be read, or the tokenizer loses text or is in Mistral's own format alone.
    """
    if (Path(path) / "tekken.json").is_file() and not any((Path(path) / name).is_file() for name in _OF_HUGGING_FACE):
        raise ModelError(_TEKKEN_ALONE.format(folder=path))
    try:
        tokenizer = open_tokenizer(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises no narrower type
        folder = Path(path)
        if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZERS):
            raise ModelError(
                f"{path}: has no tokenizer (tokenizer.json); copy it from the model that this one was made from"
            ) from error
        raise ModelError(f"{path}: its tokenizer cannot be loaded ({first_line(error)})") from error
    tokenizer = as_written(tokenizer, Path(path))
    if chat_template:
        tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def tokenizer_of(folder: Path, model: ModelConfig) -> Any:
    """Loads the tokenizer in a folder of the run's, with the template there; raises ModelError if it cannot."""
    return load_tokenizer(str(folder), trust_remote_code=model.trust_remote_code)


def read_template(file: str) -> str:
    """Returns the chat template in a file; raises ModelError if it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from error
