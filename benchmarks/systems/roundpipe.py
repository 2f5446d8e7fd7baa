"""RoundPipe, where it is installed: weights and optimizer on the host, blocks sent to the GPU in turn."""

import importlib
from dataclasses import replace
from typing import Any, ClassVar

import torch
from geminifx.runtime.isa.units import parse_bytes
from task import Backward, Task
from torch import Tensor

from .base import ADAMW, CONTEXT_BYTES, Contestant, cap_memory, use_all_cores

PLANNED_SHARE = 0.6
"""The share of device memory that RoundPipe plans weights and gradients for, by its own default."""


class RoundPipe(Contestant):
    """RoundPipe as its authors run it: float32 masters on the host, whose update the next step does not wait for, so
    that gradients are those of weights one step old. Gradients add up in bfloat16."""

    package = "roundpipe"
    waits: ClassVar[bool] = False
    """Whether a step waits for the update of the one before."""

    def __init__(self, task: Task):
        super().__init__(task)
        cap_memory(task)
        use_all_cores()
        self.module = module = importlib.import_module("roundpipe")
        source = task.random_model(torch.device("cpu"), torch.bfloat16)
        speak_transformers_5(type(source).__name__)
        self.model = module.wrap_model_to_roundpipe(
            source, use_sequential_preset=True, optim_dtype=torch.float32,
            model_run_config=module.RoundPipeRunConfig(num_microbatch=task.microbatches),
        )  # fmt: skip
        weights = self.model.optim_parameters()
        self.optimizer = module.optim.Adam(weights, **ADAMW, decoupled_weight_decay=True)
        self.backwards = task.backwards(torch.device("cpu"))
        when = "exact" if self.waits else "one step stale"
        microbatches = task.microbatches or "its own number of"
        self.facts = {"detail": f"{module.__version__}, {when}, {microbatches} microbatches"}

    @classmethod
    def refusal(cls, task: Task) -> str | None:
        why = super().refusal(replace(task, microbatches=None))
        if why is None and task.device.type != "cuda":
            return "RoundPipe needs a GPU"
        return why

    def step(self) -> Tensor:
        loss = torch.stack([self._backward(backward) for backward in self.backwards]).sum()
        self.model.step(self._update, is_async=not self.waits)
        return loss

    def _backward(self, backward: Backward) -> Tensor:
        """Run forward and backward of all microbatches and return the sum of their losses."""
        # Told how many labels count in all, a microbatch's loss is its part of the whole batch's mean.
        given = {**backward.inputs, "num_items_in_batch": backward.targets, "return_logits": False}
        loss = self.model.forward_backward(input_kwargs=given, loss_fn=lambda out, _: out.loss * backward.share,
                                           run_config=self._run_config())  # fmt: skip
        return loss.detach()

    def _run_config(self) -> Any:
        """Return stages that are planned, as it does by itself for each call, but within the budget instead of all
        that the GPU has free."""
        if self.task.budget is None:
            return self.module.RoundPipeRunConfig()
        total = torch.cuda.get_device_properties(0).total_memory
        limit = PLANNED_SHARE * (parse_bytes(self.task.budget, of=total) - CONTEXT_BYTES) / 2**30
        plan = self.module.ModelExecutePlan.auto("fused", self.model, model_memory_limit=limit)
        return self.module.RoundPipeRunConfig(execute_plan=plan)

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class RoundPipeSync(RoundPipe):
    """RoundPipe, each step with the weights that the one before has updated."""

    waits = True


def speak_transformers_5(model: str) -> None:
    """Let RoundPipe 0.1 call transformers 5, whose masks renamed one argument and dropped another.

    `model` is the name of the class that is trained. Where RoundPipe has no preset for it, it will say so itself.
    """
    presets = importlib.import_module("roundpipe.models")
    where = presets.SUPPORTED_MODELS.get(model)
    if where is None:
        return
    preset = importlib.import_module(where, package=presets.__name__)

    def renamed(make: Any) -> Any:
        def call(*, input_embeds: Tensor, cache_position: Tensor | None = None, **rest: Any) -> Any:
            return make(inputs_embeds=input_embeds, **rest)

        return call

    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        if hasattr(preset, name):
            setattr(preset, name, renamed(getattr(preset, name)))
