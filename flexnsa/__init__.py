"""flexnsa: Native Sparse Attention as a modular PyTorch library."""

from flexnsa import inspect as inspect
from flexnsa.bias import importance_bias
from flexnsa.branches import CompressedBranch, ImportanceBias, ImportanceSelector, SelectedBranch, WindowBranch
from flexnsa.cache import NSACache
from flexnsa.checks import debug
from flexnsa.composition import SparseAttention
from flexnsa.compressed import compressed_attention
from flexnsa.compression import BlockCompressor, GatedPool, LinearCompressor, MeanPool, MLPCompressor
from flexnsa.config import NSAConfig
from flexnsa.context import Attended, AttentionContext, Branch, Selector
from flexnsa.engines import explain
from flexnsa.gating import SigmoidGate
from flexnsa.importance import block_importance
from flexnsa.layer import NativeSparseAttention
from flexnsa.layout import documents_from_lengths
from flexnsa.nsa import native_sparse_attention
from flexnsa.paged import StepOutput, paged_append, paged_step
from flexnsa.pages import PagedKV, Pages
from flexnsa.selected import selected_attention
from flexnsa.selection import select_blocks
from flexnsa.types import AttentionOutput, BranchKV, Selection
from flexnsa.window import window_attention

__version__ = "0.1.0"

__all__ = [
    "Attended",
    "AttentionContext",
    "AttentionOutput",
    "BlockCompressor",
    "Branch",
    "BranchKV",
    "CompressedBranch",
    "GatedPool",
    "ImportanceBias",
    "ImportanceSelector",
    "LinearCompressor",
    "MLPCompressor",
    "MeanPool",
    "NSACache",
    "NSAConfig",
    "NativeSparseAttention",
    "PagedKV",
    "Pages",
    "SelectedBranch",
    "Selection",
    "Selector",
    "SigmoidGate",
    "SparseAttention",
    "StepOutput",
    "WindowBranch",
    "block_importance",
    "compressed_attention",
    "debug",
    "documents_from_lengths",
    "explain",
    "importance_bias",
    "native_sparse_attention",
    "paged_append",
    "paged_step",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
