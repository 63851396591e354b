"""NSA in Hugging Face transformers: a language model of its own, conversion of dense ones, and an attention function.

Importing this module registers ``FlexNSAConfig`` and the models with the Auto classes, and
``attn_implementation="flexnsa"``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from flexnsa.integrations.transformers.cache import FlexNSACache
from flexnsa.integrations.transformers.configuration import FlexNSAConfig
from flexnsa.integrations.transformers.conversion import convert
from flexnsa.integrations.transformers.fla import fla_config, fla_geometry, fla_weights, from_fla
from flexnsa.integrations.transformers.interface import flexnsa_attention, register, sparsify
from flexnsa.integrations.transformers.masking import flexnsa_mask
from flexnsa.integrations.transformers.modeling import FlexNSAForCausalLM, FlexNSAModel

AutoConfig.register(FlexNSAConfig.model_type, FlexNSAConfig, exist_ok=True)
AutoModel.register(FlexNSAConfig, FlexNSAModel, exist_ok=True)
AutoModelForCausalLM.register(FlexNSAConfig, FlexNSAForCausalLM, exist_ok=True)
register()

__all__ = [
    "FlexNSACache",
    "FlexNSAConfig",
    "FlexNSAForCausalLM",
    "FlexNSAModel",
    "convert",
    "fla_config",
    "fla_geometry",
    "fla_weights",
    "flexnsa_attention",
    "flexnsa_mask",
    "from_fla",
    "sparsify",
]
