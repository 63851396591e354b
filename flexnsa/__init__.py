"""flexnsa: Native Sparse Attention as a modular PyTorch library."""

from flexnsa.checks import debug
from flexnsa.composition import (
    AttentionContext,
    Branch,
    CompressedBranch,
    ImportanceSelector,
    SelectedBranch,
    Selector,
    SparseAttention,
    WindowBranch,
)
from flexnsa.compressed import compressed_attention
from flexnsa.compression import BlockCompressor, GatedPool, LinearCompressor, MeanPool, MLPCompressor
from flexnsa.config import NSAConfig
from flexnsa.engines import explain
from flexnsa.gating import SigmoidGate
from flexnsa.importance import block_importance
from flexnsa.layer import NativeSparseAttention
from flexnsa.layout import documents_from_lengths
from flexnsa.nsa import native_sparse_attention
from flexnsa.selected import selected_attention
from flexnsa.selection import select_blocks
from flexnsa.types import AttentionOutput, BranchKV, Selection
from flexnsa.window import window_attention

__version__ = "0.1.0"

__all__ = [
    "AttentionContext",
    "AttentionOutput",
    "BlockCompressor",
    "Branch",
    "BranchKV",
    "CompressedBranch",
    "GatedPool",
    "ImportanceSelector",
    "LinearCompressor",
    "MLPCompressor",
    "MeanPool",
    "NSAConfig",
    "NativeSparseAttention",
    "SelectedBranch",
    "Selection",
    "Selector",
    "SigmoidGate",
    "SparseAttention",
    "WindowBranch",
    "block_importance",
    "compressed_attention",
    "debug",
    "documents_from_lengths",
    "explain",
    "native_sparse_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
