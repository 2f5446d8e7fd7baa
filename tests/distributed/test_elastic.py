"""Ranks that die are started again by torchrun: they meet, and `geminifx train --resume auto` goes on."""

import json
import random
from pathlib import Path

import pytest
import torch
from launching import meeting_store, ranks_of, torchrun
from trainable import SMALL_OPT
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "elastic.py"
MEETING = Path(__file__).parent / "meeting.py"
STEPS, SAVE_EVERY = 24, 4


def trained(folder: Path, deaths: str) -> tuple[dict[int, str], int]:
    """The loss of each step, the one that it had when it was made last; and how many steps were made in all."""
    words = ["small.json", "--data", "data.txt", "--steps", str(STEPS), "--batch-size", "4", "--seq-len", "16"]
    words += ["--lr", "0.01", "--output", str(folder), "--parallel", "data=2,zero=1", "--resume", "auto"]
    losses = folder.parent / f"{folder.name} losses"
    restarts = ("--max-restarts", "3")
    done = torchrun(SCRIPT, deaths, str(losses), "train", *words, "--save-every", str(SAVE_EVERY), options=restarts)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in losses.read_text().splitlines()]
    return {int(step): loss for step, loss in lines}, len(lines)


@pytest.mark.slow
def test_ranks_that_are_started_again_meet_each_other_and_not_those_that_died() -> None:
    """The store still has the addresses of the dead: a rank that comes before the others finds these there."""
    store = meeting_store()
    for start in range(2):
        ended = ranks_of(MEETING, ranks=2, store=store, start=start)
        assert ended == [(7, "[0, 1]\n")] * 2


@pytest.mark.campaign(whole=True)
def test_ranks_that_die_are_started_again_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.json").write_text(json.dumps({**SMALL_OPT, "dropout": 0.2}))
    Path("data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    chance = random.Random(0)
    steps = [chance.randint(1, SAVE_EVERY - 1), chance.randint(9, 22)]  # before anything is saved, and later
    deaths = ",".join(f"{start}:{chance.randrange(2)}@{step}" for start, step in enumerate(steps))
    whole, count = trained(tmp_path / "whole", "")
    parts, count_in_parts = trained(tmp_path / "parts", deaths)
    assert parts == whole and len(whole) == count == STEPS
    assert STEPS < count_in_parts <= STEPS + 2 * 3 * SAVE_EVERY, deaths
    one, other = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
