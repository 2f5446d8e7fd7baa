"""PyTorch alone: everything on the device, no budget, nothing recomputed."""

import time

import torch
from random_models import cap_attention
from task import Inputs, Task
from torch import Tensor

from .base import ADAMW, Contestant, accumulate, synchronize, train


class Plain(Contestant):
    """PyTorch alone: autocast over float32 weights, float32 states."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.model = cap_attention(task.random_model(task.device, torch.float32))
        self.backwards = task.backwards(task.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)
        self.facts = {"budget": None}

    def forward(self, inputs: Inputs) -> Tensor:
        with torch.autocast(self.task.device.type, torch.bfloat16):
            return self.model(**inputs).loss

    def step(self) -> Tensor:
        return train(self.forward, self.backwards, self.optimizer)


class EagerBf16(Contestant):
    """PyTorch alone: weights, gradients and states in bfloat16, which is less exact than all others but `compile`."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.model = cap_attention(task.random_model(task.device, torch.bfloat16))
        self.backwards = task.backwards(task.device, pixels=torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)
        self.facts = {"budget": None, "detail": "bfloat16 masters and states"}

    def forward(self, inputs: Inputs) -> Tensor:
        return self.model(**inputs).loss

    def step(self) -> Tensor:
        return train(self.forward, self.backwards, self.optimizer)


class Compiled(EagerBf16):
    """`eager-bf16` with forward and backward compiled by torch.compile.

    `compile_s` is its first forward and backward, which compile and run once; the weights stay as they were.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        self.compiled = torch.compile(self.model)
        start = time.perf_counter()
        accumulate(self.forward, self.backwards[:1])
        synchronize()
        self.facts["compile_s"] = round(time.perf_counter() - start, 1)
        self.optimizer.zero_grad()

    def forward(self, inputs: Inputs) -> Tensor:
        return self.compiled(**inputs).loss
