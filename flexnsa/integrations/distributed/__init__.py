"""A layer over several ranks, with PyTorch's own engine: tensor parallelism by KV group, context parallelism, FSDP2."""

from flexnsa.integrations.distributed.context_parallel import ContextParallel
from flexnsa.integrations.distributed.sequence import gather_sequence, sequence_positions, shard_sequence
from flexnsa.integrations.distributed.tensor_parallel import KVGroupParallel

__all__ = ["ContextParallel", "KVGroupParallel", "gather_sequence", "sequence_positions", "shard_sequence"]
