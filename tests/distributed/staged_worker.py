"""One rank of the tests of a pipeline's state: `torchrun --nproc-per-node N staged_worker.py OUT NAME...`.

Layers are divided by hand, and gradients are made up: there are no programs. Rank 0 writes to OUT what all ranks found
of each of WORLDS; checkpoints lie beside OUT.
"""

import os
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import geminifx
import torch
from geminifx.runtime.isa.homes import Home, Where
from staged import HOST, World, backward, compiled, gradients, placed, tied
from torch import Tensor, nn
from torch import distributed as dist

STEPS, CLIP = 3, 0.5
WORLDS: dict[int, dict[str, World]] = {
    2: {"pipeline": World(2)},
    4: {
        "four stages": World(4),
        "data": World(2, data=2),
        "zero 2": World(2, data=2, zero=2),
        "zero 3, on the device": World(2, data=2, zero=3),
        "tensor": World(2, tensor=2),
        "alone in tensors": World(tensor=4),
    },
}


def groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups by name, as weight decay has them."""
    decays = [p for name, p in parameters.items() if p.requires_grad and p.ndim > 1]
    others = [p for name, p in parameters.items() if p.requires_grad and p.ndim == 1]
    return [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def own(model: geminifx.CompiledModule, **declared: Any) -> torch.optim.Optimizer:
    return model.optimizer(torch.optim.AdamW, groups(dict(model.named_parameters())), lr=1e-2, **declared)


def torchs(model: geminifx.CompiledModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(dict(model.named_parameters())), lr=1e-2, fused=True)


Made = tuple[geminifx.CompiledModule, torch.optim.Optimizer]
KINDS: dict[str, Callable[[geminifx.CompiledModule], torch.optim.Optimizer]] = {"own": own, "torch's": torchs}


def made(kind: str, world: World, seed: int = 0, home: Home = HOST, device: str = "cpu") -> Made:
    with torch.device(device):
        source = tied(seed)
    model = compiled(source, world, precision="fp32")
    optimizer = KINDS[kind](model)
    return placed(model, world, home), optimizer


def train(model: geminifx.CompiledModule, optimizer: torch.optim.Optimizer, first: int = 0) -> list[float]:
    """A few steps, every one of which is clipped, by a schedule: their norms."""
    norms = []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(first, first + STEPS):
        backward(model, gradients(step))
        norms.append(model.clip_grad_norm_(CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return norms


def values(model: geminifx.CompiledModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def optimizer_state(kind: str, optimizer: torch.optim.Optimizer) -> Any:
    """That of torch's optimizers is each rank's own."""
    return deepcopy(optimizer.state_dict()) if kind == "own" else None


def told(action: Callable[[], Any]) -> str:
    try:
        action()
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def absent(model: geminifx.CompiledModule, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What this process finds of the parameters that others have."""
    elsewhere = model.session.store().chunks.elsewhere
    lacking = {name: p for name, p in model.named_parameters() if name in elsewhere}
    return {
        "names": list(lacking),
        "shapes": {name: tuple(p.shape) for name, p in model.named_parameters()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": [p.grad for p in lacking.values()],
        "read": [told(p.sum) for p in lacking.values()],
        "written": [told(lambda p=p: p.data.zero_()) for p in lacking.values()],
        "in groups": [len(group["params"]) for group in optimizer.param_groups],
        "bytes": sum(p.numel() * p.itemsize for name, p in model.named_parameters() if name not in elsewhere),
    }


def overflow(world: World) -> dict[str, Any]:
    """Of float16: steps, in the second of which a gradient of the last layer alone is infinite."""
    model = compiled(tied(), world, precision="fp16")
    optimizer = own(model, max_grad_norm=CLIP)
    placed(model, world)
    norms, scales = [], []
    for step in range(STEPS):
        whole = {name: gradient / 8 for name, gradient in gradients(step).items()}  # in float16's range when scaled
        if step == 1:
            whole["second.bias"][-1] = torch.inf
        backward(model, whole)
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
        scales.append(optimizer.loss_scale)
    return {"norms": norms, "scales": scales, "skipped": optimizer.skipped_steps, "state": values(model)}


def go_through(kind: str, name: str, world: World, before: Path) -> dict[str, Any]:
    """Train, save in every way, load into models of another seed, and train on; and load what is `before`."""
    folder = before.parent
    home = Home(Where.DEVICE, resident=True) if "device" in name else HOST
    model, optimizer = made(kind, world, home=home)
    found: dict[str, Any] = {"absent": absent(model, optimizer), "norms": train(model, optimizer)}
    found |= {"state": values(model), "optimizer": optimizer_state(kind, optimizer)}
    geminifx.save_checkpoint(model, optimizer, folder / f"{name}, {kind}", extra=name)
    model.save_pretrained(folder / f"{name}, {kind}, pretrained")
    saving = geminifx.save_checkpoint(model, optimizer, folder / f"{name}, {kind}, background", background=True)
    found["norms later"] = train(model, optimizer, STEPS)
    saving.result()
    found["state later"] = values(model)
    found["first only"] = len(model.state_dict(first_only=True))
    for way in ("", ", background"):
        again, other = made(kind, world, seed=1, home=home)
        geminifx.load_checkpoint(again, other, folder / f"{name}, {kind}{way}")
        found[f"loaded{way}"] = values(again), optimizer_state(kind, other)
        found[f"norms again{way}"] = train(again, other, STEPS)
        found[f"state again{way}"] = values(again)
    if kind == "own":
        again, other = made(kind, world, seed=1, home=home)
        again.load_state_dict(found["state"])
        other.load_state_dict(found["optimizer"])
        found["loaded whole"] = values(again), optimizer_state(kind, other)
    again, other = made(kind, world, home=home, device="meta")
    geminifx.load_checkpoint(again, other, folder / f"{name}, {kind}")
    found["loaded on meta"] = values(again), optimizer_state(kind, other)
    again, _ = made(kind, world, home=home, device="meta")
    again.load_state_dict(found["state"])
    found["loaded whole on meta"] = values(again)
    again, other = made(kind, world, seed=1, home=home)
    extra = geminifx.load_checkpoint(again, other, before)
    found["before"] = extra, values(again), optimizer_state(kind, other)
    return found


def everyones(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def main(out: Path, *names: str) -> None:
    worlds, found = WORLDS[int(os.environ["WORLD_SIZE"])], {}
    for kind in KINDS:
        before = out.parent / f"one, {kind}"
        for name in (name for name in names if kind == "own" or not worlds[name].zero):
            found[f"{name}, {kind}"] = everyones(go_through(kind, name, worlds[name], before))
            before = out.parent / f"{name}, {kind}"
    for name in names:
        found[f"{name}, overflow"] = everyones(overflow(worlds[name]))
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
