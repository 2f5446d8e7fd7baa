"""How long compiling takes, stage by stage, without weights and without a GPU.

python benchmarks/compile_time.py --model opt-1.3b --batch 8 --seq 1024 --budget 24GB
python benchmarks/compile_time.py --model opt-66b --batch 64 --parallel data=16,tensor=2.5d:64:4    # of one of 1,024

"""

import argparse
import time

import geminifx
import torch
from geminifx.compiler.capture.trace import CaptureRequest, capture
from geminifx.compiler.parallel import parse_parallel
from random_models import full_name
from task import Task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=full_name, default="opt-1.3b", help="as in a point of step_time.py")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--budget", default="24GB")
    parser.add_argument("--parallel", default="", help="as in geminifx train --parallel")
    args = parser.parse_args()

    task = Task(args.model, args.batch, args.seq)
    batch, model = task.inputs(), task.empty_model()

    start = time.perf_counter()
    program = capture(model, (), batch, CaptureRequest(torch.bfloat16)).program
    capture_s = time.perf_counter() - start
    parallel = parse_parallel(args.parallel) if args.parallel else None
    start = time.perf_counter()
    compiled = geminifx.compile(model, device_budget=args.budget, host_budget="1TB", precision="bf16", device="cpu",
                                parallel=parallel, example_inputs=batch)  # fmt: skip
    total_s = time.perf_counter() - start
    records = compiled.history["training"]
    passes_s = sum(record.rewrite_s + record.verify_s for record in records)
    print(f"{args.model}, batch {args.batch} x {args.seq}: {len(program.nodes):,} nodes captured")
    print(f"capture         {capture_s:6.2f} s")
    for record in records:
        print(f"{record.name:<15} {record.rewrite_s:6.2f} s, verified in {record.verify_s:.2f} s")
    print(f"all passes once {passes_s:6.2f} s")
    print(compiled.plan)
    print(f"compile in all  {total_s:6.2f} s: capture, one lowering per plan considered, one to generate the code")


if __name__ == "__main__":
    main()
