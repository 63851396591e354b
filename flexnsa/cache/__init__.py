"""What a layer keeps of the tokens that it has seen: stores and rings, how full they are, one call's tokens."""

from flexnsa.cache.append import Append, Blocks
from flexnsa.cache.cache import NSACache, check_cache, check_cache_dtype
from flexnsa.cache.step import attend_to_cache, takes_kernels

__all__ = ["Append", "Blocks", "NSACache", "attend_to_cache", "check_cache", "check_cache_dtype", "takes_kernels"]
