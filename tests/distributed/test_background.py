"""save_checkpoint(background=True) by two ranks, whose threads exchange while they train."""

import json
import os
from pathlib import Path

import pytest
from launching import ranks_of

SCRIPT = Path(__file__).parent / "background.py"


@pytest.mark.slow
def test_two_ranks_save_while_they_train(tmp_path: Path) -> None:
    ended = ranks_of(SCRIPT, str(tmp_path))
    assert [code for code, _ in ended] == [0, 0], ended
    found = [json.loads(output.splitlines()[-1]) for _, output in ended]
    failures = [each.pop("failures") for each in found]
    assert found == [{"zero 2": True, "data": True, "1d": True}] * 2
    for unwritten, no_room, at_last in failures:
        assert "rank 1 failed with OSError: [Errno 28] No space left" in unwritten[1]
        assert "saving a checkpoint in the background needs a copy of" in no_room[1]
        assert at_last == ["", ""]
    assert [each[1][0] for each in failures] == ["StateError", "CheckpointError"]
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith(".")) == []
