"""A weighted combination of adapters, as an adapter: PEFT's own arithmetic, without the base."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.model.base import build_on_meta_device
from lora_accel.saving.adapter import adapter_names, attach_adapter, restore_adapter, write_adapter
from lora_accel.saving.atomic import read_json
from lora_accel.saving.discovery import CONFIG

WAYS = ("linear", "svd", "ties", "dare_linear", "dare_ties")
"""linear: the matrices' weighted sums, roughly the sum of the products | svd: the sum of the products, exactly, brought
to the largest rank | ties: https://arxiv.org/abs/2306.01708 | dare: https://arxiv.org/abs/2311.03099."""
NEED_DENSITY = ("ties", "dare_linear", "dare_ties")
SEED = 0
"""What DARE drops is drawn at random; the same command gives the same adapter."""


@contextlib.contextmanager
def combined_adapter(
    adapters: Sequence[tuple[str, float]],
    config: PretrainedConfig,
    *,
    how: str = "linear",
    density: float | None = None,
) -> Iterator[Path]:
    """Make an adapter of several, in a temporary folder.

    Args:
        adapters: folder and weight of each.
        config: of their base.
        how: one of WAYS.
        density: which part of each adapter's values is kept, where `how` drops some.

    Raises:
        ArtifactError: an adapter holds more than LoRA's matrices (biases, modules_to_save, DoRA), or PEFT refuses.
        ConfigError: `how` or `density` is none.
    """
    if how not in WAYS:
        raise ConfigError(f"--combine {how}: say {', '.join(WAYS)}")
    if (how in NEED_DENSITY) != (density is not None) or (density is not None and not 0 < density <= 1):
        needs = "needs one, over 0 and up to 1" if how in NEED_DENSITY else "has none"
        raise ConfigError(f"--density: --combine {how} {needs}")
    for folder, _ in adapters:
        _refuse_more_than_matrices(Path(folder))
    base = build_on_meta_device(config)
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # One zero in the place of each weight: PEFT makes adapters where the base is, and they must be somewhere.
            nothing = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, torch.nn.Parameter(nothing, requires_grad=False))
    names = [f"adapter{number}" for number in range(len(adapters))]
    model: PeftModel | PreTrainedModel = base
    for name, (folder, _) in zip(names, adapters, strict=True):
        model = attach_adapter(model, Path(folder), name=name)
        restore_adapter(model, Path(folder))
    torch.manual_seed(SEED)
    try:
        model.base_model.add_weighted_adapter(
            names, [weight for _, weight in adapters], "combined", combination_type=how, density=density
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"--combine {how}: PEFT refuses these adapters: {error}") from None
    model.set_adapter("combined")
    every = dict(model.named_parameters())
    with tempfile.TemporaryDirectory(prefix="combined-") as folder:
        state = {name: every[name].detach().contiguous() for name in adapter_names(model, "none")}
        write_adapter(model, state, Path(folder))
        yield Path(folder)


def _refuse_more_than_matrices(folder: Path) -> None:
    config = read_json(folder / CONFIG)
    for key in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias"):
        if config.get(key):
            raise ArtifactError(f"{folder / CONFIG}: {key} is set; only matrices of plain LoRA can be combined")
    if config.get("bias", "none") != "none":
        raise ArtifactError(f"{folder / CONFIG}: it holds biases; only matrices of plain LoRA can be combined")
