"""Sample a continuation, running the whole context anew for every token."""

import torch
from jaxtyping import Int64
from torch import Tensor

from bench.learn.model import Transformer


@torch.no_grad()
def generate(
    model: Transformer, prompt: Int64[Tensor, "1 t"], tokens: int, context: int, seed: int, temperature: float = 0.8
) -> list[int]:
    """`tokens` tokens after `prompt`, each drawn from the softmax of logits / temperature over the last `context`."""
    generator = torch.Generator().manual_seed(seed)
    row = prompt
    for _ in range(tokens):
        logits = model(row[:, -context:])[0, -1].float().cpu()
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        row = torch.cat([row, drawn[None].to(row.device)], dim=1)
    return row[0, prompt.shape[1] :].tolist()
