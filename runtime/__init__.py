"""The machine that runs generated programs, in storeys from the ground up.

isa            the contract between programs and machine: instructions, operators, layouts, the mesh, errors, units
kernels        what operators and updates run: attention, linear cross-entropy, AdamW and SGD on either side
distributed    processes: ranks, collectives, the parts of a tensor that each has, ZeRO's shards
memory         chunks and their states, the tiers they lie on, copies between these, masters for torch's optimizers
optimizer      our own optimizer: training states, their updates beside the program, torch.optim's interface
state_io       state on disk: directories that are replaced as a whole, checksums, sharded checkpoints

`machine` implements the instructions over these, `executor` runs programs on it.
"""
