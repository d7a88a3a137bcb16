"""The activation memory of a micro-batch: its forward and backward run on tensors without data.

torch's fake tensors have shapes, dtypes and storages, but no memory. So the code that is traced is the code that trains
(attention, kernels, fused loss, adapter), and what it saves for backward and allocates in between is counted exactly,
whatever the family of the model. A model has many equal layers: of each kind two are traced, and the rest follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_accel.batching.batch import MicroBatch
from lora_accel.errors import LoraAccelError, first_line
from lora_accel.planning.memory import Usage
from lora_accel.planning.skeleton import Skeleton
from lora_accel.training.loss import summed_token_loss


class UntraceableError(LoraAccelError):
    """A model whose forward depends on values, such as the routing of some experts."""


class Tracer:
    """Traces micro-batches of a model. Its parameters become fake tensors, which only this class can use."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._model, self._keys = skeleton.model, skeleton.dropout_keys
        self._autocast = skeleton.autocast
        self._fake = FakeTensorMode()
        with self._fake:
            _replace_tensors(self._model)

    def usage(self, batch: MicroBatch) -> Usage:
        """Return what the forward and the backward pass of a micro-batch allocate.

        Raises:
            UntraceableError: the model's code needs the values of its tensors.
        """
        layers = _find_layers(self._model)
        if layers is None:
            return self._trace(batch)
        kinds = _kinds(layers)
        first = {kind: kinds.index(kind) for kind in kinds}
        one_of_each = self._trace_layers(batch, layers, first.values())
        total = one_of_each.activations
        used = [one_of_each]
        for kind, count in Counter(kinds).items():
            if count > 1:
                second = kinds.index(kind, first[kind] + 1)
                used.append(self._trace_layers(batch, layers, {*first.values(), second}))
                total += (count - 1) * (used[-1].activations - one_of_each.activations)
        return Usage(total, max(usage.loss for usage in used), max(usage.backward for usage in used))

    def _trace_layers(self, batch: MicroBatch, layers: nn.ModuleList, indices: Iterable[int]) -> Usage:
        """Trace with some of the layers only."""
        modules = dict(layers._modules)
        chosen = [layers[index] for index in sorted(indices)]
        try:
            layers._modules.clear()
            layers.extend(chosen)
            return self._trace(batch)
        finally:
            layers._modules.clear()
            layers._modules.update(modules)

    def _trace(self, batch: MicroBatch) -> Usage:
        values = {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
        fake: dict[str, Any] = {name: self._fake.from_tensor(value) for name, value in values.items()}
        batch = dataclasses.replace(batch, **fake)
        self._keys.keys = batch.token_keys
        autocast = torch.autocast("cpu", self._autocast) if self._autocast else contextlib.nullcontext()
        known = [*self._model.parameters(), *self._model.buffers(), *fake.values()]
        try:
            with self._fake, _StorageCounter(known) as counter:
                with autocast:
                    loss = summed_token_loss(self._model, batch)
                saved, forward_peak = counter.live, counter.peak
                counter.peak = saved
                if loss.requires_grad:
                    torch.autograd.backward(loss)
                return Usage(saved, forward_peak - saved, counter.peak - saved)
        except Exception as error:  # fake tensors raise many types
            raise UntraceableError(f"the model's code cannot be traced: {first_line(error)}") from None
        finally:
            for parameter in self._model.parameters():
                parameter.grad = None


class _StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations create, until they are freed."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it returns."""
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _replace_tensors(model: nn.Module) -> None:
    """Replace parameters and buffers by fake ones on the CPU. Tied parameters stay tied."""
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps the originals, so that no id is used twice
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    replaced[id(tensor)] = tensor, fake
                tensors[name] = replaced[id(tensor)][1]  # type: ignore[assignment]


def _find_layers(model: Any) -> nn.ModuleList | None:
    """Return the decoder layers; None if the model keeps them in another way than transformers' models."""
    num_layers = getattr(model.get_base_model().config.get_text_config(), "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((layers for layers in lists if len(layers) == num_layers), None)


def _kinds(layers: nn.ModuleList) -> list[tuple[Any, ...]]:
    """Return what layers have in common whose forwards save the same.

    A frozen layer saves nothing unless a layer before it is trained. The first layer of each window makes the masks of
    attention, which all with that window share.
    """
    kinds, is_after_trained = [], False
    for layer in layers:
        parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        is_trained = any(parameter.requires_grad for parameter in layer.parameters())
        is_after_trained |= is_trained
        windows = tuple(module.sliding_window for module in layer.modules() if hasattr(module, "sliding_window"))
        kinds.append((type(layer), getattr(layer, "attention_type", None), windows, parameters, is_after_trained))
    return kinds
