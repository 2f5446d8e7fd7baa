"""The benchmark of a second process: what it asks of the other one, and what it finds; here a tier that shrinks."""

import json
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import second_process
import torch
from random_models import config_of
from systems.ours import Ours
from task import Task

STEPS = (2, 2, 20)


class Tier:
    """In place of another process."""

    def __init__(self, contestant: Ours) -> None:
        self.tier = contestant.model.session.hardware.device_tier
        self.asked = self.tier.limit_bytes

    def leave(self, left_bytes: int) -> int:
        self.tier.limit_bytes = left_bytes
        return 1

    def free(self) -> int:
        self.tier.limit_bytes = self.asked
        return 0


def found(contestant: Ours, second: Any) -> list[dict[str, Any]]:
    return second_process.trained(contestant, STEPS, contestant.model.plan.peak_bytes // 5, second)


def test_the_plan_shrinks_and_grows_back_with_the_same_losses(tmp_path: Path) -> None:
    config = config_of("llama-mini")
    config.update({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256})
    config.save_pretrained(tmp_path)
    model = str(tmp_path / "config.json")
    task = Task(model, 2, 32, budget=str(Ours(Task(model, 2, 32)).model.plan.peak_bytes))
    calm, ours = found(Ours(task), None), Ours(task)
    pressed = found(ours, Tier(ours))
    told = second_process.compared(calm, pressed, STEPS)
    assert told["the same losses"] and told["it shrank"] and told["it grew back"]
    assert [one["theirs_bytes"] for one in pressed] == [0, 0, 1, 1, *[0] * 20]
    assert not second_process.compared(calm, calm, STEPS)["it shrank"]


class Gpu:
    """In place of `torch`: a GPU of some bytes, of which the other process's context and whoever else take some."""

    uint8, OutOfMemoryError = torch.uint8, MemoryError

    def __init__(self, others_bytes: int) -> None:
        self.cuda, self.others_bytes, self.pieces = self, others_bytes, 0

    def empty(self, size: int, **_: object) -> SimpleNamespace:
        if self.mem_get_info()[0] < size:
            raise self.OutOfMemoryError
        self.pieces += size
        return SimpleNamespace(nbytes=size)

    def empty_cache(self) -> None:
        self.pieces = 0

    def mem_get_info(self) -> tuple[int, int]:
        return 1000 - self.others_bytes - self.pieces, 1000


class Told:
    """In place of a connection to a process that says this and ends: what was answered, and what was free then."""

    def __init__(self, gpu: Gpu, *words: int | None) -> None:
        self.gpu, self.words, self.answers = gpu, list(words), list[tuple[int, int]]()

    def recv(self) -> int | None:
        if not self.words:
            raise EOFError
        return self.words.pop(0)

    def send(self, answer: int) -> None:
        self.answers.append((answer, self.gpu.mem_get_info()[0]))


def test_the_other_process_leaves_what_it_is_told_whatever_else_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(others_bytes=299)
    monkeypatch.setattr(second_process, "torch", gpu)
    monkeypatch.setattr(second_process, "PIECE_BYTES", 50)
    conn = Told(gpu, 400, 500, 330, -1, None)
    second_process._obey(conn)  # type: ignore[arg-type]
    assert conn.answers == [(0, 700), (301, 400), (301, 400), (401, 300), (701, 0), (0, 701)]


def test_what_ours_holds_is_of_what_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds 300 bytes now, and may hold 500: so 200 are to stay free."""
    second = object.__new__(second_process.Second)
    second.memory = SimpleNamespace(room_bytes=lambda: 701)
    second.ours, theirs = Pipe()
    monkeypatch.setattr(second_process, "torch", Gpu(others_bytes=599))
    theirs.send(7)
    assert second.leave(500) == 7 and theirs.recv() == 200


@pytest.mark.parametrize("wrong", [None, "the same losses", "it shrank", "it grew back"])
def test_the_exit_status_tells_whether_all_was_found(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"the same losses": True, "it shrank": True, "it grew back": True, "planned peaks": ["1 GiB"]}
    if wrong is not None:
        found[wrong] = False
    for name in ("Task", "Ours", "Second", "trained"):
        monkeypatch.setattr(second_process, name, MagicMock())
    monkeypatch.setattr(second_process, "compared", lambda *_: found)
    monkeypatch.setattr(second_process, "torch", MagicMock())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert second_process.main([]) == (wrong is not None)
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU it would fill that")
def test_without_a_gpu_it_says_that_it_needs_one() -> None:
    with pytest.raises(SystemExit, match="with one"):
        second_process.main([])
