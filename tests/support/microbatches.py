"""Batches that run as microbatches: models and batches to train, and how near to plain PyTorch's what comes out is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from more_models import t5
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from zoo import BLOCKS, GPT2, LLAMA, MLP, OPT, VOCAB, Batch, Case, Trace, compiled, cross_entropy, opt

ROWS = 4
STEPS = 3


def padded(batch: int = ROWS, seed: int = 0) -> Batch:
    """Rows of 8, 7, 3 and 1 tokens, on the right and on the left."""
    ids = torch.randint(1, VOCAB, (batch, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, :5], mask[3, 1:] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pixels(batch: int = ROWS, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"input": torch.randn(batch, 3, 8, 8, generator=generator), "target": torch.arange(batch) % 3}


def convolutions() -> nn.Module:
    stages = (nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2))
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(16, 3))


def whole(case: Case) -> Case:
    return replace(case, batch=lambda batch=ROWS, seed=0: case.batch(batch=batch, seed=seed))


UNTIED = replace(whole(OPT), build=lambda: opt(tie_word_embeddings=False))
T5 = Case("t5", t5, padded, exact=False)
CASES = {
    "opt": whole(OPT),
    "opt, padded": replace(OPT, batch=padded),
    "gpt2, tied, padded": replace(GPT2, batch=padded),
    "llama": whole(LLAMA),
    "t5, padded": T5,
    "convolutions": Case("convolutions", convolutions, pixels, cross_entropy),
    "loss outside": whole(MLP),
    "no gradient for some": whole(BLOCKS),
}


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int = 1,
          clip: Callable[[], Any] | None = None) -> Trace:  # fmt: skip
    trace = Trace()
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            loss = case.loss(model, case.batch(seed=10 * step + part)) / accumulate
            loss.backward()
        trace.record(model, loss)
        if clip is not None:
            clip()
        optimizer.step()
    return trace


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def close(found: Tensor, expected: Tensor, scale: float) -> bool:
    """As `test_numerics.close`: two sums of the same terms, here below 2^9 of them, in any order."""
    return (found - expected).abs().max().item() <= scale * 2**-15


def assert_near(found: Trace, expected: Trace) -> None:
    for a, b in zip(found.losses, expected.losses, strict=True):
        assert close(a, b, b.item())
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        scale = max(gradient.abs().max().item() for gradient in b.values() if gradient is not None)
        for name in b:
            assert (a[name] is None) == (b[name] is None), name
            assert a[name] is None or close(a[name], b[name], scale), f"{name}: {(a[name] - b[name]).abs().max()}"


def assert_near_state(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert close(found.state_dict()[name], value, max(1.0, value.abs().max().item())), name


def parts(batch: Batch, count: int) -> list[Batch]:
    pieces = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: value[i] for name, value in pieces.items()} for i in range(count)]


def dropping() -> nn.Module:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, **rates))


class Loss(nn.Module):
    """A linear layer under a loss."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.of = nn.Linear(4, 3), of

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": self.of(self.layer(x), y)}


def both() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator)


def assert_draws_of_calls_with_the_parts(**options: Any) -> None:
    """Dropout, and the generator behind it, are those of plain calls with the parts of the batch, one after another."""
    case, count = replace(whole(OPT), build=dropping), 4
    plain, model = case.seeded(), compiled(case, microbatches=count, fuse_loss=False, **options)
    torch.manual_seed(7)
    results = [plain(**part) for part in parts(case.batch(), count)]
    (sum(result.loss for result in results) / count).backward()
    left = torch.get_rng_state()
    torch.manual_seed(7)
    result = model(**case.batch())
    assert torch.equal(torch.get_rng_state(), left)
    assert torch.equal(result.logits, torch.cat([result.logits for result in results]))
    torch.manual_seed(1)  # what is recomputed draws the forward's numbers
    result.loss.backward()
    for name, parameter in model.named_parameters():
        assert close(parameter.grad, plain.get_parameter(name).grad, 1.0), name
