"""Tests of the compiler run in the arena in RAM on every machine; those of CUDA stand in test_cuda.py."""

import pytest
import torch


@pytest.fixture(autouse=True)
def arena(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.name != "test_cuda.py":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
