"""DeepSpeed, where it is installed."""

import importlib
import os
from typing import Any

import torch
from random_models import cap_attention
from task import Inputs, Task
from torch import Tensor

from .base import ADAMW, Contestant, cap_memory, use_all_cores

ZERO_3_FROM = 5_000_000_000
"""Parameters from which on DeepSpeed's ZeRO-2 with float32 masters does not fit a host of 128 GiB."""


class DeepSpeed(Contestant):
    """DeepSpeed ZeRO-2 with its optimizer on the host, layers recomputed; large models ZeRO-3 with bfloat16 masters."""

    package = "deepspeed"

    def __init__(self, task: Task):
        super().__init__(task)
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", "29517")
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # only its CPU optimizer is built, which needs no nvcc
        module = importlib.import_module("deepspeed")
        cap_memory(task)
        use_all_cores()
        stage = 3 if sum(p.numel() for p in task.empty_model().parameters()) >= ZERO_3_FROM else 2
        module.init_distributed(dist_backend="nccl" if task.device.type == "cuda" else "gloo")
        model = cap_attention(task.random_model(task.device, torch.bfloat16))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        weights = list(model.parameters())
        self.engine = module.initialize(model=model, model_parameters=weights, config=config_of(task, stage))[0]
        self.backwards = task.backwards(task.device, pixels=torch.bfloat16)
        masters = "bfloat16 masters and state (float32 does not fit the host)" if stage == 3 else "float32 masters"
        self.facts = {"detail": f"{module.__version__}, ZeRO-{stage} offload, {masters}"}

    def forward(self, inputs: Inputs) -> Tensor:
        return self.engine(**inputs).loss

    def step(self) -> Tensor:
        losses = []
        for backward in self.backwards:
            loss = self.forward(backward.inputs) * backward.share
            self.engine.backward(loss * self.task.accumulate)  # which it divides by how many there are
            self.engine.step()  # updates after the last of them
            losses.append(loss.detach())
        return torch.stack(losses).sum()


def config_of(task: Task, stage: int) -> dict[str, Any]:
    on_host = {"device": "cpu", "pin_memory": task.device.type == "cuda"}
    bucket = 100_000_000
    zero = {"stage": stage, "offload_optimizer": on_host, "overlap_comm": True, "contiguous_gradients": True,
            "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}  # fmt: skip
    bf16: dict[str, Any] = {"enabled": True, "check_grad_overflow": False}
    if stage == 3:
        zero |= {"offload_param": on_host, "stage3_prefetch_bucket_size": 3 * bucket}
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {
        "train_micro_batch_size_per_gpu": task.batch, "gradient_accumulation_steps": task.accumulate, "bf16": bf16,
        "zero_optimization": zero, "optimizer": {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}},
        "steps_per_print": 10**9,
    }  # fmt: skip
