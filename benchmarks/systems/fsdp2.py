"""torch's FSDP2."""

from itertools import pairwise

import torch
from geminifx.compiler.cli.launch import rank
from geminifx.models.adapters import blocks
from random_models import cap_attention, fill, norm_weight
from task import Inputs, Task
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from .base import ADAMW, Contestant, accumulate, cap_memory, use_all_cores

SAMPLE_TOKENS = 8


class Fsdp2(Contestant):
    """FSDP2 per block over all processes: within a budget float32 weights, gradients and optimizer on the host, blocks
    recomputed.

    Without a budget everything is on the device and nothing is recomputed.
    """

    several = True

    def __init__(self, task: Task):
        super().__init__(task)
        cap_memory(task)
        use_all_cores()
        self._join()
        recompute, offload = task.budget is not None, task.budget is not None and task.device.type == "cuda"
        self.facts = {"detail": f"offload={offload}, recompute={recompute}"}
        self.model = sharded(cap_attention(task.empty_model()), task.device, recompute, offload)
        self.backwards = task.backwards(task.device, task.nprocs, rank())
        # The first forward may put weights into pinned memory, so the optimizer can take hold of them only then.
        self.forward(sample(self.backwards[0].inputs)).backward()
        self.model.zero_grad()
        self.sharded = list(self.model.parameters())
        # Over the local tensors, which share the weights' memory: over DTensors the update is slower.
        self.local = [nn.Parameter(parameter.to_local().detach()) for parameter in self.sharded]
        self.optimizer = torch.optim.AdamW(self.local, **ADAMW, fused=True)

    def _join(self) -> None:
        backend = "cpu:gloo,cuda:nccl" if self.task.device.type == "cuda" else "gloo"
        if self.task.nprocs > 1:
            dist.init_process_group(backend)
        else:
            store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # any free port
            dist.init_process_group(backend, store=store, rank=0, world_size=1)

    def forward(self, inputs: Inputs) -> Tensor:
        return self.model(**inputs).loss

    def step(self) -> Tensor:
        loss = accumulate(self.forward, self.backwards) / self.task.nprocs
        for mine, theirs in zip(self.local, self.sharded, strict=True):
            mine.grad, theirs.grad = theirs.grad.to_local(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(loss)
        return loss


def sample(inputs: Inputs) -> Inputs:
    """Return the inputs cut to one row, of a few tokens where it is a sequence."""
    return {name: t[:1, :SAMPLE_TOKENS] if t.dim() == 2 else t[:1] for name, t in inputs.items()}


def sharded(model: PreTrainedModel, device: torch.device, recompute: bool, offload: bool) -> PreTrainedModel:
    """Return the model, whose weights are on `meta`, sharded over all processes and filled."""
    options = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)), "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }  # fmt: skip
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    layers = []
    for path in blocks(model):
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(path)
        if recompute:  # inside of the sharding, whose hooks must not run a second time
            layer = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
            setattr(model.get_submodule(parent), name, layer)
        layers.append(fully_shard(layer, **options))
    fully_shard(model, **options)
    for before, after in pairwise(layers):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
    model.to_empty(device="cpu" if offload else device)
    for name, parameter in model.named_parameters():
        rows_each = -(-len(parameter) // dist.get_world_size())  # which the last processes may have fewer of
        first = rank() * rows_each * (parameter.numel() // len(parameter))
        fill(plain_name(name), parameter.to_local().detach(), norm_weight(model.config), first)
    for name, buffer in buffers.items():
        holder, _, key = name.rpartition(".")
        setattr(_unwrapped(model, holder), key, buffer.to(device))
    return model


def plain_name(name: str) -> str:
    """Return the name that a parameter has where its block is not recomputed."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _unwrapped(model: nn.Module, path: str) -> nn.Module:
    """Return the module that was at `path` before blocks were wrapped."""
    return next(module for name, module in model.named_modules() if plain_name(f"{name}.") == f"{path}.")
