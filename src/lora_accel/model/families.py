"""What each model family supports: packing, the fused loss, and the patched norms and gates.

To add a family, add it to `FAMILIES` and run tests/model, which test each entry against transformers. A model type that
is not listed trains with padded rows and the modules of transformers.
"""

from __future__ import annotations

import dataclasses

import transformers
from packaging.version import Version


@dataclasses.dataclass(frozen=True)
class Family:
    """Tested properties of a model type."""

    supports_packing: bool = True
    """Whether it supports packing: examples in a packed row attend only to themselves."""
    supports_fused_loss: bool = True
    """Whether it supports the fused loss: logits are `head(hidden)`, scaled and capped as in the config."""
    norm: str | None = None
    """Its class that computes `weight * (x / rms(x))` and rounds the quotient first."""
    gemma_norm: str | None = None
    """Its class that computes `(x / rms(x)) * (1 + weight)` and rounds the product."""
    gate: str | None = None
    """Its class that computes `down_proj(act(gate_proj(x)) * up_proj(x))`."""


FAMILIES: dict[str, Family] = {
    "apertus": Family(norm="ApertusRMSNorm"),
    "arcee": Family(norm="ArceeRMSNorm"),
    "cohere": Family(gate="CohereMLP"),
    "cohere2": Family(gate="Cohere2MLP"),
    "ernie4_5": Family(norm="Ernie4_5RMSNorm", gate="Ernie4_5MLP"),
    "exaone4": Family(norm="Exaone4RMSNorm", gate="Exaone4MLP"),
    "gemma": Family(gemma_norm="GemmaRMSNorm", gate="GemmaMLP"),
    "gemma2": Family(gemma_norm="Gemma2RMSNorm", gate="Gemma2MLP"),
    "gemma3_text": Family(gemma_norm="Gemma3RMSNorm", gate="Gemma3MLP"),
    "glm": Family(norm="GlmRMSNorm"),
    # Before transformers 5.3, GPT-2 does not pass keyword arguments (here: `segments`) to its layers.
    "gpt2": Family(supports_packing=Version(transformers.__version__) >= Version("5.3")),
    "gpt_neox": Family(),
    "granite": Family(norm="GraniteRMSNorm", gate="GraniteMLP"),
    "helium": Family(gate="HeliumMLP"),
    "hunyuan_v1_dense": Family(norm="HunYuanDenseV1RMSNorm", gate="HunYuanDenseV1MLP"),
    "llama": Family(norm="LlamaRMSNorm", gate="LlamaMLP"),
    "ministral": Family(norm="MinistralRMSNorm", gate="MinistralMLP"),
    "mistral": Family(norm="MistralRMSNorm", gate="MistralMLP"),
    "mixtral": Family(norm="MixtralRMSNorm"),
    "olmo": Family(gate="OlmoMLP"),
    "olmo2": Family(gate="Olmo2MLP"),
    "olmo3": Family(gate="Olmo3MLP"),
    "olmoe": Family(norm="OlmoeRMSNorm"),
    "opt": Family(),
    "phi": Family(),
    "phi3": Family(norm="Phi3RMSNorm"),
    "qwen2": Family(norm="Qwen2RMSNorm", gate="Qwen2MLP"),
    "qwen2_moe": Family(norm="Qwen2MoeRMSNorm", gate="Qwen2MoeMLP"),
    "qwen3": Family(norm="Qwen3RMSNorm", gate="Qwen3MLP"),
    "qwen3_moe": Family(norm="Qwen3MoeRMSNorm"),
    "seed_oss": Family(norm="SeedOssRMSNorm"),
    "smollm3": Family(norm="SmolLM3RMSNorm", gate="SmolLM3MLP"),
    "stablelm": Family(supports_packing=False),
    "starcoder2": Family(),
}
"""By `model_type` of transformers' configs."""

UNKNOWN = Family(supports_packing=False, supports_fused_loss=False)
NORMS = frozenset(family.norm for family in FAMILIES.values() if family.norm)
GEMMA_NORMS = frozenset(family.gemma_norm for family in FAMILIES.values() if family.gemma_norm)
GATES = frozenset(family.gate for family in FAMILIES.values() if family.gate)


def family_of(model_type: str) -> Family:
    """Return the family of a model type, `UNKNOWN` if it is not listed."""
    return FAMILIES.get(model_type, UNKNOWN)
