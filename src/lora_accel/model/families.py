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
    "afmoe": Family(gate="AfmoeMLP"),
    "apertus": Family(norm="ApertusRMSNorm"),
    "arcee": Family(norm="ArceeRMSNorm"),
    # Its attention is not transformers' interface, as with Falcon, GPT-J, Nemotron and StableLM.
    "bloom": Family(supports_packing=False),
    "cohere": Family(gate="CohereMLP"),
    "cohere2": Family(gate="Cohere2MLP"),
    "cohere2_moe": Family(),
    "cwm": Family(norm="CwmRMSNorm", gate="CwmMLP"),
    "deepseek_v2": Family(norm="DeepseekV2RMSNorm", gate="DeepseekV2MLP"),
    "deepseek_v3": Family(norm="DeepseekV3RMSNorm", gate="DeepseekV3MLP"),
    "dots1": Family(norm="Dots1RMSNorm", gate="Dots1MLP"),
    "ernie4_5": Family(norm="Ernie4_5RMSNorm", gate="Ernie4_5MLP"),
    "ernie4_5_moe": Family(norm="Ernie4_5_MoeRMSNorm", gate="Ernie4_5_MoeMLP"),
    "exaone4": Family(norm="Exaone4RMSNorm", gate="Exaone4MLP"),
    "exaone_moe": Family(norm="ExaoneMoeRMSNorm", gate="ExaoneMoeMLP"),
    "falcon": Family(supports_packing=False),
    "flex_olmo": Family(),
    "gemma": Family(gemma_norm="GemmaRMSNorm", gate="GemmaMLP"),
    "gemma2": Family(gemma_norm="Gemma2RMSNorm", gate="Gemma2MLP"),
    "gemma3": Family(gemma_norm="Gemma3RMSNorm", gate="Gemma3MLP"),
    "gemma3_text": Family(gemma_norm="Gemma3RMSNorm", gate="Gemma3MLP"),
    "gemma3n_text": Family(),
    "gemma4": Family(gate="Gemma4TextMLP"),
    "gemma4_text": Family(gate="Gemma4TextMLP"),
    "glm": Family(norm="GlmRMSNorm"),
    "glm4": Family(norm="Glm4RMSNorm"),
    "glm4_moe": Family(norm="Glm4MoeRMSNorm", gate="Glm4MoeMLP"),
    "glm4_moe_lite": Family(norm="Glm4MoeLiteRMSNorm", gate="Glm4MoeLiteMLP"),
    # Before transformers 5.3, GPT-2 does not pass keyword arguments (here: `segments`) to its layers.
    "gpt2": Family(supports_packing=Version(transformers.__version__) >= Version("5.3")),
    # Its checkpoints drop attention weights at random, and transformers 5.0 passes no `segments` to its layers.
    "gpt_bigcode": Family(supports_packing=False),
    "gpt_neox": Family(),
    "gpt_oss": Family(),
    "gptj": Family(supports_packing=False),
    "granite": Family(norm="GraniteRMSNorm", gate="GraniteMLP"),
    "granite_swa": Family(norm="GraniteSWARMSNorm", gate="GraniteSWAMLP"),
    "granitemoe": Family(norm="GraniteMoeRMSNorm"),
    "granitemoe_swa": Family(norm="GraniteMoeSWARMSNorm"),
    # Packed where it has no Mamba layers; see `can_pack`.
    "granitemoehybrid": Family(norm="GraniteMoeHybridRMSNorm"),
    "granitemoeshared": Family(norm="GraniteMoeSharedRMSNorm"),
    "helium": Family(gate="HeliumMLP"),
    "hunyuan_v1_dense": Family(norm="HunYuanDenseV1RMSNorm", gate="HunYuanDenseV1MLP"),
    "hunyuan_v1_moe": Family(norm="HunYuanMoEV1RMSNorm", gate="HunYuanMoEV1MLP"),
    # It multiplies its logits by `logits_scaling`, by which Granite divides them.
    "hyperclovax": Family(supports_fused_loss=False, norm="HyperCLOVAXRMSNorm", gate="HyperCLOVAXMLP"),
    "jais2": Family(),
    "jetmoe": Family(norm="JetMoeRMSNorm"),
    # Its convolutions mix neighboring examples.
    "lfm2": Family(supports_packing=False, norm="Lfm2RMSNorm"),
    "llama": Family(norm="LlamaRMSNorm", gate="LlamaMLP"),
    # It scales queries by their position in the row.
    "llama4_text": Family(supports_packing=False),
    "mimo_v2_flash": Family(norm="MiMoV2FlashRMSNorm", gate="MiMoV2FlashMLP"),
    "minicpm3": Family(norm="MiniCPM3RMSNorm", gate="MiniCPM3MLP"),
    "minimax_m2": Family(norm="MiniMaxM2RMSNorm"),
    "ministral": Family(norm="MinistralRMSNorm", gate="MinistralMLP"),
    # Earlier versions (5.0 was tried) scale queries by their position in the row, not in the example.
    "ministral3": Family(
        supports_packing=Version(transformers.__version__) >= Version("5.23"),
        norm="Ministral3RMSNorm",
        gate="Ministral3MLP",
    ),
    "mistral": Family(norm="MistralRMSNorm", gate="MistralMLP"),
    "mixtral": Family(norm="MixtralRMSNorm"),
    "nanochat": Family(),
    "nemotron": Family(supports_packing=False),
    "olmo": Family(gate="OlmoMLP"),
    "olmo2": Family(gate="Olmo2MLP"),
    "olmo3": Family(gate="Olmo3MLP"),
    "olmoe": Family(norm="OlmoeRMSNorm"),
    "opt": Family(),
    "persimmon": Family(),
    "phi": Family(),
    "phi3": Family(norm="Phi3RMSNorm"),
    "qwen2": Family(norm="Qwen2RMSNorm", gate="Qwen2MLP"),
    "qwen2_moe": Family(norm="Qwen2MoeRMSNorm", gate="Qwen2MoeMLP"),
    "qwen3": Family(norm="Qwen3RMSNorm", gate="Qwen3MLP"),
    # The state of Qwen's linear attention is reset between examples by CUDA-only packages only.
    "qwen3_5_moe_text": Family(supports_packing=False, gemma_norm="Qwen3_5MoeRMSNorm", gate="Qwen3_5MoeMLP"),
    "qwen3_5_text": Family(supports_packing=False, gemma_norm="Qwen3_5RMSNorm", gate="Qwen3_5MLP"),
    "qwen3_moe": Family(norm="Qwen3MoeRMSNorm"),
    "qwen3_next": Family(supports_packing=False, gemma_norm="Qwen3NextRMSNorm", gate="Qwen3NextMLP"),
    "seed_oss": Family(norm="SeedOssRMSNorm"),
    "smollm3": Family(norm="SmolLM3RMSNorm", gate="SmolLM3MLP"),
    "solar_open": Family(norm="SolarOpenRMSNorm", gate="SolarOpenMLP"),
    "stablelm": Family(supports_packing=False),
    "starcoder2": Family(),
    "vaultgemma": Family(gemma_norm="VaultGemmaRMSNorm", gate="VaultGemmaMLP"),
    "youtu": Family(norm="YoutuRMSNorm", gate="YoutuMLP"),
}
"""By `model_type` of transformers' configs."""

UNKNOWN = Family(supports_packing=False, supports_fused_loss=False)
NORMS = frozenset(family.norm for family in FAMILIES.values() if family.norm)
GEMMA_NORMS = frozenset(family.gemma_norm for family in FAMILIES.values() if family.gemma_norm)
GATES = frozenset(family.gate for family in FAMILIES.values() if family.gate)


def family_of(model_type: str) -> Family:
    """Return the family of a model type, `UNKNOWN` if it is not listed."""
    return FAMILIES.get(model_type, UNKNOWN)
