"""The batches of a step: the same for every system, divided without a rest, padded alike."""

import pytest
import torch
from task import IGNORED, Task

CPU = torch.device("cpu")


def joined(parts, name):
    return torch.cat([part.inputs[name] for part in parts])


@pytest.mark.parametrize("pad", [False, True])
def test_all_processes_together_have_the_step_of_one(pad):
    task = Task("opt-mini", 4, 32, accumulate=3, pad=pad)
    whole, halves = task.backwards(CPU), [task.backwards(CPU, 2, part) for part in range(2)]
    assert len(whole) == 3 and all(backward.inputs["input_ids"].shape == (4, 32) for backward in whole)
    for i, backward in enumerate(whole):
        mine = [half[i] for half in halves]
        assert all(torch.equal(joined(mine, name), backward.inputs[name]) for name in backward.inputs)
        assert sum(part.targets for part in mine) == backward.targets
    assert sum(backward.share for backward in whole) == pytest.approx(1)
    assert sum(part.share for half in halves for part in half) / 2 == pytest.approx(1)
    every = task.inputs()
    assert all(torch.equal(joined(whole, name), every[name]) for name in every)


def test_padding_stands_on_the_right_and_does_not_count():
    task = Task("llama-mini", 8, 64, accumulate=2, pad=True)
    inputs = task.inputs()
    mask, labels, ids = inputs["attention_mask"], inputs["labels"], inputs["input_ids"]
    lengths = mask.sum(1)
    assert torch.equal(mask, (torch.arange(64) < lengths[:, None]).long())
    assert lengths.min() >= 32 and lengths.max() <= 64 and len(lengths.unique()) > 4
    assert torch.equal(labels == IGNORED, mask == 0) and torch.equal(labels[mask == 1], ids[mask == 1])
    assert task.tokens() == lengths.sum() and sum(b.targets for b in task.backwards(CPU)) == (lengths - 1).sum()
    again = task.inputs()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_without_padding_every_token_counts():
    task = Task("opt-mini", 4, 32, accumulate=2)
    assert task.inputs().keys() == {"input_ids", "labels"} and task.tokens() == 2 * 4 * 32
    assert [backward.share for backward in task.backwards(CPU)] == [0.5, 0.5]


def test_images_are_counted_as_images():
    task = Task("vit-l", 2, 1024, accumulate=2)
    backward = task.backwards(CPU, pixels=torch.bfloat16)[0]
    assert backward.inputs["pixel_values"].shape == (2, 3, 224, 224)
    assert backward.inputs["pixel_values"].dtype == torch.bfloat16 and backward.inputs["labels"].dtype == torch.int64
    assert task.tokens() == 4 and task.described()["seq"] is None


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a batch of 3 does not divide by 2 processes"):
        Task("opt-mini", 3, 32).backwards(CPU, 2, 0)
