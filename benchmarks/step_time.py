"""Seconds per training step by several systems: same model, weights, batches, device budget, machine and run.

    python benchmarks/step_time.py --points 1.3b:8 2.7b:8 --budget 24GiB --systems ours fsdp2 --json step_time.json
    python benchmarks/step_time.py --points llama-3b:8 --accumulate 8 --budget 24GiB --systems ours roundpipe
    python benchmarks/step_time.py --points 1.3b:8 gpt2-xl:1 --pad --dropout 0.1 --systems ours plain compile
    python benchmarks/step_time.py --points 1.3b:16 --budget none --nprocs 8 --systems ours fsdp2 --parallel zero=3
    python benchmarks/step_time.py --points gpt2-xl:8 --systems ours --microbatches 8 --parallel data=1 pipeline=1:4
    python benchmarks/step_time.py --points opt-175b:1 --plan-only --recompute all --host-budget 4TB
    python benchmarks/step_time.py --points 1.3b:4 --plan-only --rates rtx4090 --budget 22GiB --host-budget 100GB
    python benchmarks/step_time.py --plot step_time.json -o step_time.svg    # needs matplotlib

A point is model:batch; models are OPT ("1.3b" is "opt-1.3b"), Llama, GPT-2, Qwen, Gemma, Mistral and ViT by name (see
`random_models.py`), or any Hugging Face config.json. Its batch is that of one backward. A step has --accumulate
backwards, each with a batch of its own, and one update: `llama-3b:8 --accumulate 8` is 64 sequences a step. The loss
of a step is the mean over all its tokens, padding left out, as that of one large batch would be.

Random weights, random tokens, AdamW. Every point of every system (`systems/`) runs in a process of its own, so that one
which is out of memory is a line of the table like any other. The device is synchronised after each step; the figure is
the median without the first three steps (without the first half where there are fewer than six). Device bytes are the
driver's, of rank 0 where there are several processes, which share the batch. Each result is appended to one CSV, with
the commit, the machine and the command line (`results_csv.py`). On a machine without a GPU everything runs on the CPU,
which shows that it runs: try `--points mini:2 llama-mini:2 --seq 128 --budget none`.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from measuring import work
from processes import run_worker
from random_models import config_of, full_name, reads_images
from results_csv import ROOT, append, check_columns, provenance, row
from step_report import plot, show
from systems import SYSTEMS
from systems.ours import Ours
from task import Declared, Task

OURS = tuple(name for name, kind in SYSTEMS.items() if issubclass(kind, Ours))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--points", nargs="+", type=point, default=[("opt-1.3b", 8)], help="model:batch, such as 2.7b:8")
    made.add_argument("--systems", nargs="+", choices=SYSTEMS, default=None, help="default: ours fsdp2 plain")
    made.add_argument("--budget", default="24GiB", help='of device memory, such as "24GiB", or "none"')
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--nprocs", type=int, default=1, help="processes, one for each GPU: ours and fsdp2 only")
    made.add_argument("--timeout-s", type=float, default=None, help="for one system at one point, its start included; "
                      "default: 600, with --plan-only 3600")  # fmt: skip
    made.add_argument("--plan-only", action="store_true", help="ours only: plan with weights on meta, run nothing")
    made.add_argument("--worker", action="store_true", help="measure the first system at the first point right here")
    step = made.add_argument_group("the step")
    step.add_argument("--seq", type=int, default=1024, help="tokens per sequence")
    step.add_argument("--accumulate", type=int, default=1, metavar="K", help="backwards in a step, a batch each")
    step.add_argument("--microbatches", type=int, default=None, metavar="M", help="parts that the system itself "
                      "divides a backward's batch into, where it can: roundpipe; default: as it likes")  # fmt: skip
    step.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of the kinds that the model trains with")
    step.add_argument("--pad", action="store_true", help="random lengths, from half of --seq on, padded on the right")
    out = made.add_argument_group("results")
    out.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results.csv", help='append to this; "none"')
    out.add_argument("--commit", default=None, help="what the CSV is to say where this is no git checkout")
    out.add_argument("--json", type=Path, default=None, help="write this call's results here, after each one anew")
    out.add_argument("--plot", type=Path, nargs="+", default=None, help="draw saved results, measure nothing")
    out.add_argument("-o", "--output", type=Path, default=Path("step_time.svg"), help="where --plot draws to")
    only = made.add_argument_group("for ours only")
    only.add_argument("--plan", default=None, help="a plan saved as JSON")
    only.add_argument("--recompute", default="auto", help="auto, none, all, or how many of the first layers")
    only.add_argument("--offload", default="auto", help="auto, none, all, or of how many of the first layers "
                      "activations go to the host")  # fmt: skip
    only.add_argument("--parallel", nargs="+", default=[None], help="each to be measured, such as data=2,tensor=1d:4")
    only.add_argument("--host-budget", default=None, help='of host memory, such as "100GiB"')
    only.add_argument("--rates", default=None, help='plan for another machine: a card, such as "rtx4090", or a file of '
                      "geminifx calibrate")  # fmt: skip
    only.add_argument("--kernels", default="exact", choices=("exact", "fused"), help="fused: by Inductor, between "
                      "products")  # fmt: skip
    only.add_argument("--warmup", action="store_true", help="let the first steps decide the plan again")
    only.add_argument("--profile", type=Path, default=None, help="trace one step more to this file; several runs: "
                      "to FILE-MODEL-BATCH-SYSTEM")  # fmt: skip
    return made


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    made = parser()
    args = made.parse_args(words)
    args.systems = args.systems or (["ours"] if args.plan_only else ["ours", "fsdp2", "plain"])
    args.timeout_s = args.timeout_s or (3600.0 if args.plan_only else 600.0)
    for name in ("steps", "seq", "accumulate", "nprocs"):
        if getattr(args, name) < 1:
            made.error(f"--{name} must be 1 or more")
    if args.microbatches is not None and args.microbatches < 1:
        made.error("--microbatches must be 1 or more")
    if not 0 <= args.dropout < 1:
        made.error("--dropout is a probability, 0 or more and less than 1")
    images = [model for model, _ in args.points if reads_images(config_of(model))]
    if args.pad and images:
        made.error(f"--pad is for sequences; {images[0]} reads images")
    if args.plan and len(args.points) > 1:
        made.error("--plan is for one point")
    several = [system for system in args.systems if not SYSTEMS[system].several]
    if args.nprocs > 1 and several:
        made.error(f"{several[0]} is measured in one process only")
    others = [system for system in args.systems if system not in OURS]
    if args.plan_only and others:
        made.error(f"--plan-only is for {', '.join(OURS)}; {others[0]} has no plan")
    return args


def point(text: str) -> tuple[str, int]:
    """Return ("opt-1.3b", 8) for "1.3b:8"."""
    model, _, batch = text.rpartition(":")
    try:
        found, count = full_name(model), int(batch)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no model:batch, such as 1.3b:8 ({error})") from error
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a batch of {count}; expected 1 or more")
    return found, count


def task_of(args: argparse.Namespace, model: str, batch: int, parallel: str | None) -> Task:
    return Task(
        model, batch, args.seq, args.accumulate, args.microbatches, args.dropout, args.pad,
        None if args.budget == "none" else args.budget, args.nprocs,
        Declared(args.host_budget, args.plan, args.recompute, parallel, args.offload, args.rates,
                 args.kernels, args.warmup),
    )  # fmt: skip


def ways(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Return the systems, ours once for each way to be parallel."""
    return [(system, parallel) for system in args.systems
            for parallel in (args.parallel if system in OURS else [None])]  # fmt: skip


def result_of(args: argparse.Namespace, task: Task, system: str) -> dict[str, Any]:
    """Measure in a process of its own, unless the system refuses the task."""
    why = SYSTEMS[system].refusal(task)
    if why is not None:
        return {"error": why}
    words = [__file__, *sys.argv[1:], "--worker", "--points", f"{task.model}:{task.batch}", "--systems", system]
    if task.declared.parallel:
        words += ["--parallel", task.declared.parallel]
    if args.profile and len(args.points) * len(ways(args)) > 1:
        name = "-".join([args.profile.stem, Path(task.model).stem, str(task.batch), system])
        words += ["--profile", str(args.profile.with_stem(name))]
    processes = 1 if args.plan_only else task.nprocs
    return run_worker(words, processes, args.timeout_s, expandable=system not in OURS)  # ours sets it by itself


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every system at every point and write each result down at once."""
    file = None if args.csv.name == "none" else args.csv
    if file:
        check_columns(file)
    results: list[dict[str, Any]] = []
    command = [Path(__file__).name, *sys.argv[1:]]
    for model, batch in args.points:
        for system, parallel in ways(args):
            task = task_of(args, model, batch, parallel)
            name = f"{system} {parallel}" if parallel else system
            print(f"{model}:{batch} {name}", flush=True)
            origin = provenance(command, args.commit)  # before: the code may change while it runs
            results.append({**origin, **task.described(), "system": name, **result_of(args, task, system)})
            print("   ", json.dumps(results[-1]), flush=True)
            if file:
                append(file, row(results[-1]))
            if args.json:
                args.json.write_text(json.dumps({"command": sys.argv[1:], "results": results}, indent=1) + "\n")
    return results


def main() -> None:
    args = parse_args()
    if args.worker:
        model, batch = args.points[0]
        work(args.systems[0], task_of(args, model, batch, args.parallel[0]), args.steps, args.profile, args.plan_only)
    if args.plot:
        plot([result for file in args.plot for result in json.loads(file.read_text())["results"]], args.output)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    show(measure_all(args))


if __name__ == "__main__":
    main()
