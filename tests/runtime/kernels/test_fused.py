"""Fused functions: Inductor computes what they say, rounded between operators as torch's kernels round."""

import pytest
import torch
from geminifx.runtime.kernels.fused import kernel_of
from torch import Tensor

aten = torch.ops.aten


def scaled(x: Tensor, y: Tensor) -> list[Tensor]:
    a = aten.mul.Tensor(x, y)
    b = aten.add.Tensor(a, x)
    return [a, aten.sigmoid.default(b)]


def test_on_the_cpu_it_runs_as_it_stands():
    assert kernel_of(torch.device("cpu"))(scaled) is scaled


@pytest.mark.slow  # builds a kernel
def test_inductor_rounds_as_torchs_kernels_do():
    """The kernel is compiled for where its tensors are: here on a CPU, by the way of a GPU's."""
    x, y = torch.randn(2, 64, 33, dtype=torch.bfloat16).unbind()
    with torch.no_grad():
        found, expected = kernel_of(torch.device("cuda"))(scaled)(x, y), scaled(x, y)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2**-8, atol=0)  # one rounding of another exp
