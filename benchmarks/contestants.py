"""The systems that `step_time.py` compares: one function each, which returns a training step ready to run.

All train the same weights on the same tokens with AdamW and compute in bfloat16. What differs is said in the
function's docstring.
"""

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import geminifx
import torch
from geminifx.compiler.cli.launch import rank
from geminifx.compiler.parallel import Parallel, parse_parallel
from geminifx.runtime.isa.units import parse_bytes
from random_opt import empty_model, fill, random_batch, random_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

ADAMW = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}

CONTEXT_BYTES = 768 * 2**20
"""What driver and libraries take outside of torch's allocator; leaves it that much less than the budget."""

ZERO_3_FROM = 5_000_000_000
"""Parameters from which on DeepSpeed's ZeRO-2 with float32 masters does not fit a host of 128 GiB."""

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Setup:
    """One measurement: the model's size ("1.3b"), sequences per step of all processes, tokens per sequence, device
    budget, and in how many processes.

    The remaining fields are for `geminifx.compile`.
    """

    size: str
    batch: int
    seq: int
    budget: str | None = None
    nprocs: int = 1
    host_budget: str | None = None
    plan: str | None = None
    recompute: str = "auto"
    parallel: str | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def tokens(self, parts: int = 1, part: int = 0) -> dict[str, Tensor]:
        """Return the batch, or one of the parts that its sequences are divided into."""
        if self.batch % parts:
            raise ValueError(f"a batch of {self.batch} does not divide by {parts} processes with batches of their own")
        whole, rows = random_batch(self.size, self.batch, self.seq, self.device), self.batch // parts
        return {name: tokens[part * rows : (part + 1) * rows] for name, tokens in whole.items()}

    def own_tokens(self) -> dict[str, Tensor]:
        """Return what of the batch this process is to give a model that is parallel as declared."""
        mesh = Parallel.of(self.declared).mesh(None, self.nprocs)
        return self.tokens(mesh.data_size, mesh.data_rank(rank()))

    @property
    def declared(self) -> dict[str, Any] | None:
        return parse_parallel(self.parallel) if self.parallel else None

    def blocks_recomputed(self) -> str | tuple[str, ...]:
        """Return `recompute` for compile: a number stands for so many of the first layers."""
        if not self.recompute.isdigit():
            return self.recompute
        return tuple(f"model.decoder.layers.{i}" for i in range(int(self.recompute)))


@dataclass(frozen=True)
class Contestant:
    """`step` runs one training step and returns its loss; `facts` go into the result, `final_facts()` afterwards.

    `profile` writes the trace of one step to a file and returns a table, where the system can do so.
    """

    step: Step
    facts: dict[str, Any] = field(default_factory=dict)
    final_facts: Callable[[], dict[str, Any]] = dict
    profile: Callable[[str], object] | None = None


def plain_step(model: nn.Module, optimizer: Any, batch: dict[str, Tensor]) -> Step:
    """Return the usual training loop's body."""

    def step() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(setup: Setup) -> Contestant:
    """geminifx, each chunk updated as soon as its gradient is complete."""
    return _ours(setup, lambda model: model.optimizer(torch.optim.AdamW, **ADAMW, in_backward=True))


def ours_default(setup: Setup) -> Contestant:
    """geminifx, updates beginning at `step()`."""
    return _ours(setup, lambda model: model.optimizer(torch.optim.AdamW, **ADAMW))


def ours_clip(setup: Setup) -> Contestant:
    """geminifx, gradients clipped to a norm of 1."""
    return _ours(setup, lambda model: model.optimizer(torch.optim.AdamW, **ADAMW, max_grad_norm=1.0))


def ours_torch(setup: Setup) -> Contestant:
    """geminifx with an optimizer of torch's over `parameters()`."""
    return _ours(setup, lambda model: torch.optim.AdamW(model.parameters(), **ADAMW, fused=True))


def _ours(setup: Setup, make_optimizer: Callable[[Any], Any]) -> Contestant:
    # Masters are float32 whatever they come from. As bfloat16 the weights, which are exact in it, take half the
    # time to make, and leave the host the memory that the plan is made for.
    dtype = torch.bfloat16 if setup.device.type == "cuda" else torch.float32
    source, batch = random_model(setup.size, torch.device("cpu"), dtype), setup.own_tokens()
    start = time.perf_counter()
    model = geminifx.compile(source, device_budget=setup.budget, host_budget=setup.host_budget, plan=setup.plan,
                             recompute=setup.blocks_recomputed(), parallel=setup.declared,
                             example_inputs=batch)  # fmt: skip
    step = plain_step(model, make_optimizer(model), batch)
    compile_s = time.perf_counter() - start
    if rank() == 0:
        print(model.plan)

    def final_facts() -> dict[str, Any]:
        stats = model.stats
        return {"stats": {
            "device_peak_bytes": stats.device_peak_bytes, "host_peak_bytes": stats.host_peak_bytes,
            "to_device_bytes_per_step": stats.step.to_device_bytes, "to_host_bytes_per_step": stats.step.to_host_bytes,
        }}  # fmt: skip

    def profile(trace: str) -> object:
        return model.profile(step, steps=1, trace=trace)

    return Contestant(step, {"compile_s": round(compile_s, 1)}, final_facts, profile)


def plain(setup: Setup) -> Contestant:
    """PyTorch alone: everything on the device, no budget, nothing recomputed, autocast over float32 weights."""
    model, batch = random_model(setup.size, setup.device, torch.float32), setup.tokens()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)

    def step() -> Tensor:
        with torch.autocast(setup.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contestant(step, {"budget": None})


def fsdp2(setup: Setup) -> Contestant:
    """FSDP2 per layer over all processes: within a budget float32 weights, gradients and optimizer on the host, layers
    recomputed.

    Without a budget everything is on the device and nothing is recomputed.
    """
    device = setup.device
    _cap_memory(setup)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if setup.nprocs > 1:
        dist.init_process_group(backend)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # any free port
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    offload = setup.budget is not None and device.type == "cuda"
    model = _sharded(empty_model(setup.size), device, recompute=setup.budget is not None, offload=offload)
    batch = setup.tokens(setup.nprocs, rank())
    # The first forward may put weights into pinned memory, so the optimizer can take hold of them only then.
    model(**{name: tokens[:1, :8] for name, tokens in batch.items()}).loss.backward()
    model.zero_grad()
    sharded = list(model.parameters())
    # Over the local tensors, which share the weights' memory: over DTensors the update is slower.
    local = [nn.Parameter(parameter.to_local().detach()) for parameter in sharded]
    optimizer = torch.optim.AdamW(local, **ADAMW, fused=True)

    def step() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        for mine, theirs in zip(local, sharded, strict=True):
            mine.grad, theirs.grad = theirs.grad.to_local(), None
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach() / setup.nprocs
        dist.all_reduce(loss)
        return loss

    return Contestant(step, {"detail": f"offload={offload}, recompute={setup.budget is not None}"})


def _sharded(model: Any, device: torch.device, *, recompute: bool, offload: bool) -> Any:
    """Return the model, whose weights are on `meta`, sharded over all processes and filled."""
    layers = model.model.decoder.layers
    options = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)), "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }  # fmt: skip
    for i, layer in enumerate(layers):
        if recompute:  # inside of the sharding, whose hooks must not run a second time
            layers[i] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        fully_shard(layers[i], **options)
    fully_shard(model, **options)
    for before, after in zip(layers, list(layers)[1:], strict=False):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
    model.to_empty(device="cpu" if offload else device)
    for name, parameter in model.named_parameters():
        fill(name.replace("_checkpoint_wrapped_module.", ""), parameter.to_local().detach())
    return model


def deepspeed(setup: Setup) -> Contestant:
    """DeepSpeed ZeRO-2 with its optimizer on the host, layers recomputed; large models ZeRO-3 with bfloat16 masters."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29517")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # only its CPU optimizer is built, which needs no nvcc
    module = importlib.import_module("deepspeed")
    _cap_memory(setup)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    stage = 3 if sum(p.numel() for p in empty_model(setup.size).parameters()) >= ZERO_3_FROM else 2
    config = _deepspeed_config(setup, stage)
    module.init_distributed(dist_backend="nccl" if setup.device.type == "cuda" else "gloo")
    model = random_model(setup.size, setup.device, torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = module.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    batch = setup.tokens()

    def step() -> Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    masters = "bfloat16 masters and state (float32 does not fit the host)" if stage == 3 else "float32 masters"
    return Contestant(step, {"detail": f"{module.__version__}, ZeRO-{stage} offload, {masters}"})


def _deepspeed_config(setup: Setup, stage: int) -> dict[str, Any]:
    on_host = {"device": "cpu", "pin_memory": setup.device.type == "cuda"}
    bucket = 100_000_000
    zero = {"stage": stage, "offload_optimizer": on_host, "overlap_comm": True, "contiguous_gradients": True,
            "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}  # fmt: skip
    bf16: dict[str, Any] = {"enabled": True, "check_grad_overflow": False}
    if stage == 3:
        zero |= {"offload_param": on_host, "stage3_prefetch_bucket_size": 3 * bucket}
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {
        "train_micro_batch_size_per_gpu": setup.batch, "gradient_accumulation_steps": 1, "bf16": bf16,
        "zero_optimization": zero, "optimizer": {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}},
        "steps_per_print": 10**9,
    }  # fmt: skip


def _cap_memory(setup: Setup) -> None:
    """Keep torch's allocator to the budget, less what the driver takes besides."""
    if setup.budget is not None and setup.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        share = (parse_bytes(setup.budget, of=total) - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


SYSTEMS: dict[str, Callable[[Setup], Contestant]] = {
    "ours": ours,
    "ours-default": ours_default,
    "ours-clip": ours_clip,
    "ours-torch": ours_torch,
    "fsdp2": fsdp2,
    "deepspeed": deepspeed,
    "plain": plain,
}
