"""What conversion costs before any further training: a small Llama trained on text, then converted and sparsified.

Recorded by hand, some minutes on a CPU, and read by ``conversion.py``:

    python docs/make/measure_conversion.py > docs/make/conversion-cpu.json
"""

import copy
import itertools
import json
import math
import platform
import sysconfig
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flexnsa import NSAConfig
from flexnsa.integrations.transformers import convert, sparsify

TOKENS = 512
STEPS = 400
GEOMETRY = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=8, window=64)
EDGES = (0, 64, 128, 256, TOKENS)


def text() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library to learn from, and of its last files to measure on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = (files[:-20], files[-20:])
    train, held = (torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in p)), dtype=torch.uint8) for p in parts)
    return train.long(), held.long()


def rows(data: Tensor, count: int) -> Tensor:
    """Random stretches of ``TOKENS`` bytes."""
    starts = torch.randint(len(data) - TOKENS, (count,))
    return torch.stack([data[start : start + TOKENS] for start in starts])


def trained(data: Tensor) -> LlamaForCausalLM:
    """The dense model."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    for _ in range(STEPS):
        batch = rows(data, 8)
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def bits(model: PreTrainedModel, batch: Tensor) -> list[float]:
    """Bits per byte, by how many bytes came before."""
    logits = torch.cat([model(part, use_cache=False).logits for part in batch.split(4)])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch[:, 1:], reduction="none") / math.log(2)
    return [round(loss[:, low:high].mean().item(), 4) for low, high in itertools.pairwise(EDGES)]


def measure() -> dict[str, list[float]]:
    """Bits per byte of each model."""
    torch.manual_seed(0)
    train, held = text()
    dense, batch = trained(train), rows(held, 64)
    forms = {
        "dense": lambda model: model,
        "`convert(model)`": lambda model: convert(model, GEOMETRY),
        '`convert(model, compressor="mlp")`': lambda model: convert(model, GEOMETRY, compressor="mlp"),
        "`convert(model, compress_rotated=True)`": lambda model: convert(model, GEOMETRY, compress_rotated=True),
        "`sparsify(model, dense_up_to=0)`": lambda model: sparsify(model, GEOMETRY, dense_up_to=0),
    }
    return {name: bits(form(copy.deepcopy(dense)), batch) for name, form in forms.items()}


if __name__ == "__main__":
    modules = {"torch": torch, "transformers": transformers}
    versions = {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}
    print(json.dumps({"versions": versions, "edges": EDGES, "bits": measure()}, indent=1))
