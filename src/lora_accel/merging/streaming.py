"""Merge base + adapter one module at a time, without loading the base.

The model is built on the meta device. Only the adapter's tensors and the base weights of the module that is being
merged are materialized. PEFT merges each module in float32, so every kind of LoRA that PEFT can merge gives PEFT's
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from transformers import PretrainedConfig

from lora_accel.errors import ArtifactError
from lora_accel.merging.shards import TensorSpec, Weights
from lora_accel.model.base import build_on_meta_device
from lora_accel.saving.attach import attach_adapter, match_adapter
from lora_accel.saving.names import WRAPPER_NAMES, adapter_parameters
from lora_accel.saving.tensor_files import read_adapter
from lora_accel.saving.vocabulary import check_same_embeddings, resize_vocabulary

WeightTransform = Callable[[str, torch.Tensor], torch.Tensor]
"""Applied to each base weight before the adapter is added: (name, weight as stored) -> weight."""
BLOCK_NUMEL = 2**20
"""Values of a weight that are computed at once: 4 MB in float32, which stay in the cache."""


class NotStreamableError(Exception):
    """The model must be loaded before it can be merged; the message gives the reason."""


class MergedTensors:
    """The tensors of the merged model, by name. Each can be read once.

    Args:
        adapter: folder of the adapter.
        weights: of the base.
        config: of the base; it is modified. `self.config` is that of the merged model.
        transform: applied to the base's weights first; None = as stored.
        trust_remote_code: whether to run the base's own code.

    Raises:
        NotStreamableError: the base's files and the model have different tensor names: transformers renames or fuses
            tensors while loading, for a mixture of experts for example.
        ArtifactError: the adapter does not fit the base.
    """

    def __init__(
        self,
        adapter: Path,
        weights: Weights,
        config: PretrainedConfig,
        *,
        transform: WeightTransform | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._adapter, self._weights, self._transform = adapter, weights, transform
        stored_dtype, use_cache = config.dtype, getattr(config, "use_cache", True)
        model = build_on_meta_device(config, trust_remote_code=trust_remote_code)
        self._tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self._check_names(model.state_dict().keys())
        state = read_adapter(adapter)
        resize_vocabulary(model, adapter, state)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._peft = attach_adapter(model, adapter, on_meta_device=True)
        check_lora_biases(self._peft, adapter)
        trained, self._saved_embeddings = match_adapter(self._peft, state, str(adapter))
        parameters = adapter_parameters(self._peft)
        loaded = {id(p): torch.nn.Parameter(trained[key].float(), requires_grad=False) for key, p in parameters.items()}
        for module in self._peft.modules():
            module._parameters |= {name: loaded[id(p)] for name, p in module._parameters.items() if id(p) in loaded}
        self._base = self._peft.get_base_model()
        self._peft_modules = _outermost_peft_modules(self._base)
        self._trained_in_place = {name: p for name, p in self._base.named_parameters() if not p.is_meta}
        """Trained base parameters, such as biases. Those inside PEFT's modules are merged with them."""
        self._unread: dict[str, torch.Tensor] = {}
        """Merged tensors that have not been read yet."""
        self.config: PretrainedConfig = self._base.config
        self.config.dtype, self.config.use_cache = stored_dtype, use_cache
        self._untied = self._untie()

    def groups(self) -> Iterator[list[tuple[str, TensorSpec]]]:
        """Yield the merged model's tensors, file by file of the base. Untied copies are in the last group."""
        for number, names in enumerate(self._weights.files.values(), start=1):
            group = [(name, self._spec(name)) for name in names if name in self._shapes]
            if number == len(self._weights.files):
                group += [(name, self._spec(name)) for name in self._untied]
            yield group

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the merged model, in the dtype in which the base stores it.

        Raises:
            ArtifactError: the shape is not that of the base, or the merged tensor is not finite.
        """
        if name not in self._unread:
            self._unread |= self._compute(name)
        return self._unread.pop(name)

    def _compute(self, name: str) -> dict[str, torch.Tensor]:
        """Return all tensors of the PEFT module that a tensor belongs to, or the tensor alone if it is in none."""
        path = next((path for path in self._peft_modules if name.startswith(f"{path}.")), None)
        if path is None:
            if name in self._trained_in_place:
                return {name: self._to_stored_dtype(name, self._trained_in_place[name])}
            return {name: self._read_base(name).to(self._spec(name).dtype)}
        merged = {f"{path}.{inner}": tensor for inner, tensor in self._merge_module(path).items()}
        return {name: self._to_stored_dtype(name, x) for name, x in merged.items() if name in self._shapes}

    def _merge_module(self, path: str) -> dict[str, torch.Tensor]:
        """Return the state dict of a merged module. Its base weights are freed afterwards."""
        module: Any = self._peft_modules.pop(path)
        if _is_plain_lora(module):
            return self._merge_linear(path, module)
        loaded = []
        if isinstance(module, ModulesToSaveWrapper):  # which replaces the base's weights by the adapter's
            if f"{path}.weight" in self._saved_embeddings:
                self._read_base(f"{path}.weight")  # checks that they are the base's
        else:
            for owner_name, owner in module.named_modules():
                for leaf, parameter in list(owner._parameters.items()):
                    if parameter is not None and parameter.is_meta:
                        weight = self._read_base(_base_name(path, owner_name, leaf)).to(torch.float32, copy=True)
                        # Not in place: another module may share the parameter, and is merged separately.
                        owner._parameters[leaf] = torch.nn.Parameter(weight, requires_grad=False)
                        loaded.append((owner, leaf, parameter))
        # safe_merge would copy each weight to check that the sum is finite; _to_stored_dtype checks it.
        if hasattr(module, "unload_and_optionally_merge_module"):
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            module.merge()
            merged = module.get_base_layer()
        state: dict[str, torch.Tensor] = merged.state_dict()
        for owner, leaf, parameter in loaded:
            owner._parameters[leaf] = parameter
        return state

    def _merge_linear(self, path: str, module: Any) -> dict[str, torch.Tensor]:
        """Merge a linear layer block by block, so that its weight is never stored in float32.

        Computes PEFT's `get_delta_weight`, (B @ A) * scaling. B @ A is computed at once, because a product of some rows
        may be rounded differently.
        """
        adapter, weight = module.active_adapters[0], self._read_base(f"{path}.weight")
        product, scaling = module.lora_B[adapter].weight @ module.lora_A[adapter].weight, module.scaling[adapter]
        merged = torch.empty(weight.shape, dtype=self._spec(f"{path}.weight").dtype)
        block = max(1, BLOCK_NUMEL // weight.shape[1])
        for start in range(0, len(weight), block):
            rows = slice(start, start + block)
            merged[rows] = product[rows].mul_(scaling).add_(weight[rows])
        state = {"weight": merged}
        if (bias := module.get_base_layer().bias) is not None:
            state["bias"] = self._read_base(f"{path}.bias") if bias.is_meta else bias
        return state

    def _read_base(self, name: str) -> torch.Tensor:
        tensor = self._weights.read(self._stored_name(name))
        saved = next((x for x in (name, *self._tied_names(name)) if x in self._saved_embeddings), None)
        if saved is not None:
            check_same_embeddings(tensor, self._saved_embeddings[saved], f"{self._adapter}: {saved}")
            tensor = self._saved_embeddings[saved].to(tensor.dtype)
        if len(tensor) < self._shapes[name][0] and self._trains_new_rows(name):
            missing = self._shapes[name][0] - len(tensor)
            tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])  # the adapter replaces them
        if tuple(tensor.shape) != self._shapes[name]:
            raise ArtifactError(
                f"{self._adapter}: {name} has shape {self._shapes[name]} in the adapter's model and "
                f"{tuple(tensor.shape)} in the base; "
                "is this the base that it was trained on? (After resizing the vocabulary, save both embeddings.)"
            )
        return tensor if self._transform is None else self._transform(name, tensor)

    def _trains_new_rows(self, name: str) -> bool:
        """Whether the adapter has all rows of a weight that the base lacks; `resize_vocabulary` checks it."""
        module = self._base.get_submodule(name.rpartition(".")[0])
        return isinstance(module, TrainableTokensWrapper)

    def _to_stored_dtype(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        rounded = tensor.detach().to(self._spec(name).dtype)
        if rounded.numel() and not torch.isfinite(torch.stack(torch.aminmax(rounded))).all():  # NaN propagates to both
            raise ArtifactError(f"{self._adapter}: {name} is not finite when merged")
        return rounded

    def _spec(self, name: str) -> TensorSpec:
        return TensorSpec(self._weights.specs[self._stored_name(name)].dtype, self._shapes[name])

    def _stored_name(self, name: str) -> str:
        """Return the name of a tensor in the base's files, which store only one of two tied tensors."""
        if name in self._weights.specs:
            return name
        return next(other for other in self._tied_names(name) if other in self._weights.specs)

    def _tied_names(self, name: str) -> list[str]:
        source = self._tied.get(name)
        return [source] if source else [target for target, source in self._tied.items() if source == name]

    def _check_names(self, names: Iterable[str]) -> None:
        """Check that the base's files have the model's tensor names; of tied tensors one is enough."""
        names, stored = set(names), self._weights.specs.keys()
        pairs = [{target, source} for target, source in self._tied.items()]
        missing = [name for name in names - stored if not any(name in pair and pair & stored for pair in pairs)]
        different = sorted(missing) + sorted(stored - names)
        if different:
            raise NotStreamableError(f"{different[0]} is only in the model or only in its files")

    def _untie(self) -> list[str]:
        """Untie embeddings and head if the adapter makes them different; return the names that the files lack.

        PEFT merges LoRA on one of two tied tensors into both (huggingface/peft issue 2777).
        """
        added: list[str] = []
        if getattr(self._peft.active_peft_config, "ensure_weight_tying", False):
            return added
        for target, source in self._tied.items():
            if not any(name.startswith(f"{path}.") for path in self._peft_modules for name in (target, source)):
                continue
            for name in (source, target):
                if name not in self._unread:
                    self._unread |= self._compute(name)
            if torch.equal(self._unread[target], self._unread[source]):
                continue
            self.config.tie_word_embeddings = False
            added += [name for name in (source, target) if name not in self._weights.specs]
        return added


def check_lora_biases(model: PeftModel, adapter: Path) -> None:
    """Check that every layer whose LoRA has a bias has a bias itself, which the merged layer can hold.

    Raises:
        ArtifactError: one has not.
    """
    for name, module in model.get_base_model().named_modules():
        has_bias = isinstance(module, LoraLayer) and any(module.lora_bias.get(key) for key in module.active_adapters)
        if has_bias and getattr(module.get_base_layer(), "bias", None) is None:
            raise ArtifactError(
                f"{adapter}: lora_bias: {name} has no bias, so the adapter cannot be merged; use base and adapter with "
                "lora-accel generate, or PEFT"
            )


def _is_plain_lora(module: Any) -> bool:
    """Whether a module is a linear layer with one plain LoRA, so that merging is one addition."""
    return (
        type(module) is Linear
        and type(module.get_base_layer()) is torch.nn.Linear
        and len(module.active_adapters) == 1
        and module.active_adapters[0] in module.lora_A
        and not module.lora_variant  # DoRA, for example, needs the norm of each column
        and not module.fan_in_fan_out
        and not module.lora_bias[module.active_adapters[0]]
    )


def _outermost_peft_modules(base: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return PEFT's modules by their paths in the base, without those inside another one."""
    modules: dict[str, torch.nn.Module] = {}
    for name, module in base.named_modules():
        is_inner = any(name.startswith(f"{path}.") for path in modules)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not is_inner:
            modules[name] = module
    return modules


def _base_name(path: str, owner: str, leaf: str) -> str:
    return ".".join([path, *(part for part in owner.split(".") if part and part not in WRAPPER_NAMES), leaf])
