"""A vLLM engine of one iterate, or of a frozen model and the adapters of all iterates.

Unlike ``ray.serve.llm``, it checks files first and renders conversations as in training.
"""

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ServingConfig
from spin_ray.errors import RunDirError
from spin_ray.inputs.ends import other_ends
from spin_ray.inputs.model_folder import open_unchanged
from spin_ray.inputs.rendering import RenderError, open_renderer
from spin_ray.learner.weights import layer_names
from spin_ray.run_dir.run_dir import open_run
from spin_ray.runtime import cpu
from spin_ray.runtime.engine import engine_arguments, lora_arguments, vllm_environment
from spin_ray.runtime.garbage import collect_as_usual
from spin_ray.runtime.gpu import check_triton
from spin_ray.runtime.root_cause import cause_since, end_of, output_sizes, root_cause_told
from spin_ray.runtime.shared_cards import alone_on_card
from spin_ray.serving.bodies import MAX_TOP_LOGPROBS
from spin_ray.serving.bursts import in_bursts
from spin_ray.serving.deaths import leave_cause
from spin_ray.serving.engines import CHAT, COMPLETION, DOWN_RETRY_S, ENGINE_DIED, TOKENS, Item
from spin_ray.serving.held_back import without_held_back
from spin_ray.serving.iterates import Iterate, open_iterate
from spin_ray.serving.openai_form import Change, changed, likeliest, nothing_generated

MOST_ADAPTERS = 8
"""Most adapters in one batch; vLLM reserves device memory for each."""
TOO_LONG = "context_length_exceeded"
"""OpenAI's code, at which clients shorten what they send."""
_WATCH_S = 0.2
_LAST_WORDS_S = 0.3
"""Seconds that the replica outlives vLLM's engine, so that running requests get their error."""
_LAST_OUTPUT_S = 5.0
"""Seconds before the end of vLLM's engine in whose output its cause is sought: earlier errors were none."""


class LocalFolder(CallbackBase):
    """A callback that keeps Ray from starting a worker to find the model."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class PromptError(RenderError):
    """A prompt that vLLM must not see; ``param`` is the request's field, ``name`` OpenAI's code of the error."""

    def __init__(self, param: str, message: str, name: str | None = None) -> None:
        super().__init__(f"{param}: {message}")
        self.param, self.name = param, name


class _Chat(ChatCompletionRequest):
    """A conversation with its token ids."""

    prompt_ids: list[int]


class _Completion(CompletionRequest):
    """A completion whose ``max_tokens`` is lowered to what fits after each prompt."""

    def build_tok_params(self, model_config: Any) -> Any:
        """Hides ``max_tokens`` from vLLM's check of prompts, which refuses what does not fit; vLLM lowers it later."""
        return CompletionRequest.build_tok_params(self.model_copy(update={"max_tokens": None}), model_config)


class IterateEngine(LLMServer):
    async def __init__(self, llm_config: LLMConfig, iterate: Iterate, config: SpinConfig, run_folder: str) -> None:
        self._iterate, self._config = await asyncio.to_thread(iterate.here), config
        self._run_folder, self._loading = run_folder, asyncio.Lock()
        await super().__init__(llm_config, engine_cls=None if config.serving.resources.gpus else _cpu_engine())

    async def start(self) -> None:
        """Starts the engine.

        Raises:
            ConfigError: the node lacks tools that GPUs need.
            RunDirError: the folder has changed since it was checked.
        """
        cpu.prepare(self._config.serving.resources.threads)
        if self._config.serving.resources.gpus:
            check_triton("serving.resources.gpus")
        folder, model = self._iterate.folder, self._config.model
        # The keeper checked in another process, perhaps on another machine; vLLM loads these bytes.
        found = open_unchanged(folder, self._iterate.name, trust_remote_code=model.trust_remote_code)
        if found.digest != self._iterate.digest:
            raise RunDirError(f"{folder}: changed after it was checked; restore it")
        self._renderer = open_renderer(str(folder), model, self._iterate.date)
        self._stops = [self._renderer.end_of_turn_id, *other_ends(folder, self._renderer)]
        async with self._alone_on_card():
            with root_cause_told():
                await super().start()
        engine: Any = self.engine  # private, but the only way to the renderer
        self._client = engine._engine_client
        self._vocabulary = self._client.model_config.get_vocab_size()
        self._watching = asyncio.get_running_loop().create_task(self._end_with_the_engine())
        engine._oai_serving_chat.online_renderer.render_chat = self._render_chat
        collect_as_usual()

    async def _start_engine(self) -> None:
        """Starts the engine without Ray's telemetry: each would wait for an actor that imports torch first."""
        engine: Any = self.engine
        await engine.start()

    @asynccontextmanager
    async def _alone_on_card(self) -> AsyncGenerator[None]:
        serving = self._config.serving
        with ExitStack() as held:
            alone = alone_on_card(serving.resources.gpus, "serving", serving.start_timeout_s)
            await asyncio.to_thread(held.enter_context, alone)
            yield

    async def _end_with_the_engine(self) -> None:
        """Ends this process after vLLM's engine has died: Ray Serve then starts another at once.

        The keeper finds why the engine died.
        """
        processes = list[BaseProcess]()
        with suppress(AttributeError):  # private
            processes += self._client.engine_core.resources.engine_manager.processes
        sizes = deque([output_sizes()], maxlen=round(_LAST_OUTPUT_S / _WATCH_S))
        while not self._client.errored:
            await asyncio.sleep(_WATCH_S)
            sizes.append(output_sizes())
        await asyncio.sleep(_LAST_WORDS_S)
        with suppress(Exception):
            cause = cause_since(sizes[0]) or end_of(processes)
            async with asyncio.timeout(1):
                await asyncio.to_thread(leave_cause, serve.get_replica_context().app_name, cause)
        with suppress(Exception):  # Ray notices the end of a process only after some seconds
            async with asyncio.timeout(1):
                await asyncio.to_thread(ray.kill, ray.get_runtime_context().current_actor)
        os._exit(1)

    async def answer(self, operation: str, fields: dict[str, Any]) -> Any:
        """Yields server-sent events, or one object: the whole answer or ``{"error": …}``."""
        try:
            async with aclosing(self._answer(operation, fields)) as items:
                async for item in items:
                    if self._client.errored:
                        break
                    yield item
                else:
                    return
        except Exception:
            if not self._client.errored:
                raise
        yield {"error": {"message": ENGINE_DIED, "code": 503, "retry_s": DOWN_RETRY_S}}

    async def _answer(self, operation: str, fields: dict[str, Any]) -> AsyncGenerator[Item, None]:
        held_back = ""
        try:
            await self._load_adapter(fields.get("model", self._iterate.name))
            if operation == CHAT:
                if fields["messages"][-1]["role"] != "assistant":
                    held_back = self._renderer.held_back_text(self._with_system(fields["messages"]))
                stream = await self.chat(self._rendered(fields))
            elif operation == TOKENS:
                yield self._as_sampled(**fields)
                return
            else:
                await asyncio.to_thread(self._check_prompts, fields["prompt"])
                stream = await self.completions(_Completion(**fields))
        except ValidationError as error:
            yield {"error": {"message": str(error.errors()[0]["msg"]), "code": 400}}
            return
        except PromptError as error:
            yield {"error": {"message": str(error), "code": 400, "param": error.param, "name": error.name}}
            return
        except RenderError as error:
            yield {"error": {"message": str(error), "code": 400, "param": "messages"}}
            return
        pieces = without_held_back(_pieces(stream), held_back) if held_back else _pieces(stream)
        if change := _change(operation, fields):
            pieces = changed(pieces, change)
        async with aclosing(in_bursts(pieces, self._config.serving.stream_interval_s)) as bursts:
            async for burst in bursts:
                yield burst

    async def _load_adapter(self, name: str) -> None:
        """Loads an iterate's adapter at the first request for it.

        Raises:
            RunDirError: a file is missing or has changed, or the adapter is of another model.
        """
        if name == self._iterate.name:
            return
        engine: Any = self.engine
        if name in engine._oai_models.lora_requests:
            return
        async with self._loading:
            if name in engine._oai_models.lora_requests:
                return
            found = await asyncio.to_thread(lambda: open_iterate(open_run(self._run_folder), name))
            if found.base is None or found.base.digest != self._iterate.digest:
                raise RunDirError(f"{found.folder}: is no adapter of the model that this engine holds")
            await engine.resolve_lora(
                DiskMultiplexConfig(
                    model_id=name, local_path=str(found.folder), max_total_tokens=None, lora_assigned_int_id=1
                )
            )

    async def _render_chat(self, request: Any) -> Any:
        """Replaces vLLM's rendering."""
        from vllm.inputs.engine import tokens_input

        return list(request.messages), [tokens_input(request.prompt_ids)]

    def _rendered(self, fields: dict[str, Any]) -> _Chat:
        """Renders a conversation as in training; lowers its longest answer to what fits."""
        ids = self._prompt_ids(self._with_system(fields["messages"]))
        self._check_ids(ids, "messages")
        # One position stays free: vLLM scores an answer as a prompt, and must sample a token after it.
        room = self._config.model.max_length - 1 - len(ids)
        if room < 1:
            raise PromptError(
                "messages",
                f"{len(ids)} tokens do not fit; with an answer there must be fewer than "
                f"{self._config.model.max_length} (model.max_length)",
                TOO_LONG,
            )
        asked = fields.get("max_completion_tokens") or fields.get("max_tokens") or room
        own: dict[str, Any] = {
            "max_completion_tokens": min(asked, room),
            "prompt_ids": ids,
            "stop_token_ids": self._stops,
        }
        if most := fields.get("top_logprobs"):
            own["top_logprobs"] = most + 1
        return _Chat(**fields | own)

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Returns the ids to continue; the turn of a last assistant message stays open."""
        if messages[-1]["role"] != "assistant":
            return self._renderer.render_prompt(messages)
        rendered = self._renderer.render(messages)
        return [*rendered.prompt_ids, *rendered.real_ids[:-1]]  # without the end of the turn

    def _check_ids(self, ids: list[int], field: str) -> None:
        """Refuses ids without a row in the embedding.

        vLLM allows all ids of the tokenizer, and its engine dies of such an id.
        """
        wrong = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise PromptError(
                field, f"token id {wrong} is not in the model's vocabulary, whose ids are 0 to {self._vocabulary - 1}"
            )

    def _check_prompts(self, prompt: Any) -> None:
        """Raises PromptError if a prompt leaves no room for an answer, or has an id without a row in the embedding."""
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        most = self._config.model.max_length - 1
        for each in [prompt] if one else prompt:
            ids = self._renderer.tokenizer(each)["input_ids"] if isinstance(each, str) else each
            self._check_ids(ids, "prompt")
            if not 0 < len(ids) <= most:
                raise PromptError(
                    "prompt",
                    f"has {len(ids)} tokens; there must be 1 to {most}, one fewer than model.max_length",
                    TOO_LONG if ids else None,
                )

    def _as_sampled(self, messages: list[dict[str, str]], content: str, finish_reason: str) -> dict[str, Any]:
        """Returns a given answer as if sampled with ``return_token_ids``."""
        asked = self._with_system(messages)
        rendered = self._renderer.render([*asked, {"role": "assistant", "content": content}])
        response = rendered.real_ids if finish_reason == "stop" else rendered.real_ids[:-1]
        self._check_ids([*rendered.prompt_ids, *response], "answers")
        whole = len(rendered.prompt_ids) + len(response)
        if whole >= self._config.model.max_length:
            raise PromptError(
                "answers",
                f"one has {whole} tokens with its prompt, which do not fit; there must be fewer than "
                f"{self._config.model.max_length} (model.max_length)",
                TOO_LONG,
            )
        return {
            "prompt_token_ids": rendered.prompt_ids,
            "choices": [{"token_ids": response, "message": {"content": content}, "finish_reason": finish_reason}],
            "usage": {
                "prompt_tokens": len(rendered.prompt_ids), "completion_tokens": len(response), "total_tokens": whole,
            },
        }  # fmt: skip

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if self._config.data.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self._config.data.system}, *messages]


def _change(operation: str, fields: dict[str, Any]) -> Change | None:
    if operation == CHAT and (most := fields.get("top_logprobs")):
        return likeliest(most)
    return nothing_generated if operation == COMPLETION and fields.get("max_tokens") == 0 else None


async def _pieces(stream: Any) -> AsyncGenerator[Item, None]:
    async for items in stream:
        for item in items if isinstance(items, list) else [items]:
            yield item if isinstance(item, str) else item.model_dump(exclude_none=True)


def build_engine(iterate: Iterate, config: SpinConfig, run_folder: str = "") -> serve.Application:
    """Builds an application without a route, for one iterate or for all adapters of ``run_folder`` on it."""
    serving = config.serving
    engine = config.resolve_dtype(config.serving_engine)
    on_cpu = not serving.resources.gpus
    arguments = engine_arguments(
        iterate.folder,
        engine,
        max_length=config.model.max_length,
        dtype=engine.dtype,
        trust_remote_code=config.model.trust_remote_code,
        on_cpu=on_cpu,
        own={
            "enable_log_requests": False,
            **({"worker_extension_cls": "spin_ray.serving.cpu_worker.CpuWorker"} if on_cpu else {}),
            **_for_adapters(config, iterate.folder),
        },
    )
    if 0 <= arguments.get("max_logprobs", 0) <= MAX_TOP_LOGPROBS:  # -1: no limit
        arguments["max_logprobs"] = MAX_TOP_LOGPROBS + 1  # see ``likeliest``
    llm_config = LLMConfig(
        model_loading_config={"model_id": iterate.name, "model_source": arguments.pop("model")},
        engine_kwargs=arguments,
        placement_group_config={"bundle_per_worker": _per_worker(serving, engine.devices)},
        callback_config={"callback_class": LocalFolder},
        experimental_configs={
            "stream_batching_interval_ms": 0
        },  # it would delay the first token; ``in_bursts`` does not
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(serving.resources.threads)} | vllm_environment(engine)},
        deployment_config=_deployment(serving),
    )
    return build_llm_deployment(
        llm_config,
        name_prefix="",
        deployment_cls=IterateEngine,
        bind_kwargs={"iterate": iterate, "config": config, "run_folder": run_folder},
    )


def _for_adapters(config: SpinConfig, folder: Path) -> dict[str, Any]:
    """Returns arguments for batches over several adapters of the model in ``folder``.

    Without ``lora_target_modules`` vLLM also wraps the LM head. On CPU the engine then dies if prompt log-probs and
    another request share a batch: the head has a row per token, but an adapter per request.
    """
    lora = config.train.lora
    if not config.commits_adapters or lora is None:
        return {}
    names = layer_names(folder) if isinstance(lora.target_modules, str) else lora.target_modules
    last = {name.rpartition(".")[2] for name in names}  # vLLM compares the last part of a layer's name, or all of it
    most = min(config.iterations, MOST_ADAPTERS)
    return lora_arguments(lora.rank, most=most) | {"lora_target_modules": sorted(last)}


def _cpu_engine() -> Any:
    from spin_ray.serving.cpu_engine import CpuEngine

    return CpuEngine


def _per_worker(serving: ServingConfig, workers: int) -> dict[str, float]:
    return {name: amount / workers for name, amount in serving.resources.bundle.items()}


def _deployment(serving: ServingConfig) -> dict[str, Any]:
    scale: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.max_replicas > serving.replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": serving.replicas,
                "max_replicas": serving.max_replicas,
                "target_ongoing_requests": serving.target_ongoing_requests,
            }
        }
    labels = [serving.resources.labels] if serving.resources.labels else None  # Ray Serve repeats it for every bundle
    return scale | {
        "max_ongoing_requests": 10 * serving.max_concurrent,  # the ingress refuses first
        "graceful_shutdown_timeout_s": serving.request_timeout_s,
        "health_check_period_s": 1,
        "max_constructor_retry_count": 1,
        "ray_actor_options": {"num_cpus": 0},
        "placement_group_bundle_label_selector": labels,
    }
