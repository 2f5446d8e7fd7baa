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
from .share_buffers import share_buffers
from .split_batch import split_batch
from .split_stages import split_stages

PIPELINE = (
    canonicalize,  # no no-ops, needless copies or common subexpressions, one input per shared parameter
    fuse_loss,  #    the loss over the vocabulary is computed in pieces, without its logits
    average_loss,  # the loss is the mean over all tokens of all ranks and microbatches
    shard,  #        tensors are divided over the ranks, which exchange what they lack
    recompute,  #    the backward recomputes the blocks that the plan names
    split_batch,  #  a batch runs as microbatches, each block for all of them before the next block
    split_stages,  # or passes through a pipeline's stages, of which each rank keeps its own
    share_buffers,  # buffers that the forward writes are the first rank's
    partition,  #    forward | turn | backward; only activations cross the turn
    dequantize,  #   the backward dequantises the weights again where it reads them
    overlap,  #      collectives start early and are waited for late, small all-reduces are merged
    post_receives,  # a pipeline's receives start early and are waited for late
    chunk,  #        parameters come from fetched chunks, gradients leave in chunks
    fuse_gradients,  # gradients of weights and biases are computed directly in their chunk
    offload,  #      activations of chosen blocks wait on the host for their backward
    release,  #      a chunk is freed after its last reader
    prefetch,  #     copies start early and are waited for late
    fuse_pointwise,  # the operators between matrix products become one kernel
    cluster,  #      compute between instructions becomes functions, shared by equal layers
)
