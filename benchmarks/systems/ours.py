"""geminifx, once for each way to update."""

import time
from dataclasses import replace
from typing import Any, ClassVar

import geminifx
import torch
from geminifx.compiler.cli.launch import rank
from geminifx.compiler.parallel import Parallel
from geminifx.models.adapters import blocks
from task import Backward, Task
from torch import Tensor, nn

from .base import ADAMW, Contestant, train


class Ours(Contestant):
    """geminifx, each chunk updated as soon as its gradient is complete."""

    several = True
    declares: ClassVar[dict[str, Any]] = {"in_backward": True}
    """What its optimizer is told besides AdamW's numbers."""

    def __init__(self, task: Task):
        super().__init__(task)
        # Masters are float32 whatever they come from. As bfloat16 the weights, which are exact in it, take half the
        # time to make, and leave the host the memory that the plan is made for.
        dtype = torch.bfloat16 if task.device.type == "cuda" else torch.float32
        source = task.random_model(torch.device("cpu"), dtype)
        self.backwards = own_backwards(task, task.device)
        self._compile(source)

    @classmethod
    def refusal(cls, task: Task) -> str | None:
        return super().refusal(replace(task, microbatches=None))

    @classmethod
    def planned(cls, task: Task) -> dict[str, Any]:
        """Plan with weights on `meta`, print the plan and return its figures; nothing is run.

        Without a GPU it is computed in bfloat16 all the same, in a budgeted arena in RAM, at the rates of RAM where no
        others are declared.
        """
        self = cls.__new__(cls)
        Contestant.__init__(self, task)
        self.backwards = own_backwards(task, torch.device("cpu"))
        self._compile(task.empty_model(), precision="bf16")
        return self.facts

    def _compile(self, source: nn.Module, **options: Any) -> None:
        """Compile, make the optimizer, and note how long both took and what was planned."""
        task, declared = self.task, self.task.declared
        if task.microbatches is not None:
            options["microbatches"] = task.microbatches
        start = time.perf_counter()
        self.model = geminifx.compile(
            source, device_budget=task.budget, host_budget=declared.host_budget, plan=declared.plan,
            recompute=first_blocks(source, "recompute", declared.recompute),
            offload=first_blocks(source, "offload", declared.offload), parallel=declared.degrees, rates=declared.rates,
            kernels=declared.kernels, warmup=declared.warmup,
            example_inputs=self.backwards[0].inputs, **options,
        )  # fmt: skip
        self.optimizer = self.make_optimizer()
        compile_s, plan = time.perf_counter() - start, self.model.plan
        self.facts = {
            "compile_s": round(compile_s, 1), "planned_peak_bytes": plan.peak_bytes,
            "planned_host_bytes": plan.estimate.host_bytes, "planned_step_s": round(plan.estimate.step_s, 4),
        }  # fmt: skip
        if rank() == 0:
            print(plan)

    def make_optimizer(self) -> Any:
        return self.model.optimizer(torch.optim.AdamW, **ADAMW, **self.declares, accumulate=self.task.accumulate)

    def step(self) -> Tensor:
        return train(lambda inputs: self.model(**inputs).loss, self.backwards, self.optimizer)

    def final_facts(self) -> dict[str, Any]:
        stats = self.model.stats
        return {"stats": {
            "device_peak_bytes": stats.device_peak_bytes, "host_peak_bytes": stats.host_peak_bytes,
            "to_device_bytes_per_step": stats.step.to_device_bytes, "to_host_bytes_per_step": stats.step.to_host_bytes,
        }}  # fmt: skip

    def profile(self, trace: str) -> object:
        return self.model.profile(self.step, steps=1, trace=trace)


class OursDefault(Ours):
    """geminifx, updates beginning at `step()`."""

    declares: ClassVar[dict[str, Any]] = {}


class OursClip(Ours):
    """geminifx, gradients clipped to a norm of 1."""

    declares: ClassVar[dict[str, Any]] = {"max_grad_norm": 1.0}


class OursTorch(Ours):
    """geminifx with an optimizer of torch's over `parameters()`."""

    def make_optimizer(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)


def first_blocks(model: nn.Module, option: str, value: str) -> str | tuple[str, ...]:
    """Return an option for compile: a number stands for so many of the first blocks.

    Raises ValueError where there are fewer.
    """
    if not value.isdigit():
        return value
    found, count = blocks(model), int(value)
    if count > len(found):
        raise ValueError(f"--{option} {count}, but the model has {len(found)} blocks")
    return found[:count]


def own_backwards(task: Task, device: torch.device) -> list[Backward]:
    """Return this process's part of each backward, for a model that is parallel as declared.

    The model's loss is that of all processes together, and so is its share of the step's.
    """
    mesh = Parallel.of(task.declared.degrees).mesh(None, task.nprocs)
    own = task.backwards(device, mesh.data_size, mesh.data_rank(rank()))
    whole = task.backwards(torch.device("cpu"))
    return [replace(mine, share=all_.share) for mine, all_ in zip(own, whole, strict=True)]
