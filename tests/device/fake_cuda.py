"""CUDA without a GPU: fake tensors on cuda:0 have shapes, dtypes and a device, and no data. Those on the CPU are real.

Operations on fake tensors check devices as real ones do, so a tensor that was left on the CPU raises. A value that the
host reads (`.item()`, `bool(tensor)`, `.cpu()`) is zero, and the `Recorder` records that the host waited for it. What
is not checked: what happens within kernels, values, and memory that is really allocated.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import MagicMock, patch

import bitsandbytes
import torch
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention as flex_forward
from torch._higher_order_ops.flex_attention import flex_attention_backward as flex_backward
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

import lora_accel
from lora_accel.model import device, gpu_attention

VIEWS = frozenset(
    {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided"}
    | {"expand", "is_pinned", "is_same_size", "lift_fresh", "mT", "narrow", "new_empty", "new_empty_strided", "permute"}
    | {"record_stream", "reshape", "resize_", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t"}
    | {"transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"}
)
"""Operations that start no kernel."""
PRODUCTS = frozenset({"_grouped_mm", "addbmm", "addmm", "baddbmm", "bmm", "mm"})
VALUES = frozenset({"_local_scalar_dense", "is_nonzero"})
"""Operations that return a value to the host."""
LIBRARY = torch.library.Library("aten", "IMPL")
BITSANDBYTES = Path(bitsandbytes.__file__).parent
CALLERS = (str(Path(lora_accel.__file__).parent), str(BITSANDBYTES), str(Path(__file__).with_name("controls.py")))
"""Files of those to whom an operation is attributed."""
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
    LIBRARY.impl("_grouped_mm", _shape_of_grouped_mm, "Meta", allow_override=True)
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
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda:0"): first on the CPU, then copied
    FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda tensor, *args: tensor  # type: ignore[method-assign]
    import_utils.is_fake_tensor = lambda value: False  # transformers skips for them what would wait for a value
    _install_bitsandbytes()
    Recorder.mode = mode
    return mode


def _not_run(*_: Any, **__: Any) -> Any:
    raise NotImplementedError  # fake tensors use the operator's shapes only


def _install_bitsandbytes() -> None:
    """Import bitsandbytes' operators for CUDA, with a library in which every kernel does nothing."""
    library = MagicMock()
    library.cigemmlt_32.return_value = 0  # no error
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    with patch.object(bitsandbytes.cextension, "lib", library):
        operators = importlib.import_module("bitsandbytes.backends.cuda.ops")
    operators.CUBLAS_Context = MagicMock()
    FakeTensor.data_ptr = lambda tensor: 0  # type: ignore[method-assign]


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
        if hasattr(original, attribute):
            value = getattr(original, attribute)
            setattr(moved, attribute, None if value is None else fake(value))
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
    """Runs operations that have a tensor on the GPU on fake tensors, and the others as they are.

    Records what a GPU would have to do: kernels, copies from and to the host, and waits of the host.
    """

    mode: FakeTensorMode
    """The mode in which tensors on the GPU exist; set by `install`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        """Matrix products: `operator, dtype of its operands`."""
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
        inputs = list(tensors_in((args, kwargs)))
        is_on_gpu = any(tensor.device.type == "cuda" for tensor in inputs)
        if not is_on_gpu and torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        if is_on_gpu and _reads(name, inputs, kwargs):
            self.syncs.append(_caller())
            return _zeros(name, inputs, kwargs)
        if func.namespace == "bitsandbytes":
            # Its operators are Python code, which starts kernels and may wait for values.
            is_own = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")
            key = "CUDA" if is_own else "CompositeExplicitAutograd"
            with self:
                return func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
        if name in ("_to_copy", "copy_") and inputs[-1].device.type == "cpu":
            self.to_device.append(_caller())
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if not non_blocking and inputs[-1].numel() > 0:
                self.blocking.append(_caller())
        if name in PRODUCTS:
            left = inputs[1 if "add" in name else 0]
            if left.shape[-1] > 1:  # else an outer product, such as the angles of rotary embeddings
                self.products[f"{name}, {left.dtype}"] += 1
        if name not in VIEWS | ATTRIBUTES:
            self.kernels[name] += 1
        with self.mode:
            return func(*args, **kwargs)


def _reads(name: str, inputs: list[torch.Tensor], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation on a tensor of the GPU returns values to the host."""
    if name == "copy_":
        return inputs[0].device.type == "cpu"
    return name in VALUES or (name == "_to_copy" and kwargs.get("device") == torch.device("cpu"))


def _zeros(name: str, inputs: list[torch.Tensor], kwargs: Mapping[str, Any]) -> Any:
    """Return what the host reads."""
    if name == "copy_":
        return inputs[0].zero_()
    if name in VALUES:
        return torch.zeros((), dtype=inputs[0].dtype).item()
    return torch.zeros(inputs[0].shape, dtype=kwargs.get("dtype") or inputs[0].dtype)


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


def _shape_of_grouped_mm(left: Any, right: Any, offsets: Any, *_: Any) -> Any:
    """Replaces torch 2.13's own, which accepts bfloat16 only; its kernels accept all dtypes.

    Args:
        left, right: [rows, in] and [groups, in, out]; for the gradient of the weights [in, rows] and [rows, out].
    """
    shape = (len(left), right.shape[-1])
    return left.new_empty(shape if right.ndim == 3 else (len(offsets), *shape))


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested arguments or outputs of an operation."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))


def _caller() -> str:
    """Return the innermost function of the package, of bitsandbytes or of a test that led to an operation."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(CALLERS):
        frame = frame.f_back
    if frame is None:
        return ""
    path = Path(frame.f_code.co_filename)
    return "bitsandbytes" if path.is_relative_to(BITSANDBYTES) else f"{path.name}:{frame.f_code.co_name}"
