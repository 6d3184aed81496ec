"""DeepSpeed: ZeRO-2 or ZeRO-3 as a ``TrainBackend``."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ModelError
from spin_ray.learner.adapters import add_adapters
from spin_ray.learner.backends.base import BackendSettings, StepStats, set_learning_rate
from spin_ray.learner.backends.modules import (
    export,
    make_deterministic,
    persistent,
    recompute_activations,
    store_in_bf16,
    trainable,
)
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.head import HeadReader
from spin_ray.learner.hf_folder import load_model
from spin_ray.learner.layout import choose_layout
from spin_ray.learner.optimizers import make_optimizer
from spin_ray.learner.scoring import ResponseScorer

CHECKPOINT = "zero"


class DeepSpeedBackend:
    """A ``TrainBackend`` on initialised ``torch.distributed`` (gloo on CPUs, NCCL on GPUs).

    Every ``backward`` is a collective.
    With bf16, master weights start from weights rounded to bf16 (exact for start models stored in bf16).
    """

    def __init__(self, model_dir: str | Path, settings: BackendSettings, device: torch.device) -> None:
        if settings.optimizer is None:
            raise ValueError("DeepSpeed is used for training only; FSDP2 scores")
        if settings.compile is True:
            raise ValueError("DeepSpeed trains uncompiled, so its reference must not be scored compiled")
        if settings.deterministic:
            make_deterministic()
        deepspeed = _import_deepspeed(device)
        self.device = device
        self.steps_done = 0
        self._gathered = deepspeed.zero.GatheredParameters
        self._model_dir = model_dir
        self._settings = settings
        self._model = load_model(model_dir, trust_remote_code=settings.trust_remote_code)
        choice = choose_layout(
            self._model, settings.attention, max_length=settings.max_length, device=device, dtype=settings.dtype
        )
        if settings.lora is not None:
            add_adapters(self._model, settings.lora, seed=settings.seed, values=settings.adapter)
        if settings.gradient_checkpointing:
            recompute_activations(self._model)
        scorer = choice.scorer(self._model, _Scorer)
        # DeepSpeed casts buffers with the weights, but rotary frequencies in bf16 would give wrong positions.
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        config = _engine_config(settings, settings.optimizer)
        optimizer = make_optimizer(trainable(self._model), settings.optimizer, settings.learning_rate)
        if settings.sharding == "full":
            # One weight after another: DeepSpeed's own start would first put the whole model on every card.
            if settings.precision == "bf16":
                store_in_bf16(scorer.parameters())
            deepspeed.zero.Init(module=scorer, config_dict_or_path=config, dtype=settings.dtype)
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=scorer, optimizer=optimizer, config=config, dist_init_required=False
        )
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(owner), leaf, buffer.to(device))
        scorer.own_the_head(deepspeed.zero)
        set_learning_rate(self._optimizer.param_groups, settings, self.steps_done)

    def logps(self, batch: PackedBatch) -> Float[Tensor, "segments"]:
        return self._engine(batch.to(self.device))

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Float[Tensor, "segments"]:
        return self.logps(batch)

    def read(self, batch: PackedBatch, reader: HeadReader) -> Any:
        return self._engine(batch.to(self.device), read=reader)

    def backward(self, loss: Float[Tensor, ""], *, last_microbatch: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last_microbatch)
        # DeepSpeed averages over ranks, but losses must be summed: each is a share of the whole step.
        self._engine.backward(loss * dist.get_world_size())

    def step(self) -> StepStats:
        learning_rate = self._optimizer.param_groups[0]["lr"]
        self._engine.step()
        if self._optimizer.overflow:  # DeepSpeed then skips the step silently
            raise FloatingPointError(
                f"gradient norm is not finite at optimizer step {self.steps_done}; lower the learning rate or beta"
            )
        self.steps_done += 1
        set_learning_rate(self._optimizer.param_groups, self._settings, self.steps_done)
        return StepStats(grad_norm=float(self._engine.get_global_grad_norm()), learning_rate=learning_rate)

    def save(self, directory: Path) -> None:
        self._engine.save_checkpoint(
            str(directory),
            tag=CHECKPOINT,
            client_state={"steps_done": self.steps_done},
            save_latest=False,
            exclude_frozen_parameters=self._settings.lora is not None,
        )

    def load(self, directory: Path) -> None:
        folder, state = self._engine.load_checkpoint(
            str(directory), tag=CHECKPOINT, load_module_strict=self._settings.lora is None
        )
        if folder is None:
            raise ModelError(f"{directory}: DeepSpeed finds no checkpoint in it")
        self.steps_done = state["steps_done"]
        set_learning_rate(self._optimizer.param_groups, self._settings, self.steps_done)

    def export_hf(self, directory: Path) -> None:
        def whole(tensor: Tensor) -> Tensor:
            with self._gathered([tensor] if hasattr(tensor, "ds_id") else []):
                return tensor.detach().clone()

        export(
            directory, self._model, persistent(self._model, self._model.named_parameters()), whole, self._model_dir,
            self._settings,
        )  # fmt: skip


class _Scorer(ResponseScorer):
    """A scorer that keeps the head's weight gathered for the whole pass.

    ZeRO-3 gathers weights at each call, but ranks call the head unequally often.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._bare_head: Any = None

    def own_the_head(self, zero: Any) -> None:
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ModelError(f"the head is a {type(head).__name__}, not a Linear; use train.backend: fsdp2")
        for parameter in head.parameters():
            if hasattr(parameter, "ds_id"):
                zero.register_external_parameter(self, parameter)
        self._bare_head = partial(functional.linear, weight=head.weight, bias=head.bias)

    def head(self) -> Any:
        return self._bare_head


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    try:
        import deepspeed
    except ImportError as error:
        raise ModelError(
            f"train.backend: deepspeed cannot be used ({error}); pip install 'spin-ray[deepspeed]'"
        ) from error
    if device.type == "cpu":
        # Shared-memory collectives serve its inference only; compiling them takes minutes on every new node.
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    return deepspeed


def _engine_config(settings: BackendSettings, optimizer: OptimizerConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # the packing plan decides batch sizes
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "bf16": {"enabled": settings.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"use_node_local_storage": True},  # each rank may be given a directory of its own
        "zero_optimization": _zero(settings),
        "zero_force_ds_cpu_optimizer": False,  # torch's own optimizer, as without offloading
        "gradient_clipping": optimizer.max_grad_norm,
    }


def _zero(settings: BackendSettings) -> dict[str, Any]:
    stage = 3 if settings.sharding == "full" else 2
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # Only ZeRO-3 can offload weights.
    offloaded = ["offload_optimizer", *(["offload_param"] if stage == 3 else [])] if settings.offload else []
    return {"stage": stage, **dict.fromkeys(offloaded, to_cpu)}
