"""Whether processes that share a batch were given the same is asked at every call, and of all of it once a program."""

from dataclasses import replace

import geminifx
import torch
from geminifx.compiler import session as sessions
from geminifx.compiler.capture import arguments
from geminifx.compiler.capture.arguments import SAMPLE
from geminifx.runtime.executor import Executor
from torch import nn


def test_a_program_in_the_place_of_another_is_asked_for_too(monkeypatch):
    asked = []
    monkeypatch.setattr(sessions, "check_shared", lambda ranks, arguments, every_element: asked.append(every_element))
    batch = torch.ones(4, 8)
    parallel = {"tensor": "1d:2"}
    model = geminifx.compile(nn.Linear(8, 8), world_size=2, parallel=parallel, example_inputs=(batch,))
    session = model.session
    compiled = session.program((batch,), {})
    for _ in range(2):
        session.inputs(compiled, (batch,), {})
    assert asked == [True, False]
    executors = [Executor(compiled.executor.code, compiled.executor.machine, None) for _ in range(20)]
    for executor in executors:  # each program is freed before the next is made, which then often has its address
        session.inputs(replace(compiled, executor=executor), (batch,), {})
    assert asked[2:] == [True] * 20


class Told:
    """The digests that this rank was to compare with others'."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def check_batch(self, digest: str) -> None:
        self.digests.append(digest)


def test_other_batches_have_other_digests():
    ids = torch.arange(SAMPLE * 8).view(8, SAMPLE)
    later, bits = ids.roll(1), torch.rand(7, 5).t()
    told = Told()
    batches = ({"ids": ids}, {"ids": later}, {"ids": ids, "mask": bits}, (ids.bool(), None, 3), {"ids": ids.clone()})
    for every_element in (False, True):
        for batch in batches:
            arguments.check_shared(told, batch, every_element=every_element)
    for digests in (told.digests[:5], told.digests[5:]):
        assert len(set(digests)) == 4 and digests[0] == digests[4]
    for batch in (torch.zeros(()), torch.zeros(0, 3), torch.zeros(3, dtype=torch.bfloat16)):
        arguments.check_shared(told, batch, every_element=False)
