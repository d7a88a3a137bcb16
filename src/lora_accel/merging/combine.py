"""A weighted combination of adapters, computed by PEFT without loading the base's weights."""

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
from lora_accel.saving.adapter import write_adapter
from lora_accel.saving.atomic import read_json
from lora_accel.saving.attach import attach_adapter, restore_adapter
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.names import adapter_names
from lora_accel.saving.serving import differences_from_plain_lora
from lora_accel.saving.tensor_files import read_adapter

METHODS = ("linear", "svd", "ties", "dare_linear", "dare_ties")
"""PEFT's combination types. linear: weighted sums of the A and of the B matrices, which only approximate the sum of
the products | svd: the sum of the products B @ A, truncated to the largest rank | ties:
https://arxiv.org/abs/2306.01708 | dare: https://arxiv.org/abs/2311.03099."""
METHODS_WITH_DENSITY = ("ties", "dare_linear", "dare_ties")
SEED = 0
"""DARE drops values at random. With a fixed seed the same command gives the same adapter."""


def check_method(how: str, density: float | None) -> None:
    """Check how adapters are to be combined.

    Args:
        how, density: see `combined_adapter`.

    Raises:
        ConfigError: one is invalid, or they do not belong together.
    """
    if how not in METHODS:
        raise ConfigError(f"--combine {how}: unknown method; use {', '.join(METHODS)}")
    needs_density = how in METHODS_WITH_DENSITY
    if needs_density != (density is not None) or (density is not None and not 0 < density <= 1):
        rule = "needs a density above 0 and up to 1" if needs_density else "takes no density"
        raise ConfigError(f"--density: --combine {how} {rule}")


@contextlib.contextmanager
def combined_adapter(
    adapters: Sequence[tuple[str, float]],
    config: PretrainedConfig,
    *,
    how: str = "linear",
    density: float | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Path]:
    """Combine adapters into one, in a temporary folder.

    Args:
        adapters: folder and weight of each.
        config: config of their base.
        how: one of METHODS; `check_method` checks it.
        density: fraction of each adapter's values to keep, for METHODS_WITH_DENSITY.
        trust_remote_code: whether to run the base's own code.

    Yields:
        The folder of the combined adapter, which is deleted afterwards.

    Raises:
        ArtifactError: an adapter has more than LoRA matrices (biases, modules_to_save, DoRA), or PEFT cannot combine
            them.
    """
    for folder, _ in adapters:
        _check_plain_lora(Path(folder))
    base = build_on_meta_device(config, trust_remote_code=trust_remote_code)
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # PEFT creates adapters on the base's device, so the base must not be on the meta device. An expanded zero
            # has the shape of the weight and the memory of one value.
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, torch.nn.Parameter(zeros, requires_grad=False))
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
        raise ArtifactError(f"--combine {how}: PEFT cannot combine these adapters: {error}") from None
    model.set_adapter("combined")
    parameters = dict(model.named_parameters())
    with tempfile.TemporaryDirectory(prefix="combined-") as folder:
        state = {name: parameters[name].detach().contiguous() for name in adapter_names(model, "none")}
        write_adapter(model, state, Path(folder))
        yield Path(folder)


def _check_plain_lora(folder: Path) -> None:
    """Check that an adapter has only LoRA's matrices; ranks and alphas may differ between modules."""
    shapes = {name: tensor.shape for name, tensor in read_adapter(folder).items()}
    different = differences_from_plain_lora(read_json(folder / CONFIG), shapes)
    different = [name for name in different if name not in ("rank_pattern", "alpha_pattern", "LoRA on embeddings")]
    if different:
        raise ArtifactError(f"{folder}: has {different[0]}; only the matrices of plain LoRA can be combined")
