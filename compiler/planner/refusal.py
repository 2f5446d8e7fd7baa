"""The error for when nothing fits: the smallest budget that would, and what takes the space."""

from collections.abc import Sequence

from ...passes.program.estimate import Estimate
from ...passes.program.plan import Plan
from ...passes.program.program import Program, type_of
from ...runtime.isa.errors import BudgetError
from ...runtime.isa.units import format_bytes
from .memory import Limits


def refusal(refused: Sequence[tuple[Plan, Program]], limits: Limits, are_placed: bool = False) -> BudgetError:
    """The error that explains why none of these plans can run. Where some fit the device, it is about the host;
    otherwise it is about the plan with the lowest peak. If `are_placed`, the plans leave training states where they
    are, and a smaller budget might do with these elsewhere."""
    on_device = [plan for plan, _ in refused if limits.allow_on_device(plan)]
    if on_device:
        return _host_refusal(min((plan.estimate for plan in on_device), key=lambda e: e.host_bytes), limits)
    best, program = min(refused, key=lambda tried: tried[0].peak_bytes)
    inputs = ", ".join(f"{node.name} {type_of(node)}" for node in program.inputs("input").values())
    taking = ", ".join(f"{name} {format_bytes(n)}" for name, n in best.estimate.at_peak[:4])
    placed = " with the training state where it is" if are_placed and best.request.policy == "auto" else ""
    advice = "" if best.request.policy != "cuda" else " placement='auto' or 'cpu' keeps the training state on the host."
    return BudgetError(
        f"a device budget of {limits.device_bytes:,} bytes ({format_bytes(limits.device_bytes or 0)}) is too small "
        f"for placement='{best.request.policy}'; the smallest that works for these inputs ({inputs}){placed} is "
        f"{best.peak_bytes:,} bytes ({format_bytes(best.peak_bytes)}), whose peak consists of: {taking}.{advice} A "
        "smaller batch or sequence needs less",
        smallest_bytes=best.peak_bytes,
    )


def _host_refusal(expected: Estimate, limits: Limits) -> BudgetError:
    needs, less = f"the training state needs {format_bytes(expected.host_bytes)} of host memory", ""
    if expected.offloaded_bytes:
        needs += f", with {format_bytes(expected.offloaded_bytes)} of offloaded activations"
        less = ", offload fewer blocks (offload=)"
    return BudgetError(
        f"{needs}, but {format_bytes(limits.host_bytes)} may be used; free host memory, raise host_budget{less}, or "
        "raise device_budget so that more of it fits on the device. model.optimizer(..., in_backward=True) needs "
        "less, and moments='bf16' or 'int8' and masters='bf16-stochastic' even less",
        smallest_bytes=expected.host_bytes,
        tier="host",
    )
