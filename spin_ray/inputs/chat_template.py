"""Texts of prompt and response, by the chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from os.path import commonprefix
from string import ascii_letters, digits, punctuation
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from spin_ray.errors import ModelError
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.guard import any_of
from spin_ray.inputs.left_out import TOOLS_LOST, LeftOut
from spin_ray.inputs.messages import REASONING, Tools
from spin_ray.inputs.template_variables import TemplateVariables
from spin_ray.inputs.templates import Skeletons
from spin_ray.inputs.thoughts import MARKS_OF_THOUGHTS, SWITCHES, Opening, ends_a_thought, opening_of, parts_around

_PROBE = "spin-ray-probe"
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_CALL = {"name": "f", "arguments": {"x": "y"}}
_OPENINGS = (
    *ascii_letters, *digits, *punctuation, *"éñßЖяαعא中の한ก😀“«–•",
    "The", "I'm", "In", "Yes,", "No", "To", "Hello!", "Sure", "As an", "Here", "It is", "1.", "10", "2024", "**", "##",
    "```", "- ", "...", "--", "</", "$x$",
)  # fmt: skip
"""Beginnings of responses, to find the prompt tokens that a response may change."""


class RenderError(ValueError):
    """Failure to render a conversation."""


class ChatTemplate:
    """A tokenizer's chat template, explored by rendering short conversations."""

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any], date: datetime) -> None:
        """Explores the template.

        Args:
            kwargs: variables of the template.
            date: date that the template writes.

        Raises:
            ModelError: the template is missing, broken or unfit for training.
        """
        self._name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise ModelError(
                f"{self._name}: its tokenizer has no chat template; set model.chat_template to a file with one"
            )
        self._tokenizer, self.variables = tokenizer, TemplateVariables(dict(kwargs), date)
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:  # several templates, none of them the default
            raise ModelError(
                f"{self._name}: has multiple chat templates with no default ("
                f"{', '.join(sorted(tokenizer.chat_template))}); set model.chat_template to a file with one of them"
            ) from error
        if getattr(tokenizer, "split_special_tokens", False):
            raise ModelError(
                f"{self._name}: its tokenizer_config.json has split_special_tokens, by which the control tokens of the "
                "chat template are text; take it out"
            )
        self._refuse_unread_kwargs()
        self._written_keys: dict[tuple[str, str], bool] = {}
        self._takes_parsed_arguments: bool | None = None
        self._left_out = LeftOut(self.ask)
        self._key_of_thoughts = REASONING[0]
        self._key_of_thoughts = self._find_key_of_thoughts()
        added = tokenizer.added_tokens_decoder.items()
        self.added_ids = {str(token): token_id for token_id, token in added if str(token).strip()}
        self.opening: Opening | None = None
        """Thought that the prompt opens but a whole conversation lacks, as in DeepSeek R1's template."""
        self._needed_thought: Opening | None = None
        """Thought that the prompt opens, and an answer without one ends otherwise, as in Nemotron 3's template."""
        self.prompt, self.responses = self._probe()
        """A short prompt, and texts that may follow it."""
        tail = self.responses[0].rpartition(_PROBE)[2]
        self.end_of_turn_id, self.end_of_turn, self.writes_end_of_turn = self._find_end_of_turn(tail)
        # Data may use the other added tokens as words: those neither special nor written by the template. Thoughts in
        # texts are meant as such, wherever the template writes their marks itself: it must see them, to place them.
        control = {str(token) for _, token in added if token.special and str(token)} | {self.end_of_turn}
        own = {name for name in self.added_ids if name in self.prompt}
        self.control_tokens = control | (own - MARKS_OF_THOUGHTS)
        """Names of tokens that a message must not produce."""
        other = self.ask([{"role": "user", "content": "x 1."}], True) or ""
        self.constant = commonprefix([self.prompt[::-1], other[::-1]])[::-1]
        """Text with which most prompts end."""
        self._skeletons = Skeletons.of(self.source, self.ask)

    def write_prompts(self, conversations: Sequence[Conversation], tools: Sequence[Tools]) -> list[str | RenderError]:
        """Writes conversations up to where the assistant speaks."""
        written = self._apply(list(conversations), True, tools)
        lacks = [self._find_unwritten(*each, True) for each in zip(conversations, tools, strict=True)]
        return [lack or text for lack, text in zip(lacks, written, strict=True)]

    def write_all(
        self, conversations: Sequence[Conversation], tools: Sequence[Tools]
    ) -> list[tuple[str, str] | RenderError]:
        """Writes prompt and response of each conversation; runs the template only if no skeleton is known."""
        given = list(zip(conversations, tools, strict=True))
        if self.opening:
            return self._write_opened(self.opening, given)
        known = [
            self._find_unwritten(messages, offered, False) or (None if offered else self._skeletons.write(messages))
            for messages, offered in given
        ]
        unknown = [messages for messages, found in zip(conversations, known, strict=True) if not found]
        offers = [offered for offered, found in zip(tools, known, strict=True) if not found]
        prompts = self._apply([messages[:-1] for messages in unknown], True, offers)
        wholes = self._apply(unknown, False, offers)
        asked = (self._part(*texts) for texts in zip(prompts, wholes, strict=True))
        written = [found or next(asked) for found in known]
        return [
            texts if isinstance(texts, RenderError) else self._end_turn(*texts, messages[-1])
            for texts, messages in zip(written, conversations, strict=True)
        ]

    def _part(self, prompt: str | RenderError, whole: str | RenderError) -> tuple[str, str] | RenderError:
        texts, opening = _split(prompt, whole), self._needed_thought
        if opening and isinstance(texts, RenderError) and isinstance(prompt, str) and isinstance(whole, str):
            ended = whole.removeprefix(prompt.removesuffix(opening.text) + opening.mark).lstrip()
            return _without_thought(opening) if ended.startswith(opening.end) else texts
        return texts

    def _write_opened(
        self, opening: Opening, given: list[tuple[Conversation, Tools]]
    ) -> list[tuple[str, str] | RenderError]:
        """Renders a placeholder for the response, because the template would cut the thought out of the response."""
        marked = [
            [*messages[:-1], {key: value for key, value in messages[-1].items() if key != "reasoning_content"}]
            for messages, _ in given
        ]
        for messages in marked:
            messages[-1]["content"] = _PROBE
        offers = [offered for _, offered in given]
        prompts = self._apply([messages[:-1] for messages in marked], True, offers)
        wholes = self._apply(marked, False, offers)
        lacks = [self._find_unwritten(*each, False) for each in zip(marked, offers, strict=True)]
        return [
            lack or self._go_on(opening, prompt, whole, messages[-1])
            for lack, prompt, whole, (messages, _) in zip(lacks, prompts, wholes, given, strict=True)
        ]

    def _go_on(
        self, opening: Opening, prompt: str | RenderError, whole: str | RenderError, said: Mapping[str, Any]
    ) -> tuple[str, str] | RenderError:
        rest = opening.rest_of(said)
        if rest is None:
            return _without_thought(opening)
        if isinstance(prompt, str) and isinstance(whole, str):
            before, _, tail = whole.rpartition(_PROBE)
            if before + opening.text == prompt:
                return self._end_turn(prompt, rest + tail, said)
        found = _split(prompt, whole)
        return found if isinstance(found, RenderError) else RenderError("its chat template writes two prompts")

    def ids(self, messages: Conversation, tools: Tools) -> list[int]:
        """Returns transformers' token ids of a whole conversation, including the opened thought."""
        if self.opening:
            (texts,) = self.write_all([messages], [tools])
            return [] if isinstance(texts, RenderError) else self._encode("".join(texts))
        named = self._with_named_thoughts(messages)
        arguments = self.variables.arguments(self._tokenizer, tools)
        found = self._tokenizer.apply_chat_template(named, tools=tools, return_dict=True, **arguments)
        return list(found["input_ids"])

    def _find_key_of_thoughts(self) -> str:
        """Returns the message key whose thought the template writes, e.g. ``thinking`` for gpt-oss."""
        default = REASONING[0]
        if self.names(default):
            return default
        asked = {"role": "user", "content": "?"}
        for key in REASONING:
            text = (
                self.ask([asked, {"role": "assistant", "content": "!", key: _PROBE}], False) if self.names(key) else ""
            )
            if _PROBE in (text or ""):
                return key
        return default

    def _with_named_thoughts(self, messages: Conversation) -> Conversation:
        """Gives thoughts the key that the template reads."""
        named = self._key_of_thoughts
        if named == REASONING[0] or not any(REASONING[0] in message for message in messages):
            return messages
        return [
            {(named if key == REASONING[0] else key): value for key, value in message.items()} for message in messages
        ]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def in_its_form(self, messages: Conversation) -> Conversation:
        """Drops empty keys; writes tool-call arguments as the template takes them, parsed or as JSON text."""
        for message in messages:
            if len(message) != 2:
                break
        else:  # most conversations; all() would be slower
            return messages
        shown: Conversation = [
            {key: value for key, value in message.items() if value or key in ("role", "content")}
            for message in messages
        ]
        for message in shown:
            if "tool_calls" in message:
                if not isinstance(message["tool_calls"], list):
                    raise RenderError("tool_calls: expected a list")
                message["tool_calls"] = [self._call_in_its_form(call) for call in message["tool_calls"]]
        return shown

    def _call_in_its_form(self, call: Any) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RenderError("tool_calls: a call needs a function with a name")
        arguments = function.get("arguments")
        if self._takes_parsed_arguments is None:
            self._takes_parsed_arguments = self._try_parsed_arguments()
        if self._takes_parsed_arguments and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except ValueError:
                raise RenderError(f"tool_calls: the arguments of {function['name']} are not JSON") from None
        elif not self._takes_parsed_arguments and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = function | {"arguments": arguments}
        return call | {"function": function} if "function" in call else function

    def _try_parsed_arguments(self) -> bool:
        function = {"name": _PROBE, "arguments": {"x": "y"}}
        call = {"id": "call00000", "type": "function", "function": function}
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return self.ask(asked, False) is not None

    def _find_unwritten(self, messages: Conversation, tools: Tools, add_generation_prompt: bool) -> RenderError | None:
        """Returns an error for content that the template would drop."""
        if tools and not self.names("tools"):
            return RenderError(TOOLS_LOST)
        for message in messages:
            for key in message if len(message) > 2 else ():
                named = self._key_of_thoughts if key == REASONING[0] else key
                if key in ("tool_calls", REASONING[0]) and not self.names(named):
                    return RenderError(f"a message has {key}, which its chat template does not write")
        lost = self._left_out.find(messages, tools, add_generation_prompt)
        return RenderError(lost) if lost else None

    def leaves_out(self, messages: Conversation) -> list[str]:
        """Returns which of ``name`` and ``tool_call_id`` the template does not write."""
        return [
            key
            for key in ("name", "tool_call_id")
            if any(message.get(key) and not self._writes_key(message["role"], key) for message in messages)
        ]

    def _writes_key(self, role: str, key: str) -> bool:
        if (role, key) not in self._written_keys:
            user, called = {"role": "user", "content": "?"}, {"type": "function", "function": _CALL}
            before = {
                "assistant": [user],
                "tool": [user, {"role": "assistant", "content": "", "tool_calls": [called]}],
            }
            text = self.ask([*before.get(role, []), {"role": role, "content": "!", key: _PROBE}], False)
            self._written_keys[role, key] = text is None or _PROBE in text
        return self._written_keys[role, key]

    def names(self, word: str) -> bool:
        """Tells whether a template of the tokenizer contains ``word``."""
        templates = self._tokenizer.chat_template
        sources = templates.values() if isinstance(templates, dict) else [self.source]
        return any(re.search(rf"\b{re.escape(word)}\b", source) for source in sources)

    def _refuse_unread_kwargs(self) -> None:
        for name in self.variables.kwargs:
            if not self.names(name):
                raise ModelError(f"model.chat_template_kwargs.{name}: the chat template does not read it; take it out")

    def _end_turn(self, prompt: str, rest: str, said: Mapping[str, Any]) -> tuple[str, str] | RenderError:
        if lost := _lost_thought(rest, said):
            return lost
        if not self.writes_end_of_turn:
            return prompt, rest
        response, end, _ = rest.partition(self.end_of_turn)
        if not end:
            return RenderError(f"its chat template does not end the response with {self.end_of_turn}")
        return prompt, response + end

    def ask(
        self,
        messages: Conversation,
        add_generation_prompt: bool,
        tools: Tools = None,
        variables: Mapping[str, Any] = _NOTHING,
    ) -> str | None:
        """Returns the rendered text; None if the template refuses."""
        (text,) = self._apply([messages], add_generation_prompt, [tools], variables)
        return None if isinstance(text, RenderError) else text

    def changed_by(self, messages: Conversation, tools: Tools, variables: Mapping[str, Any]) -> str | None:
        """Returns the first of ``variables`` with which the text would differ; None if it would with none."""

        def texts(more: Mapping[str, Any]) -> list[str | None]:
            return [self.ask(messages[:-1], True, tools, more), self.ask(messages, False, tools, more)]

        read = {name: value for name, value in variables.items() if self.names(name)}
        if not read or texts(read) == (usual := texts(_NOTHING)):
            return None
        return next((name for name, value in read.items() if texts({name: value}) != usual), next(iter(read)))

    def marks_between_turns(self) -> set[str]:
        """Returns the added tokens that the template writes between messages."""
        said = [{"role": role, "content": _PROBE} for role in ("user", "assistant", "user")]
        between = (self.ask(said, False) or "").split(_PROBE)[1:-1]
        return {name for name in self.added_ids if any(name in text for text in between)}

    def _apply(
        self,
        conversations: list[Conversation],
        add_generation_prompt: bool,
        tools: Sequence[Tools] = (),
        more: Mapping[str, Any] = _NOTHING,
    ) -> list[str | RenderError]:
        if not conversations:
            return []
        offers = list(tools) or [None] * len(conversations)
        if len(conversations) > 1 and any(offers):
            each = zip(conversations, offers, strict=True)
            return [text for one, offer in each for text in self._apply([one], add_generation_prompt, [offer], more)]
        offered, named = offers[0] or None, [self._with_named_thoughts(each) for each in conversations]
        arguments = self.variables.arguments(self._tokenizer, offered, more)
        try:
            return self._tokenizer.apply_chat_template(
                named, tools=offered, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
            )
        except Exception as error:  # a template may raise anything
            if len(conversations) == 1:
                said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
                return [RenderError(f"the chat template refuses it: {said}")]
            return [text for each in conversations for text in self._apply([each], add_generation_prompt, more=more)]

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
        opening = opening_of(prompt)
        if opening and texts[0].startswith(prompt.removesuffix(opening.text) + _PROBE):
            self.opening, before = opening, prompt.removesuffix(opening.text)
            return prompt, [text.removeprefix(before) for text in texts if text.startswith(before)]
        if not texts[0].startswith(prompt) and opening:
            texts = self._probe_thoughts(user, opening, prompt) or texts
        if not texts[0].startswith(prompt):
            shared = len(commonprefix([prompt, texts[0]]))
            raise ModelError(
                f"{self._name}: its chat template asks for an answer with {prompt[shared:][:60]!r}, where a "
                f"conversation that has one goes on with {texts[0][shared:][:60]!r}; no row can train the model to "
                f"speak from there. {self._cure()}"
            )
        return prompt, [text.removeprefix(prompt) for text in texts if text.startswith(prompt)]

    def _probe_thoughts(self, user: dict[str, Any], opening: Opening, prompt: str) -> list[str]:
        """Returns whole exchanges with a thought; nothing if they do not begin with the prompt either."""
        thinking = [
            [user, {"role": "assistant", "content": _PROBE, "reasoning_content": text}] for text in (_PROBE, *_OPENINGS)
        ]
        texts = [whole for whole in self._apply(thinking, add_generation_prompt=False) if isinstance(whole, str)]
        if not texts or not texts[0].startswith(prompt) or texts[0].count(_PROBE) != 2:
            return []
        self._needed_thought = opening
        return texts

    def _cure(self) -> str:
        user = {"role": "user", "content": "?"}
        exchange = [user, {"role": "assistant", "content": _PROBE}]
        switches = [(name, value) for name in SWITCHES if self.names(name) for value in (False, True)]
        for name, value in switches:
            if self.would_write(exchange, None, {name: value}):
                return (
                    f"Set model.chat_template_kwargs: {{{name}: {str(value).lower()}}}, or model.chat_template to a "
                    "file that writes both alike"
                )
        return "Set model.chat_template to a file that writes both alike"

    def would_write(self, messages: Conversation, tools: Tools, kwargs: Mapping[str, Any]) -> bool:
        """Tells whether the conversation could be trained on with other template variables."""
        given, left_out = self.variables, self._left_out
        self.variables, self._left_out = replace(given, kwargs={**given.kwargs, **kwargs}), LeftOut(self.ask)
        try:
            said = self.in_its_form(messages)
            if self._find_unwritten(said, tools, False):
                return False
            texts = _split(*self._apply([said[:-1]], True, [tools]), *self._apply([said], False, [tools]))
        except RenderError:
            return False
        finally:
            self.variables, self._left_out = given, left_out
        return not isinstance(texts, RenderError) and _lost_thought(texts[1], said[-1]) is None

    def _find_end_of_turn(self, tail: str) -> tuple[int, str, bool]:
        found = any_of(self.added_ids).search(tail)
        if found:
            return self.added_ids[found.group()], found.group(), True
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"{self._name}: neither its chat template nor its tokenizer marks the end of a turn")
        return self._tokenizer.eos_token_id, self._tokenizer.eos_token, False


def _lost_thought(rest: str, said: Mapping[str, Any]) -> RenderError | None:
    """Returns an error if ``rest``, which follows the prompt, lacks a thought of the response."""
    end_of_thought = ends_a_thought(said.get("content") or "")
    if end_of_thought and end_of_thought not in rest:
        return RenderError(
            f"its chat template takes the thought that ends with {end_of_thought} out of the response; set "
            "model.chat_template to a file that keeps it"
        )
    if end_of_thought and not all(part in rest for part in parts_around(end_of_thought, said["content"])):
        return RenderError(f"its chat template leaves out part of the response, around {end_of_thought}")
    thought = said.get("reasoning_content")
    if isinstance(thought, str) and thought.strip() not in rest:
        return RenderError("its chat template leaves reasoning_content out of the response")
    return None


def _without_thought(opening: Opening) -> RenderError:
    return RenderError(
        f"its prompt opens a thought by {opening.text!r}, and the response has none that ends with {opening.end}; add "
        f"the thoughts to the data, or set model.chat_template to a file without {opening.mark}"
    )


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
