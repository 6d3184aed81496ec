"""FSDP2: weights, gradients and optimizer state are sharded over all ranks, or by ``train.mesh``."""

import gc
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from spin_ray.config.sections import OptimizerConfig
from spin_ray.learner.adapter_folder import read_lora
from spin_ray.learner.adapters import add_adapters, is_adapter, set_first_values, stored_name
from spin_ray.learner.backends.base import BackendSettings, StepStats, set_learning_rate
from spin_ray.learner.backends.meshes import (
    check_split,
    clip,
    data_mesh,
    group_by_mesh,
    make_mesh,
    split_layers,
    total_norm,
)
from spin_ray.learner.backends.modules import (
    compile_layers,
    compiles,
    export,
    make_deterministic,
    persistent,
    recompute_activations,
    store_in_bf16,
    trainable,
)
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.decoder import decoder_layers
from spin_ray.learner.head import HeadReader
from spin_ray.learner.hf_folder import load_model
from spin_ray.learner.layout import choose_layout
from spin_ray.learner.loading import empty_model, load_first_layers, materialise, read_shares
from spin_ray.learner.optimizer_state import load_checkpoint, save_checkpoint
from spin_ray.learner.optimizers import allocate_state, make_optimizer, weights_to_use
from spin_ray.learner.quantised import load_quantised, quantised_weights
from spin_ray.learner.scoring import ResponseScorer


class Fsdp2Backend:
    """A ``TrainBackend`` on initialised ``torch.distributed`` (gloo on CPUs, NCCL on GPUs)."""

    def __init__(self, model_dir: str | Path, settings: BackendSettings, device: torch.device) -> None:
        if settings.deterministic:
            make_deterministic()
        self.device = device
        self.steps_done = 0
        self._model_dir = model_dir
        self._settings = settings
        source = Path(model_dir)
        lora = settings.lora or (read_lora(settings.adapter) if settings.adapter else None)
        # One rank holds all weights anyway, but frozen ones only in bf16. A model's own code may need a whole model.
        spares = dist.get_world_size() > 1 or (lora is not None and settings.precision == "bf16")
        in_shares = spares and source.is_dir() and not settings.trust_remote_code and settings.base == "bf16"
        empty = empty_model(source) if in_shares else None
        if settings.base != "bf16":
            probe, self._model = (
                load_first_layers(source),
                load_quantised(
                    source,
                    settings.base,
                    dtype=settings.dtype,
                    device=device,
                    trust_remote_code=settings.trust_remote_code,
                ),
            )
        elif empty is not None:
            probe, self._model = load_first_layers(source), empty
        else:
            probe = self._model = load_model(model_dir, trust_remote_code=settings.trust_remote_code)
        choice = choose_layout(
            probe, settings.attention, max_length=settings.max_length, device=device, dtype=settings.dtype
        )
        mesh = make_mesh(settings.mesh, device)
        check_split(probe, mesh, device)
        del probe
        if lora is not None:
            add_adapters(self._model, lora, seed=settings.seed, values=settings.adapter)
        if settings.precision == "bf16":
            store_in_bf16(
                parameter
                for parameter in self._model.parameters()
                if settings.optimizer is None or not parameter.requires_grad
            )
        split_layers(self._model, mesh)
        self._frees_weights = _frees_weights(settings, data_mesh(mesh), device)
        self._scorer = _shard(
            choice.scorer(self._model), settings, data_mesh(mesh), device, frees_weights=self._frees_weights
        )
        if empty is not None:
            self._fill(source)
        # Listed while sharded: during and after a forward pass, modules may hold gathered copies instead.
        self._shards: dict[str, nn.Parameter] = dict(self._model.named_parameters())
        self._optimizer: torch.optim.Optimizer | None = None
        if settings.optimizer is not None:
            optimizer = make_optimizer(trainable(self._model), settings.optimizer, settings.learning_rate)
            group_by_mesh(optimizer)
            allocate_state(optimizer, settings.optimizer.name)
            self._optimizer = optimizer
            self._set_learning_rate()

    def _fill(self, source: Path) -> None:
        materialise(self._scorer, self.device, torch.device("cpu") if self._settings.offload else self.device)
        self._model.tie_weights()  # to_empty gave each module its own parameter
        parameters = dict(self._model.named_parameters())
        shares = {stored_name(name): share for name, share in parameters.items() if not is_adapter(name)}
        read_shares(shares, source, self._model)
        set_first_values(parameters, seed=self._settings.seed, values=self._settings.adapter)

    def logps(self, batch: PackedBatch) -> Float[Tensor, "segments"]:
        return self._scorer(batch.to(self.device))

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Float[Tensor, "segments"]:
        return self.logps(batch)

    @torch.no_grad()
    def score_tokens(self, batch: PackedBatch) -> Float[Tensor, "targets"]:
        """Returns log p of every response token in pack order, fp32; a collective."""
        return self._scorer(batch.to(self.device), by_token=True).float()

    def read(self, batch: PackedBatch, reader: HeadReader) -> Any:
        return self._scorer(batch.to(self.device), read=reader)

    def backward(self, loss: Float[Tensor, ""], *, last_microbatch: bool) -> None:
        # Without sync, every rank adds up whole gradients (4 bytes per parameter), which are reduced once per step.
        self._scorer.set_requires_gradient_sync(last_microbatch or self._settings.reduce_every_pack)
        self._scorer.set_requires_all_reduce(last_microbatch)  # over mesh dimension replicate: once per step
        self._scorer.set_reshard_after_backward(self._frees_weights or last_microbatch)
        loss.backward()

    def step(self) -> StepStats:
        optimizer, settings = self._training()
        self._reshard()
        gradients = [shard.grad for shard in self._shards.values() if shard.grad is not None]
        norm = total_norm(gradients)
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"gradient norm is {grad_norm} at optimizer step {self.steps_done}; lower the learning rate or beta"
            )
        clip(self._shards.values(), settings.max_grad_norm, norm)
        stats = StepStats(grad_norm=grad_norm, learning_rate=optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self._set_learning_rate()
        return stats

    def save(self, directory: Path) -> None:
        optimizer, settings = self._training()
        self._reshard()
        save_checkpoint(directory, self._shards, optimizer, settings.name, self.steps_done)

    def load(self, directory: Path) -> None:
        optimizer, settings = self._training()
        self._reshard()
        self.steps_done = load_checkpoint(directory, self._shards, optimizer, settings.name)
        self._set_learning_rate()

    def export_hf(self, directory: Path) -> None:
        self._reshard()
        with weights_to_use(self._optimizer):
            export(
                directory, self._model, persistent(self._model, self._shards.items()), _whole, self._model_dir,
                self._settings,
            )  # fmt: skip

    def close(self) -> None:
        """Frees model and optimizer state; nothing else may be called afterwards.

        FSDP2's hooks and modules form reference cycles, so dropping the last reference frees nothing.
        """
        del self._model, self._scorer, self._shards, self._optimizer
        gc.collect()
        gc.collect()  # on CUDA the first pass frees autograd's nodes, which hold hooks, and those whole gradients
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _training(self) -> tuple[torch.optim.Optimizer, OptimizerConfig]:
        if self._optimizer is None or self._settings.optimizer is None:
            raise RuntimeError("this backend was built for scoring only (BackendSettings.optimizer is None)")
        return self._optimizer, self._settings.optimizer

    def _set_learning_rate(self) -> None:
        optimizer, _ = self._training()
        set_learning_rate(optimizer.param_groups, self._settings, self.steps_done)

    def _reshard(self) -> None:
        """Drops gathered weights before the shards change.

        FSDP2 keeps the root's for a backward, even after ``score``.
        """
        for module in self._scorer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _frees_weights(settings: BackendSettings, mesh: DeviceMesh, device: torch.device) -> bool:
    """Returns True if layers drop gathered weights after use."""
    return settings.sharding == "full" and (mesh["shard"].size() > 1 or _is_tight(settings, device))


def _is_tight(settings: BackendSettings, device: torch.device) -> bool:
    """Returns True if even one rank may lack memory for shards and gathered weights together.

    A GPU of 24 GB holds a frozen 7B model once, not twice.
    """
    return settings.lora is not None or (settings.optimizer is None and device.type == "cuda")


def _shard(
    scorer: ResponseScorer, settings: BackendSettings, mesh: DeviceMesh, device: torch.device, *, frees_weights: bool
) -> Any:
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if settings.precision == "bf16" else None, reduce_dtype=torch.float32
    )
    # Pinned, so that copies to and from the GPU overlap with computation.
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.offload else OffloadPolicy()
    if compiles(settings.compile, device, split=settings.mesh is not None and settings.mesh.tensor > 1):
        compile_layers(scorer.model)
        scorer.fused_head = True
    if settings.gradient_checkpointing:
        recompute_activations(scorer.model)
    quantised = quantised_weights(scorer)
    for layer in decoder_layers(scorer.model):
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, offload_policy=offload,
            reshard_after_forward=frees_weights, ignored_params=quantised,
        )  # fmt: skip
    fully_shard(scorer, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=quantised)
    for module in scorer.modules():
        if isinstance(module, FSDPModule) and mesh.size() > 1:  # one rank would divide by 1, a pass over all gradients
            # Sum over ranks, not mean: losses are divided by counts of the whole step. Gloo knows only the plain sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return scorer
