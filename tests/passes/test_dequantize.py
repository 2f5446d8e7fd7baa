"""dequantize: between forward and backward there are codes alone."""

from geminifx.passes.dequantize import dequantize
from geminifx.passes.program.plan import Plan


def test_before_and_after(golden):
    golden("backward_reads_it", dequantize, Plan())
