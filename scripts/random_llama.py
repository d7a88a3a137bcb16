"""Llamas with random weights for benchmarks: their shapes, and their folders with weights and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.console import silence_libraries


class Shape(NamedTuple):
    """A Llama with random weights, and the GPU that it needs."""

    name: str
    memory: float
    """Least memory of the GPU, GB."""
    minutes: float
    """Least time."""
    micro_batch_tokens: int
    config: dict[str, Any]

    @property
    def disk(self) -> float:
        """Return the size of its files in GB: 16-bit weights."""
        c = self.config
        width, kv_width = c["hidden_size"], c["head_dim"] * c["num_key_value_heads"]
        attention = 2 * width * (c["head_dim"] * c["num_attention_heads"] + kv_width)
        layer = attention + 3 * width * c["intermediate_size"]
        embeddings = c["vocab_size"] * width * (1 if c["tie_word_embeddings"] else 2)
        return float(2 * (c["num_hidden_layers"] * layer + embeddings) / 1e9)


def _llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
    }


LLAMA_8B = _llama(4096, 14336, 32, 32, 8, 128_256, tied=False)
SHAPES = [
    Shape("8B", 70, 30, 4096, LLAMA_8B),
    Shape("8B", 40, 30, 2048, LLAMA_8B),
    Shape("1B", 15, 0, 4096, _llama(2048, 8192, 16, 32, 8, 128_256, tied=True)),
    Shape("135M", 0, 0, 2048, _llama(576, 1536, 30, 9, 3, 49_152, tied=True)),
]
"""The shapes of Llama 3.1 8B, Llama 3.2 1B and SmolLM2-135M; the first one that fits is measured."""
TINY = Shape("tiny", 0, 0, 1024, _llama(64, 128, 2, 4, 2, 8192, tied=True))


def choose_shape(memory: float, minutes: float, disk: float) -> Shape:
    """Return the largest model that fits.

    Args:
        memory: of the GPU, GB.
        disk: free for its files, GB.
    """
    fits = [s for s in SHAPES if s.memory <= memory and s.minutes <= minutes and 1.1 * s.disk <= disk]
    return (fits or SHAPES[-1:])[0]


def make_llama(folder: Path, shape: Shape) -> Path:
    """Save a Llama with random weights in 16 bits (the tiny one in 32), and a tokenizer; return its folder."""
    path = folder / shape.name
    if path.exists():
        return path
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    silence_libraries()
    config = AutoConfig.for_model("llama", bos_token_id=1, eos_token_id=2, pad_token_id=2, **shape.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if shape is TINY else torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    # Slices of one random block: to draw 8 billion numbers would take minutes, and speed does not depend on them.
    block = torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for parameter in model.parameters():
        parameter.data.fill_(1) if parameter.ndim == 1 else _fill(parameter.data.view(-1), block)
    make_tokenizer().save_pretrained(path)
    model.save_pretrained(path)
    return path


def _fill(target: Any, block: Any) -> None:
    for start in range(0, len(target), len(block)):
        part = target[start : start + len(block)]
        part.copy_(block[: len(part)])


def make_tokenizer() -> Any:
    """Return a tokenizer that has the ids of `token_rows`; their text does not matter."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"word{number}": number for number in range(3, 8192)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **specials)
