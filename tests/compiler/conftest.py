"""What tests of compiled models share."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from geminifx.compiler.programs import captures as module


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One for each time that a model is captured: whether it was for a backward."""
    seen: list[bool] = []
    capture = module.capture

    def counted(model: Any, args: Any, kwargs: Any, request: Any) -> Any:
        seen.append(request.backward)
        return capture(model, args, kwargs, request)

    monkeypatch.setattr(module, "capture", counted)
    return seen


@pytest.fixture
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is alive now stays; going through it again for each test takes longest
    gc.disable()
    yield
    gc.enable()
