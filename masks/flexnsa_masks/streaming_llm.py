"""StreamingLLM: a sliding window and the first few tokens, which soak up the attention that has nowhere else to go.

Definition: query q sees key k iff `k <= q` and (`q - k < window` or `k < sinks`). Source: Efficient Streaming Language
Models with Attention Sinks (Xiao et al. 2023, arXiv 2309.17453), section 3.2. The paper speaks of the cache, `sinks`
initial and `window` recent tokens; here the query's own key is one of the recent ones.
"""

from flexnsa_masks.compose import or_masks
from flexnsa_masks.geometry import MaskMod
from flexnsa_masks.rename import rename
from flexnsa_masks.sink import sink
from flexnsa_masks.sliding_window import sliding_window


def streaming_llm(window: int, *, sinks: int = 4) -> MaskMod:
    """Mask mod: keys `0 .. sinks - 1` and `q - window + 1 .. q`, none after the query.

    Args:
        window: number of recent keys, at least 1 (ValueError otherwise).
        sinks: number of initial keys, at least 0 (likewise); the paper finds 4 enough.

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(streaming_llm(1, sinks=1), 1, 1, 3, 3, device="cpu").int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]]
    """
    return rename(or_masks(sliding_window(window), sink(sinks)), f"streaming_llm_{window}_{sinks}")
