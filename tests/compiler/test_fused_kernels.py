"""kernels="fused": where functions run as they stand, on the CPU, training is plain PyTorch's bit for bit."""

import geminifx
import pytest
import torch
from geminifx.runtime.isa.errors import ArgumentError
from zoo import Case, compiled, gpt2, llama, opt, train

OPT, GPT2, LLAMA = Case("opt", opt), Case("gpt2, tied", gpt2), Case("llama", llama, exact=False)
WAYS = {
    "device": {"placement": "cuda", "recompute": "none"},
    "host, recomputed": {"placement": "cpu", "recompute": "all"},
    "microbatches": {"placement": "cpu", "microbatches": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in (OPT, GPT2, LLAMA)])
def test_training_is_what_exact_kernels_make_of_it(case: Case, way: str) -> None:
    traces = []
    for kernels in ("exact", "fused"):
        model = compiled(case, kernels=kernels, **WAYS[way])
        traces.append(train(case, model, steps=2))
        assert ("@geminifx.fused" in model.graph["training"]) == (kernels == "fused")
        assert model.stats.device_peak_bytes <= model.plan.peak_bytes
    exact, fused = traces
    assert all(map(torch.equal, exact.losses, fused.losses))
    for before, after in zip(exact.gradients, fused.gradients, strict=True):
        assert before.keys() == after.keys()
        for name, gradient in before.items():
            assert torch.equal(gradient, after[name]) if gradient is not None else after[name] is None


def test_the_plan_keeps_what_was_asked_for_and_others_are_refused() -> None:
    plan = compiled(OPT, kernels="fused").plan
    assert geminifx.Plan.from_json(plan.to_json()).request.kernels == "fused" and "fused" in str(plan)
    with pytest.raises(ArgumentError, match="kernels='fast'"):
        compiled(OPT, kernels="fast")


def test_a_plan_that_is_fed_back_keeps_its_kernels_and_the_search_for_infinities_goes_through_them() -> None:
    plan = compiled(OPT, kernels="fused").plan
    model = compiled(OPT, plan=plan)
    assert model.plan.request.kernels == "fused" and "@geminifx.fused" in model.graph["training"]
    assert model.first_nonfinite(**OPT.batch()) is None
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.inf)
    assert "parameter" in str(model.first_nonfinite(**OPT.batch()))
