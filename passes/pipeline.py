"""The whole lowering on one screen: from the captured step to the program that runs.

Each line is one file, and each file shows its program before and after.
"""

from .average_loss import average_loss
from .canonicalize import canonicalize
from .chunk import chunk
from .cluster import cluster
from .dequantize import dequantize
from .fuse_gradients import fuse_gradients
from .fuse_loss import fuse_loss
from .fuse_pointwise import fuse_pointwise
from .offload import offload
from .overlap import overlap
from .partition import partition
from .post_receives import post_receives
from .prefetch import prefetch
from .recompute import recompute
from .release import release
from .shard import shard
from .split_batch import split_batch
from .split_stages import split_stages

PIPELINE = (
    canonicalize,  # no no-ops, no repetitions, one input per shared parameter
    fuse_loss,  #    the loss over the vocabulary in pieces, without its logits
    average_loss,  # the loss is the mean over all tokens, of ranks and microbatches
    shard,  #        tensors are divided over the processes, which exchange what they lack
    recompute,  #    blocks that the plan names are computed again in the backward
    split_batch,  #  a batch runs as microbatches, each block for all of them before the next
    split_stages,  # or goes through a pipeline's stages, of which each rank keeps its part
    partition,  #    forward | turn | backward; only activations cross the turn
    dequantize,  #   quantised weights are dequantised again where the backward reads them
    overlap,  #      collectives start early and are waited for late, small sums are taken together
    post_receives,  # a pipeline's receives start early and are waited for late
    chunk,  #        parameters come from fetched chunks, gradients leave in chunks
    fuse_gradients,  # a weight's gradient is multiplied right into its chunk
    offload,  #      activations of chosen blocks wait for their backward on the host
    release,  #      a chunk is let go after its last reader
    prefetch,  #     copies start early and are waited for late
    fuse_pointwise,  # what lies between products becomes one kernel
    cluster,  #      compute between instructions becomes functions, equal layers share one
)
