"""`geminifx.compile`, the entry point."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..runtime.isa.errors import REFUSALS, ArgumentError, wrong_argument
from .arguments import check_call, forward_failure
from .capture.microbatches import as_arguments
from .capture.refusals import refuse
from .module import CompiledModule
from .options import Options
from .programs.guess import of_a_guess
from .weights.foreign_layers import adopt_quantized
from .weights.quantized_weights import restored_on_failure
from .world import Settled, settle, settle_otherwise


@Options.shown_by
def compile(model: nn.Module, device_budget: int | str | None = None, world_size: int | None = None,
            **options: Any) -> CompiledModule:  # fmt: skip
    """Turn a model into one that trains within `device_budget`.

    Args:
        model: any nn.Module; its weights may still be on `meta`.
        device_budget: device memory the whole process may use: bytes, "24GB" (10^9), "24GiB" (2^30), "80%".
        world_size: number of processes to train on; by default those that torchrun launched. If it or the option
            `cluster`, which describes the machines, is given, the planner chooses how the processes share the work,
            unless the option `parallel` says so. With none of the three, training is data parallel.
        options: fields of `geminifx.Options`, which documents each.

    Returns:
        A module with the same call, outputs and parameter names. It is captured and planned at once if there are
        `example_inputs=`, or if the planner chose how its processes share the work; otherwise at its first call, or,
        for a Hugging Face model, already when its plan, graph or state is asked for, with inputs made from its
        configuration.

    Raises:
        ArgumentError: an option is unknown or makes no sense; also a ValueError.
        ValueError: the model is of a kind that cannot be captured.
        BudgetError: nothing fits the budget; names the smallest that would and what takes the space.
        CaptureError: the model's Python depends on the values of tensors.
    """
    if not isinstance(model, nn.Module):
        raise wrong_argument("model", model, "a torch.nn.Module")
    if isinstance(model, CompiledModule):
        raise ArgumentError(
            "model: this model is already compiled; to change options, compile the original model again"
        )
    refuse(model)
    chosen = Options.of({"device_budget": device_budget, "world_size": world_size, **options})
    with restored_on_failure(model):
        adopt_quantized(model)
        settled = settle(model, chosen)
        while True:
            try:
                return _compiled_alike(model, settled)
            except REFUSALS as refusal:
                settled = settle_otherwise(settled, chosen, refusal)


def _compiled_alike(model: nn.Module, settled: Settled) -> CompiledModule:
    """Compiles the model. If any process refuses the strategy that all chose together, all raise, to try the next."""
    compiled = refusal = None
    try:
        compiled = _compiled(model, settled)
    except REFUSALS as error:
        refusal = error
    settled.ranks.raise_alike(refusal)
    assert compiled is not None
    return compiled


def _compiled(model: nn.Module, settled: Settled) -> CompiledModule:
    """Compiles the model, and captures and plans it at once if there are inputs to plan by."""
    compiled, chosen = CompiledModule(model, settled.options, settled), settled.options
    if chosen.example_inputs is not None:
        _prepare(compiled, chosen.example_inputs)
    elif settled.guess is not None:
        with of_a_guess():
            _prepare(compiled, settled.guess)
    elif chosen.plan is not None or chosen.dump is not None:  # a plan to check, or a dump to write
        compiled.session.plan_by_guess()
    return compiled


def _prepare(compiled: CompiledModule, examples: Mapping[str, Any] | tuple[Any, ...]) -> None:
    """Captures and plans with example inputs. Raises ArgumentError if the model does not take them."""
    source = compiled.session.source
    args, kwargs = as_arguments(examples)
    check_call(compiled, args, kwargs)
    try:
        with torch.enable_grad():
            compiled.prepare(*args, **kwargs)
    except Exception as error:
        failure = forward_failure(error, source)
        if failure is None:
            raise
        raise failure from error
