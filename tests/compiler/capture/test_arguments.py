"""Whether processes that share a batch were given the same is asked once for every program, by all of them."""

from dataclasses import replace

import geminifx
import torch
from geminifx.compiler import session as sessions
from geminifx.runtime.executor import Executor
from torch import nn


def test_a_program_in_the_place_of_another_is_asked_for_too(monkeypatch):
    asked = []
    monkeypatch.setattr(sessions, "check_shared", lambda ranks, inputs: asked.append(inputs))
    batch = torch.ones(4, 8)
    parallel = {"tensor": "1d:2"}
    model = geminifx.compile(nn.Linear(8, 8), world_size=2, parallel=parallel, example_inputs=(batch,))
    session = model.session
    compiled = session.program((batch,), {})
    for _ in range(2):
        session.inputs(compiled, (batch,), {})
    assert len(asked) == 1
    executors = [Executor(compiled.executor.code, compiled.executor.machine, None) for _ in range(20)]
    for executor in executors:  # each program is freed before the next is made, which then often has its address
        session.inputs(replace(compiled, executor=executor), (batch,), {})
    assert len(asked) == 21
