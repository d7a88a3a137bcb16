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

    padded: str | None = None
    """Why rows are padded; None = they are packed, and examples in a row attend only to themselves."""
    packed_from: str | None = None
    """The version of transformers from which on rows are packed; None = the oldest supported one."""
    supports_fused_loss: bool = True
    """Whether it supports the fused loss: logits are `head(hidden)`, scaled and capped as in the config."""
    norm: str | None = None
    """Its class that computes `weight * (x / rms(x))` and rounds the quotient first."""
    gemma_norm: str | None = None
    """Its class that computes `(x / rms(x)) * (1 + weight)` and rounds the product."""
    gate: str | None = None
    """Its class that computes `down_proj(act(gate_proj(x)) * up_proj(x))`."""

    @property
    def why_padded(self) -> str | None:
        """Return why rows are padded with the installed version of transformers; None = they are packed."""
        if self.padded is None and self.packed_from is not None and not is_installed(self.packed_from):
            return f"packing it needs transformers {self.packed_from}"
        return self.padded


def is_installed(version: str) -> bool:
    """Whether transformers is installed in a version, or a newer one."""
    return Version(transformers.__version__) >= Version(version)


RECURRENT_FROM = "5.23"
"""The version of transformers from which on recurrent layers get the lengths of a row's examples."""
_NO_INTERFACE = "its attention is not transformers' attention interface"

FAMILIES: dict[str, Family] = {
    "afmoe": Family(gate="AfmoeMLP"),
    "apertus": Family(norm="ApertusRMSNorm"),
    "arcee": Family(norm="ArceeRMSNorm"),
    "axk1": Family(norm="AXK1RMSNorm", gate="AXK1MLP"),
    "bamba": Family(packed_from=RECURRENT_FROM, norm="BambaRMSNorm", gate="BambaMLP"),
    "bloom": Family(padded=_NO_INTERFACE),
    "cohere": Family(gate="CohereMLP"),
    "cohere2": Family(gate="Cohere2MLP"),
    "cohere2_moe": Family(),
    "cwm": Family(norm="CwmRMSNorm", gate="CwmMLP"),
    "deepseek_v2": Family(norm="DeepseekV2RMSNorm", gate="DeepseekV2MLP"),
    "deepseek_v3": Family(norm="DeepseekV3RMSNorm", gate="DeepseekV3MLP"),
    # 5.0 reads the mask instead of calling the attention interface.
    "diffllama": Family(packed_from="5.23", norm="DiffLlamaRMSNorm", gate="DiffLlamaMLP"),
    "dots1": Family(norm="Dots1RMSNorm", gate="Dots1MLP"),
    "ernie4_5": Family(norm="Ernie4_5RMSNorm", gate="Ernie4_5MLP"),
    "ernie4_5_moe": Family(norm="Ernie4_5_MoeRMSNorm", gate="Ernie4_5_MoeMLP"),
    "exaone4": Family(norm="Exaone4RMSNorm", gate="Exaone4MLP"),
    "exaone_moe": Family(norm="ExaoneMoeRMSNorm", gate="ExaoneMoeMLP"),
    "falcon": Family(padded=_NO_INTERFACE),
    "falcon_h1": Family(packed_from=RECURRENT_FROM, norm="FalconH1RMSNorm"),
    "flex_olmo": Family(),
    "flint": Family(gate="FlintMLP"),
    "gemma": Family(gemma_norm="GemmaRMSNorm", gate="GemmaMLP"),
    "gemma2": Family(gemma_norm="Gemma2RMSNorm", gate="Gemma2MLP"),
    "gemma3": Family(gemma_norm="Gemma3RMSNorm", gate="Gemma3MLP"),
    "gemma3_text": Family(gemma_norm="Gemma3RMSNorm", gate="Gemma3MLP"),
    "gemma3n_text": Family(),
    "gemma4": Family(gate="Gemma4TextMLP"),
    "gemma4_text": Family(gate="Gemma4TextMLP"),
    "gemma4_unified_text": Family(gate="Gemma4UnifiedTextMLP"),
    "glm": Family(norm="GlmRMSNorm"),
    "glm4": Family(norm="Glm4RMSNorm"),
    "glm4_moe": Family(norm="Glm4MoeRMSNorm", gate="Glm4MoeMLP"),
    "glm4_moe_lite": Family(norm="Glm4MoeLiteRMSNorm", gate="Glm4MoeLiteMLP"),
    "gpt2": Family(packed_from="5.3"),
    "gpt_bigcode": Family(padded="its checkpoints drop attention weights at random"),
    "gpt_neox": Family(),
    "gpt_oss": Family(),
    "gptj": Family(padded=_NO_INTERFACE),
    "granite": Family(norm="GraniteRMSNorm", gate="GraniteMLP"),
    "granite_swa": Family(norm="GraniteSWARMSNorm", gate="GraniteSWAMLP"),
    "granitemoe": Family(norm="GraniteMoeRMSNorm"),
    "granitemoe_swa": Family(norm="GraniteMoeSWARMSNorm"),
    "granitemoehybrid": Family(norm="GraniteMoeHybridRMSNorm"),
    "granitemoeshared": Family(norm="GraniteMoeSharedRMSNorm"),
    "helium": Family(gate="HeliumMLP"),
    "hunyuan_v1_dense": Family(norm="HunYuanDenseV1RMSNorm", gate="HunYuanDenseV1MLP"),
    "hunyuan_v1_moe": Family(norm="HunYuanMoEV1RMSNorm", gate="HunYuanMoEV1MLP"),
    "hy_v3": Family(norm="HYV3RMSNorm", gate="HYV3MLP"),
    # It multiplies its logits by `logits_scaling`, by which Granite divides them.
    "hyperclovax": Family(supports_fused_loss=False, norm="HyperCLOVAXRMSNorm", gate="HyperCLOVAXMLP"),
    "internlm3": Family(),
    "iquestcoder": Family(),
    "jais2": Family(),
    "jetmoe": Family(norm="JetMoeRMSNorm"),
    "kimi_linear": Family(packed_from=RECURRENT_FROM, norm="KimiLinearRMSNorm", gate="KimiLinearMLP"),
    "kolibri1": Family(norm="Kolibri1RMSNorm", gate="Kolibri1MLP"),
    "laguna": Family(norm="LagunaRMSNorm", gate="LagunaMLP"),
    "lfm2": Family(packed_from=RECURRENT_FROM, norm="Lfm2RMSNorm"),
    "lfm2_moe": Family(packed_from=RECURRENT_FROM, norm="Lfm2MoeRMSNorm"),
    "llama": Family(norm="LlamaRMSNorm", gate="LlamaMLP"),
    "llama4_text": Family(padded="it scales queries by their position in the row, not in the example"),
    "longcat_flash": Family(norm="LongcatFlashRMSNorm", gate="LongcatFlashMLP"),
    "mellum": Family(norm="MellumRMSNorm"),
    "mimo_v2_flash": Family(norm="MiMoV2FlashRMSNorm", gate="MiMoV2FlashMLP"),
    "minicpm3": Family(norm="MiniCPM3RMSNorm", gate="MiniCPM3MLP"),
    "minimax_m2": Family(norm="MiniMaxM2RMSNorm"),
    "ministral": Family(norm="MinistralRMSNorm", gate="MinistralMLP"),
    # 5.0 scales queries by their position in the row, not in the example.
    "ministral3": Family(packed_from="5.23", norm="Ministral3RMSNorm", gate="Ministral3MLP"),
    "mistral": Family(norm="MistralRMSNorm", gate="MistralMLP"),
    "mixtral": Family(norm="MixtralRMSNorm"),
    "nanochat": Family(),
    "nemotron": Family(padded=_NO_INTERFACE),
    "nemotron_h": Family(packed_from=RECURRENT_FROM),
    "olmo": Family(gate="OlmoMLP"),
    "olmo2": Family(gate="Olmo2MLP"),
    "olmo3": Family(gate="Olmo3MLP"),
    "olmo_hybrid": Family(packed_from=RECURRENT_FROM, gate="OlmoHybridMLP"),
    "olmoe": Family(norm="OlmoeRMSNorm"),
    "opt": Family(),
    "persimmon": Family(),
    "phi": Family(),
    "phi3": Family(norm="Phi3RMSNorm"),
    "qwen2": Family(norm="Qwen2RMSNorm", gate="Qwen2MLP"),
    "qwen2_moe": Family(norm="Qwen2MoeRMSNorm", gate="Qwen2MoeMLP"),
    "qwen3": Family(norm="Qwen3RMSNorm", gate="Qwen3MLP"),
    "qwen3_5_moe_text": Family(packed_from=RECURRENT_FROM, gemma_norm="Qwen3_5MoeRMSNorm", gate="Qwen3_5MoeMLP"),
    "qwen3_5_text": Family(packed_from=RECURRENT_FROM, gemma_norm="Qwen3_5RMSNorm", gate="Qwen3_5MLP"),
    "qwen3_moe": Family(norm="Qwen3MoeRMSNorm"),
    "qwen3_next": Family(packed_from=RECURRENT_FROM, gemma_norm="Qwen3NextRMSNorm", gate="Qwen3NextMLP"),
    "seed_oss": Family(norm="SeedOssRMSNorm"),
    "smollm3": Family(norm="SmolLM3RMSNorm", gate="SmolLM3MLP"),
    "solar_open": Family(norm="SolarOpenRMSNorm", gate="SolarOpenMLP"),
    "stablelm": Family(padded=_NO_INTERFACE),
    "starcoder2": Family(),
    "vaultgemma": Family(gemma_norm="VaultGemmaRMSNorm", gate="VaultGemmaMLP"),
    "youtu": Family(norm="YoutuRMSNorm", gate="YoutuMLP"),
}
"""By `model_type` of transformers' configs."""

UNKNOWN = Family(padded="no test proves packed rows of this model type", supports_fused_loss=False)
NORMS = frozenset(family.norm for family in FAMILIES.values() if family.norm)
GEMMA_NORMS = frozenset(family.gemma_norm for family in FAMILIES.values() if family.gemma_norm)
GATES = frozenset(family.gate for family in FAMILIES.values() if family.gate)


def family_of(model_type: str) -> Family:
    """Return the family of a model type, `UNKNOWN` if it is not listed."""
    return FAMILIES.get(model_type, UNKNOWN)
