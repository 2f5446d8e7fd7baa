"""The machine that runs generated programs, in layers from the bottom up.

isa            the contract between programs and machine: instructions, operators, layouts, the mesh, errors, units
kernels        what operators and updates run: attention, linear cross-entropy, AdamW and SGD, for CPU and GPU
distributed    processes: ranks, collectives, each process's shards of tensors and parameters, ZeRO memory
chunks and their states, the tiers they live on, copies between tiers, masters for torch's optimizers optimizer      our
own optimizer: training states, their updates beside the program, torch.optim's interface state_io       state on disk:
directories that are replaced atomically, checksums, sharded checkpoints

`machine` implements the instructions on top of these, `executor` runs programs on it.
"""
