"""A look inside: what a layer attends to, chooses and mixes, as tensors and as pictures (``flexnsa[viz]``).

>>> import torch
>>> from flexnsa import NativeSparseAttention, NSAConfig
>>> from flexnsa.inspect import look_at_layer
>>> layer = NativeSparseAttention(dim=64, num_heads=4, num_kv_heads=2, head_dim=16, config=NSAConfig())
>>> look = look_at_layer(layer, torch.randn(1, 300, 64), queries=[150, 299])
>>> look.weights["window"].shape, look.importance.shape
(torch.Size([1, 4, 2, 300]), torch.Size([1, 2, 2, 5]))
"""

from flexnsa.inspect.draw import draw_branches, draw_query, draw_selection, draw_text
from flexnsa.inspect.look import Look, look_at_attention, look_at_layer

__all__ = [
    "Look",
    "draw_branches",
    "draw_query",
    "draw_selection",
    "draw_text",
    "look_at_attention",
    "look_at_layer",
]
