"""How a world of processes is planned to share the work: models by clusters, as a table.

    python benchmarks/world_plans.py --markdown docs/world_plans.md
    python benchmarks/world_plans.py --models opt-175b --cluster cluster.toml --budget 80GB

By the formulas of the automatic plan, the best of them on the simulator's clock; nothing is run. For each pair it has
the way that `compile(world_size=...)` chooses of those that the product runs, and, where another is faster, the best of
all. --exhaustive puts every way on the clock that is near, and tells how far the choice is from the best of them.
"""

import argparse
import time
from pathlib import Path

import geminifx
import torch
from geminifx.compiler.capture.trace import CaptureRequest
from geminifx.compiler.planner.world.costs import Costs, Priced
from geminifx.compiler.planner.world.model import Model
from geminifx.compiler.planner.world.search import choose
from geminifx.compiler.planner.world.ways import Space
from geminifx.compiler.planner.world.world import World
from geminifx.compiler.rates.clusters import CLUSTERS, Cluster, given_cluster
from geminifx.compiler.rates.rates import ARENA
from geminifx.runtime.isa.errors import BudgetError
from geminifx.runtime.isa.units import format_bytes, format_seconds, parse_bytes
from random_models import config_of, full_name
from transformers import AutoModelForCausalLM

MODELS = ("gpt2-xl", "opt-6.7b", "llama-8b", "mistral-7b", "opt-30b")
BUDGETS = {"8-pcie": "24GB"}
NEAR = 1.5
"""So much slower by the formulas than what was chosen a way is not put on the clock."""

COLUMNS = ("model", "cluster", "way", "step", "bubble", "communication", "a device", "from the best", "planned in")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", type=full_name, default=MODELS)
    made.add_argument("--cluster", nargs="+", default=list(CLUSTERS), help="names, or TOML files")
    made.add_argument("--budget", default=None, help="of each device; default: 80GB, on 8-pcie 24GB")
    made.add_argument("--examples", type=int, default=4, help="of a step, for each device")
    made.add_argument("--seq", type=int, default=1024, help="tokens of an example")
    made.add_argument("--exhaustive", action="store_true", help="compare with all ways on the clock")
    made.add_argument("--markdown", type=Path, default=None, help="write the table here")
    return made


def measured(name: str, seq: int) -> Model:
    """What the blocks of a model take, whose weights are on `meta`."""
    with geminifx.init_empty():
        model = AutoModelForCausalLM.from_config(config_of(name, seq=seq)).train()
    tokens = torch.empty((1, seq), dtype=torch.int64, device="meta")
    return Model.of(model, ((), {"input_ids": tokens, "labels": tokens}), CaptureRequest(torch.bfloat16))


def rows(name: str, model: Model, cluster: Cluster, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """What is chosen, and the best that the product does not run yet."""
    budget = parse_bytes(args.budget or BUDGETS.get(cluster.name, "80GB"))
    host_bytes = None if cluster.host_bytes is None else int(0.9 * cluster.host_bytes) // cluster.devices
    world = World(cluster, cluster.rates or ARENA, args.examples * cluster.size, budget, host_bytes)
    runs = Space(cluster.size, world.examples, len(model.parts), model.heads)
    every = Space(cluster.size, world.examples, len(model.parts), model.heads, refusal=lambda way: "")
    found: list[tuple[str, ...]] = []
    for space, what in ((runs, ""), (every, "not run yet: ")):
        began_s = time.perf_counter()
        try:
            chosen = choose(model, world, space).chosen
        except BudgetError:
            found.append((name, cluster.name, what + "nothing fits", *[""] * 6))
            continue
        took_s = time.perf_counter() - began_s
        if not any(row[2] == str(chosen.way) for row in found):
            gap = gap_to_best(model, world, space, chosen) if args.exhaustive else ""
            found.append((name, cluster.name, what + str(chosen.way), *cells(chosen), gap, format_seconds(took_s)))
    return found


def cells(chosen: Priced) -> tuple[str, ...]:
    return (
        format_seconds(chosen.step_s), f"{chosen.bubble:.1%}", format_seconds(chosen.exchange_s),
        format_bytes(chosen.device_bytes),
    )  # fmt: skip


def gap_to_best(model: Model, world: World, space: Space, chosen: Priced) -> str:
    costs = Costs(model, world)
    priced = (costs.priced(way) for way in space.ways())
    near = (each.way for each in priced if each is not None and each.step_s < NEAR * chosen.step_s)
    return f"{chosen.step_s / min(costs.simulated(way).step_s for way in near) - 1:.1%}"


def main() -> None:
    args = parser().parse_args()
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    print("\n".join(lines), flush=True)
    for name in args.models:
        model = measured(name, args.seq)
        for cluster in filter(None, map(given_cluster, args.cluster)):
            for row in rows(name, model, cluster, args):
                lines.append("| " + " | ".join(row) + " |")
                print(lines[-1], flush=True)
    if args.markdown is not None:
        begin = args.markdown.read_text(encoding="utf-8").partition("| model |")[0] if args.markdown.exists() else ""
        args.markdown.write_text(begin + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
