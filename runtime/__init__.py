"""The machine that runs generated programs.

Instructions and data    ops (the instruction set), layout (chunks, and what their training state takes), units, errors
Running programs         executor, machine (torch's optimizers), updating_machine (our own), stats
Memory                   chunks, tiers, streams (copies); placing and state_placing put states where a plan wants them
Our own optimizer        optimizer (its interface), states, state_stream (states on their way through the device),
                         held_gradients, worker (the host's thread), update_kernels, host_kernel, device_kernel,
                         host_reference, host_build, update_rules, split_pairs; lazy_parameter and slot_source (what
                         parameters read)
Operators                attention, attention_kernels, linear_loss
Several processes        mesh, ranks, collectives (a sharded program's instructions), parts (of parameters), zero (of
                         chunks)
State on disk            checkpoint
torch's private side     torch_private
"""
