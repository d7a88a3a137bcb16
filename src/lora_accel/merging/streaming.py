"""The tensors of base + adapter, one at a time: PEFT merges a module whose base weights have just been read.

The model is built without memory (torch's meta device). Only the adapter is there, and the tensors of the module in
hand. Since every sum is PEFT's own, in float32, whatever PEFT can merge comes out as PEFT merges it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PretrainedConfig

from lora_accel.errors import ArtifactError
from lora_accel.merging.shards import Kind, Weights
from lora_accel.model.base import build_on_meta_device
from lora_accel.saving.adapter import (
    adapter_parameters,
    attach_adapter,
    check_same_embeddings,
    check_tensor_names,
    pop_base_embeddings,
    read_adapter,
    resize_vocabulary,
)

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""What a base weight is replaced by before the adapter is added to it: (name, weight as stored) -> weight."""
BLOCK = 2**20
"""How many values of a weight are added to at once: 4 MB, which stay in the cache."""
INSIDE = {"base_layer", "original_module", "token_adapter"}
"""What PEFT puts into the path of a base parameter."""


class NotStreamableError(Exception):
    """The model has to be loaded whole; the message says why."""


class MergedTensors:
    """What stands in the merged model, by name; each tensor is to be asked for once.

    Args:
        adapter: its folder.
        weights: of the base.
        config: of the base; `self.config` is that of the merged model.
        change: see `Change`; None = the base as it is stored.

    Raises:
        NotStreamableError: names in the base's files are not those of the model (they are rewritten while loading, as
            for a mixture of experts), or PEFT changes the base's weights when it puts the adapter on.
        ArtifactError: the adapter does not fit the base.
    """

    def __init__(
        self, adapter: Path, weights: Weights, config: PretrainedConfig, *, change: Change | None = None
    ) -> None:
        self._adapter, self._weights, self._change = adapter, weights, change
        stored, use_cache = config.dtype, getattr(config, "use_cache", True)
        model = build_on_meta_device(config)
        self._tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self._refuse_other_names(model.state_dict().keys())
        state = read_adapter(adapter)
        resize_vocabulary(model, state)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._peft = attach_adapter(model, adapter, on_meta_device=True)
        self._plain = pop_base_embeddings(self._peft, state)
        parameters = adapter_parameters(self._peft)
        check_tensor_names({key: parameter.shape for key, parameter in parameters.items()}, state, str(adapter))
        real = {id(p): torch.nn.Parameter(state[key].float(), requires_grad=False) for key, p in parameters.items()}
        for module in self._peft.modules():
            module._parameters |= {name: real[id(p)] for name, p in module._parameters.items() if id(p) in real}
        self._base = self._peft.get_base_model()
        self._units = _outermost(self._base)
        self._biases = {name: p for name, p in self._base.named_parameters() if not p.is_meta}
        """What was trained beside LoRA, among the tensors of modules that are to be merged."""
        self._ready: dict[str, torch.Tensor] = {}
        self.config: PretrainedConfig = self._base.config
        self.config.dtype, self.config.use_cache = stored, use_cache
        self.parted = self._part()

    def groups(self) -> Iterator[list[tuple[str, Kind]]]:
        """Return which tensors the merged model has, file by file of the base; two that were one come last."""
        for number, names in enumerate(self._weights.files.values(), start=1):
            group = [(name, self._kind(name)) for name in names if name in self._shapes]
            if number == len(self._weights.files):
                group += [(name, self._kind(name)) for name in self.parted]
            yield group

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the merged model in the dtype that the base stores it in."""
        if name not in self._ready:
            self._ready |= self._formed(name)
        return self._ready.pop(name)

    def _formed(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of the module that a tensor belongs to: PEFT merges modules."""
        unit = next((unit for unit in self._units if name.startswith(f"{unit}.")), None)
        if unit is None:
            if name in self._biases:
                return {name: self._stored(name, self._biases[name])}
            return {name: self._read_base(name).to(self._kind(name).dtype)}
        return {
            full: self._stored(full, tensor)
            for inner, tensor in self._merged(unit).items()
            if (full := f"{unit}.{inner}") in self._shapes
        }

    def _merged(self, unit: str) -> dict[str, torch.Tensor]:
        """Merge one module, and leave it without memory again."""
        module: Any = self._units.pop(unit)
        if _is_plain(module):
            return self._added(unit, module)
        filled = []
        if not isinstance(module, ModulesToSaveWrapper):  # whose own copy stands in the adapter
            for owner_name, owner in module.named_modules():
                for leaf, parameter in list(owner._parameters.items()):
                    if parameter is not None and parameter.is_meta:
                        weight = self._read_base(_base_name(unit, owner_name, leaf)).to(torch.float32, copy=True)
                        # Not in place: another module may hold the same parameter, and is merged on its own.
                        owner._parameters[leaf] = torch.nn.Parameter(weight, requires_grad=False)
                        filled.append((owner, leaf, parameter))
        # Not with safe_merge, which copies each weight to add to it: what comes out is looked at below.
        if hasattr(module, "unload_and_optionally_merge_module"):
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            module.merge()
            merged = module.get_base_layer()
        state: dict[str, torch.Tensor] = merged.state_dict()
        for owner, leaf, parameter in filled:
            owner._parameters[leaf] = parameter
        return state

    def _added(self, unit: str, module: Any) -> dict[str, torch.Tensor]:
        """Add to a linear layer what PEFT adds, a few rows at a time: the whole layer is never there in float32.

        Its `get_delta_weight` is (B @ A) * scaling. The product is formed whole: a part may be rounded otherwise.
        """
        name, weight = module.active_adapters[0], self._read_base(f"{unit}.weight")
        product, scaling = module.lora_B[name].weight @ module.lora_A[name].weight, module.scaling[name]
        merged = torch.empty(weight.shape, dtype=self._kind(f"{unit}.weight").dtype)
        size = max(1, BLOCK // weight.shape[1])
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            merged[rows] = product[rows].mul_(scaling).add_(weight[rows])
        state = {"weight": merged}
        if (bias := module.get_base_layer().bias) is not None:
            state["bias"] = self._read_base(f"{unit}.bias") if bias.is_meta else bias
        return state

    def _read_base(self, name: str) -> torch.Tensor:
        tensor = self._weights.read(self._stored_name(name))
        if name in self._plain:
            check_same_embeddings(tensor, self._plain[name], f"{self._adapter}: {name}")
            tensor = self._plain[name].to(tensor.dtype)
        if tuple(tensor.shape) != self._shapes[name]:
            raise ArtifactError(
                f"{self._adapter}: {name} has shape {self._shapes[name]} in it and {tuple(tensor.shape)} in the base; "
                "is this the base that it was trained on? (After the vocabulary was resized, save both embeddings.)"
            )
        return tensor if self._change is None else self._change(name, tensor)

    def _stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        rounded = tensor.detach().to(self._weights.kinds[self._stored_name(name)].dtype)
        if rounded.numel() and not torch.isfinite(torch.stack(torch.aminmax(rounded))).all():  # a NaN is both
            raise ArtifactError(f"{self._adapter}: {name} is not finite when merged")
        return rounded

    def _kind(self, name: str) -> Kind:
        return Kind(self._weights.kinds[self._stored_name(name)].dtype, self._shapes[name])

    def _stored_name(self, name: str) -> str:
        """Return under which name the base's files hold a tensor: of two that are one they may hold either."""
        if name in self._weights.kinds:
            return name
        source = self._tied.get(name)
        others = [source] if source else [target for target, source in self._tied.items() if source == name]
        return next(other for other in others if other in self._weights.kinds)

    def _refuse_other_names(self, names: Iterable[str]) -> None:
        """Stream only what lies in the files as it lies in the model."""
        names, stored = set(names), self._weights.kinds.keys()
        one = [{target, source} for target, source in self._tied.items()]
        missing = [name for name in names - stored if not any(name in pair and pair & stored for pair in one)]
        other = sorted(missing) + sorted(stored - names)
        if other:
            raise NotStreamableError(f"{other[0]} is called otherwise in the model or in its files")

    def _part(self) -> list[str]:
        """Part embeddings and head that were one tensor, where the adapter makes two of them; return the added names.

        PEFT merges LoRA on one of the two into both (its warning points at huggingface/peft issue 2777).
        """
        added: list[str] = []
        if getattr(self._peft.active_peft_config, "ensure_weight_tying", False):
            return added
        for target, source in self._tied.items():
            if not any(name.startswith(f"{unit}.") for unit in self._units for name in (target, source)):
                continue
            self._ready |= self._formed(source) if source not in self._ready else {}
            self._ready |= self._formed(target) if target not in self._ready else {}
            if torch.equal(self._ready[target], self._ready[source]):
                continue
            self.config.tie_word_embeddings = False
            added += [name for name in (source, target) if name not in self._weights.kinds]
        return added


def _is_plain(module: Any) -> bool:
    """Whether a module is a linear layer with LoRA and nothing else, so that merging is one sum."""
    return (
        type(module) is Linear
        and type(module.get_base_layer()) is torch.nn.Linear
        and len(module.active_adapters) == 1
        and module.active_adapters[0] in module.lora_A
        and not module.lora_variant  # DoRA, for one, needs the norm of a column
        and not module.fan_in_fan_out
        and not module.lora_bias[module.active_adapters[0]]
    )


def _outermost(base: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return PEFT's modules by their names in the base, without those that lie within another."""
    units: dict[str, torch.nn.Module] = {}
    for name, module in base.named_modules():
        within = any(name.startswith(f"{unit}.") for unit in units)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not within:
            units[name] = module
    return units


def _base_name(unit: str, owner: str, leaf: str) -> str:
    return ".".join([unit, *(part for part in owner.split(".") if part and part not in INSIDE), leaf])
