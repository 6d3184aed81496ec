"""lm-eval's models as a run needs them: with the prompts, the ends of turns and the thoughts of its training."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from spin_ray.errors import ConfigError, ModelError
from spin_ray.inputs.ends import named_ends, other_ends
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.inputs.template_variables import TemplateVariables
from spin_ray.inputs.thoughts import MARKS_OF_THOUGHTS, SWITCHES, ends_a_thought, opened_by
from spin_ray.report import harness_warnings
from spin_ray.report.harness_request import Request
from spin_ray.runtime.engine import engine_arguments, platform

ENDPOINT_REQUESTS = 8


class _Thoughts(NamedTuple):
    end: str
    """Mark that ends a thought, e.g. ``</think>``."""
    are_open: bool
    """True: the prompt opens them."""

    def cut_from(self, answer: str) -> str:
        """Returns what is behind the thought, as lm-eval's ``think_end_token`` does."""
        if self.end in answer:
            return answer.rpartition(self.end)[2].lstrip()
        if self.are_open or answer.lstrip().startswith(tuple(MARKS_OF_THOUGHTS)):
            harness_warnings.OURS.warning("an answer has no end of its thought, and is scored whole")
        return answer


def arguments_of(request: Request) -> tuple[str, dict[str, Any]]:
    """Returns the name of lm-eval's model and its arguments."""
    length = {} if request.max_length is None else {"max_length": request.max_length}
    if request.endpoint:
        url = request.endpoint.rstrip("/")
        common = {"model": request.name, "num_concurrent": ENDPOINT_REQUESTS, **length}
        common["base_url"] = f"{url}/{route(request)}"
        if request.chat:
            return "local-chat-completions", common
        # A BOS wherever the tokenizer writes one, as the other backends do by themselves.
        tokenizer = {"tokenizer": request.model, "tokenizer_backend": "huggingface", "add_bos_token": True}
        return "local-completions", common | tokenizer
    common: dict[str, Any] = {
        "pretrained": request.model,
        "dtype": request.dtype,
        "trust_remote_code": request.trust_remote_code,
    }
    if request.chat:  # a template writes all that its prompts have, also the BOS
        common["add_bos_token"] = False
    if request.backend == "hf":  # lm-eval assumes a GPU unless told otherwise
        import torch

        on_gpu = torch.cuda.is_available()
        return "hf", common | length | {"device": "cuda" if on_gpu else "cpu", "batch_size": "auto" if on_gpu else 1}
    arguments = engine_arguments(
        Path(request.model),
        request.engine,
        max_length=request.max_length,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
        on_cpu=platform() == "cpu",
        # The task has all of the engine's GPUs, on its own machine.
        own={"distributed_executor_backend": "mp"} if request.engine.devices > 1 else {},
    )
    del arguments["model"], arguments["max_model_len"]  # by lm-eval's names
    return "vllm", common | length | arguments


def route(request: Request) -> str:
    return "chat/completions" if request.chat else "completions"


def open_model(kind: str, arguments: dict[str, Any], request: Request) -> Any:
    """Opens lm-eval's model, which writes conversations, and ends answers and thoughts, as the run does.

    lm-eval 0.4.13 passes the backend ``vllm`` no ``enable_thinking`` but None (models/vllm_causallms.py).
    """
    from lm_eval.api.registry import get_model

    model: Any = get_model(kind).create_from_arg_obj(arguments)
    tokenizer = load_tokenizer(request.model, trust_remote_code=request.trust_remote_code)
    renderer = _open_renderer(tokenizer, request) if request.chat else None
    thoughts = _thoughts_of(renderer) if renderer else None
    options: dict[str, Any] = {}
    ends: list[int] = []
    if request.endpoint and request.chat:
        model.apply_chat_template = partial(_warn_of_beginning, model.apply_chat_template)
    elif not request.endpoint:
        if renderer:
            model.tokenizer.chat_template = tokenizer.chat_template
            model.apply_chat_template = partial(_write, model.tokenizer, renderer.template.variables)
        ends = _find_ends(request, tokenizer, renderer)
        if kind == "hf":
            _forget_generation_config(model, ends)
            if thoughts:
                _show(thoughts.end, model)
        else:
            options["stop_token_ids"] = ends
    texts = [tokenizer.decode([end], skip_special_tokens=True) for end in ends]
    model.generate_until = partial(_generate, model, model.generate_until, options, texts, thoughts)
    return model


def _open_renderer(tokenizer: Any, request: Request) -> ChatRenderer:
    if request.chat_template is not None:
        tokenizer.chat_template = request.chat_template
    variables = request.variables or TemplateVariables({}, datetime.now())
    return ChatRenderer(tokenizer, variables.kwargs, variables.date)


def _find_ends(request: Request, tokenizer: Any, renderer: ChatRenderer | None) -> list[int]:
    """Returns the ids at which the run's own generation ends an answer.

    Without a chat they are the folder's and, if there is a template, its end of turn. θ_1's folder names that end
    (``name_end``), and the start's may not; the task is to be the same for both.
    """
    folder = Path(request.model)
    if renderer is not None:
        return [renderer.end_of_turn_id, *other_ends(folder, renderer)]
    try:
        end_of_turn = {_open_renderer(tokenizer, request).end_of_turn_id}
    except ModelError:
        end_of_turn = set()
    return sorted(named_ends(folder, tokenizer) | end_of_turn)


def _forget_generation_config(model: Any, ends: list[int]) -> None:
    """Takes a folder's penalties and other settings of generation away, which neither vLLM nor the run heed.

    A task that samples draws from all tokens, unless it has a ``top_k``; transformers' own default is 50.
    """
    from transformers import GenerationConfig

    tokenizer = model.tokenizer
    model.model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id, top_k=0
    )


def _thoughts_of(renderer: ChatRenderer) -> _Thoughts | None:
    """Returns the thoughts that the template provides for; None if it does not, or the recipe switches them off."""
    template = renderer.template
    if any(template.variables.kwargs.get(name) is False for name in SWITCHES):
        return None
    opened = opened_by(template.prompt)
    end = opened[1] if opened else ends_a_thought(template.source)
    return _Thoughts(end, opened is not None) if end else None


def _show(mark: str, model: Any) -> None:
    """Keeps ``mark`` in the answers of lm-eval's model ``hf``, which leaves special tokens out."""
    decode, [*ids] = model.tok_decode, model.tokenizer.encode(mark, add_special_tokens=False)

    def decode_all(tokens: Any, skip_special_tokens: bool = True) -> str:
        if not (skip_special_tokens and len(ids) == 1 and isinstance(tokens, list) and ids[0] in tokens):
            return decode(tokens, skip_special_tokens=skip_special_tokens)
        last = len(tokens) - tokens[::-1].index(ids[0])
        return mark.join(decode(part) for part in (tokens[: last - 1], tokens[last:]))

    model.tok_decode = decode_all


def _write(
    tokenizer: Any, variables: TemplateVariables, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """Writes a conversation; as lm-eval does, without its system message where the template refuses one."""

    def write(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **variables.arguments(tokenizer),
        )

    try:
        return write(messages)
    except TemplateError:
        harness_warnings.OURS.warning("the chat template refuses the system message, which is left out")
        return write([message for message in messages if message["role"] != "system"])


def _warn_of_beginning(write: Any, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
    if not add_generation_prompt:
        harness_warnings.OURS.warning(
            "the task begins the answer (gen_prefix): spin-ray serve goes on with it, another server may begin anew"
        )
    return write(messages, add_generation_prompt=add_generation_prompt)


def _generate(
    model: Any,
    generate: Any,
    options: dict[str, Any],
    ends: list[str],
    thoughts: _Thoughts | None,
    requests: Sequence[Any],
    disable_tqdm: bool = False,
) -> list[str]:
    """Generates answers with ``options``; cuts them at ``ends`` and at all of their task's strings ``until``.

    lm-eval leaves that to an endpoint, and a chat endpoint gets four strings at most. A model that thinks gets none,
    because they must not end a thought. lm-eval's backend ``hf`` would send them all the same.
    """
    if model.tokenizer is not None:  # a chat endpoint counts tokens itself
        _check_lengths(model, requests)
    untils = [_until(request.args[1]) for request in requests]
    more = options | ({"until": []} if thoughts else {})
    asked = []
    for request in requests:
        prompt, given, *others = request.args
        asked.append(replace(request, arguments=(prompt, given | more, *others)))
    answers = generate(asked, disable_tqdm=disable_tqdm)
    if thoughts:
        answers = [thoughts.cut_from(answer) for answer in answers]
    return [_cut(answer, [*ends, *until]) for answer, until in zip(answers, untils, strict=True)]


def _until(given: dict[str, Any]) -> list[str]:
    until = given.get("until") or []
    return [until] if isinstance(until, str) else until


def _cut(answer: str, ends: Iterable[str]) -> str:
    for end in ends:
        answer = answer.partition(end)[0] if end else answer
    return answer


def _check_lengths(model: Any, requests: Sequence[Any]) -> None:
    """Warns of an endpoint's prompts that lm-eval cuts: it looks for them when they are cut already (0.4.13).

    Raises:
        ConfigError: a task's answers leave no room for a prompt. lm-eval would cut it anywhere.
    """
    of_endpoint = not hasattr(model, "max_gen_toks")
    for request in requests:
        prompt, given = request.args[:2]
        most = _longest_answer(model, given)
        room = model.max_length - most
        if room <= 0:
            raise ConfigError(
                f"--tasks {request.task_name}: asks for answers of {most} tokens (max_gen_toks), which leave no room "
                f"for a question within {model.max_length} tokens; give a longer --max-length"
            )
        if of_endpoint and (length := len(model.tok_encode(prompt))) > room:
            harness_warnings.OURS.warning("prompt (%d tokens) exceeds %d; its beginning is cut off", length, room)


def _longest_answer(model: Any, given: dict[str, Any]) -> int:
    if not hasattr(model, "max_gen_toks"):  # what lm-eval heeds at an endpoint
        return given.get("max_gen_toks", model._max_gen_toks)
    from lm_eval.models.utils import normalize_gen_kwargs

    return normalize_gen_kwargs(given, model.max_gen_toks)["max_gen_toks"]
