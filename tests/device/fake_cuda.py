"""CUDA without a GPU: fake tensors on cuda:0 have shapes, dtypes and a device, and no data.

Operations on them check devices as real ones do, so a tensor that was left on the CPU raises; and what needs a value on
the host (`.item()`, `bool(tensor)`) raises, since there is none. What is not checked: what happens within kernels,
values, and memory that is really allocated.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention as flex_forward
from torch._higher_order_ops.flex_attention import flex_attention_backward as flex_backward
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_accel
from lora_accel.model import device, gpu_attention

VIEWS = frozenset(
    {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided"}
    | {"expand", "is_pinned", "is_same_size", "lift_fresh", "mT", "narrow", "new_empty", "new_empty_strided", "permute"}
    | {"record_stream", "reshape", "resize_", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t"}
    | {"transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"}
)
"""Operations that start no kernel."""
LIBRARY = torch.library.Library("aten", "IMPL")
PACKAGE = str(Path(lora_accel.__file__).parent)
ATTRIBUTES = frozenset({"device", "sym_size", "_has_compatible_shallow_copy_type"})


@dataclasses.dataclass
class Properties:
    """What torch.cuda reports of the device."""

    major: int
    minor: int
    name: str = "a fake GPU"
    total_memory: int = 80_000_000_000
    multi_processor_count: int = 100


def install(library: str) -> FakeTensorMode:
    """Let torch believe that it has one GPU, and return the mode in which its tensors exist.

    Args:
        library: the compiled fake_cuda.cpp, which this process preloaded.
    """
    assert ctypes.CDLL(library).install()
    LIBRARY.impl("_efficient_attention_backward", _shapes_of_efficient_backward, "Meta", allow_override=True)
    LIBRARY.impl("silu_backward", _not_run, "CUDA")  # a torch without CUDA would decompose it
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    type(mode).avoid_device_init = property(lambda self: True)
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *a, **k: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (80_000_000_000, 80_000_000_000),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    return mode


def _not_run(*_: Any, **__: Any) -> Any:
    raise NotImplementedError  # fake tensors use the operator's shapes only


def set_capability(capability: tuple[int, int]) -> None:
    """Choose the compute capability that the GPU reports, and that the packages of kernels are installed."""
    properties = Properties(*capability)
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment,return-value]
    device.detect_device.cache_clear()
    device.has_package = lambda name: True  # type: ignore[assignment]
    # Compiling needs a real GPU. Its unfused operations have the same mask, softcap and devices.
    gpu_attention._flex_kernel = lambda device_type: flex_attention.flex_attention
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True


def move_model(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the tensors of a model by fake ones on cuda:0, those that share storage by the same one."""
    moved: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with mode:
            if tensor.is_meta:
                return torch.empty_like(tensor, device="cuda:0", requires_grad=False)
            return mode.from_tensor(tensor.detach()).to("cuda:0")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                _move_quantized(parameter, moved[id(parameter)], fake)
            if parameter is not None:
                module._parameters[name] = moved[id(parameter)]  # type: ignore[assignment]
                moved[id(moved[id(parameter)])] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _move_quantized(original: Any, moved: Any, fake: Any) -> None:
    """Move what bitsandbytes keeps beside a weight."""
    for attribute in ("CB", "SCB"):
        if getattr(original, attribute, None) is not None:
            setattr(moved, attribute, fake(getattr(original, attribute)))
    state = getattr(original, "quant_state", None)
    if state is None:
        return
    moved.quant_state = state = copy.copy(state)
    states = [state]
    if state.nested:
        state.state2 = copy.copy(state.state2)
        states.append(state.state2)
    for part in states:
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, fake(value))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what a GPU would have to do: kernels, copies from and to the host, and waits of the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.to_device: list[str] = []
        """Copies from the host: where they come from."""
        self.blocking: list[str] = []
        """Those that the host waits for."""
        self.syncs: list[str] = []
        """Where the host waits for values of the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it if it has a tensor on the GPU."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        output = func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        if not any(tensor.device.type == "cuda" for tensor in (*inputs, *tensors_in(output))):
            return output
        if name in ("_to_copy", "copy_"):
            source, target = inputs[-1].device.type, next(iter(tensors_in(output))).device.type
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if (source, target) == ("cpu", "cuda"):
                self.to_device.append(_caller())
                if not non_blocking and inputs[-1].numel() > 0:
                    self.blocking.append(_caller())
            elif (source, target) == ("cuda", "cpu"):
                self.syncs.append(_caller())
        if name not in VIEWS | ATTRIBUTES:
            self.kernels[name] += 1
        return output


def _register(operator: Any) -> None:
    """Count a higher-order operator as one kernel. A mode gets those only by a rule for each."""

    @operator.py_impl(Recorder)  # type: ignore[untyped-decorator]
    def rule(recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
        recorder.kernels[operator.__name__] += 1
        return operator(*args, **kwargs)


_register(flex_forward)
_register(flex_backward)


def _shapes_of_efficient_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """Replaces torch 2.13's own, which lacks two arguments of the operator (`out`, `window_size`)."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), query.new_empty(0)


def record_values(recorder: Recorder) -> None:
    """Let `.tolist()` and `.item()` return ones, and record them as waits. (`bool(tensor)` still raises.)"""

    original = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return original(tensor)
        recorder.syncs.append(_caller())
        return [1.0] * tensor.numel()

    value = torch.Tensor.item

    def item(tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return value(tensor)
        recorder.syncs.append(_caller())
        return 1.0

    torch.Tensor.tolist = FakeTensor.tolist = tolist  # type: ignore[method-assign]
    torch.Tensor.item = item  # type: ignore[method-assign]


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested arguments or outputs of an operation."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _caller() -> str:
    """Return the innermost line of the package, or of a test, that led to an operation."""
    frames = traceback.extract_stack()[:-2]
    own = [f for f in frames if f.filename.startswith(PACKAGE) or Path(f.filename).name.startswith("control")]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.name}"
