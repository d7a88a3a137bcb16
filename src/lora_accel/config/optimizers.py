"""The optimizers: how to construct each one, and which of its state tensors a checkpoint stores.

To add an optimizer, add it to `OPTIMIZERS`. Its class is imported only when it is constructed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

BLOCK_SIZE = 256
"""Values of a state tensor that share one scale in bitsandbytes' 8-bit optimizers."""
MIN_8BIT_NUMEL = 4096
"""Parameters with fewer values keep their state in float32 there."""


class Moment(NamedTuple):
    """Shape and dtype of a state tensor."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    """float32 or uint8."""

    @property
    def num_bytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 1)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer class that accepts parameter groups with `lr` and `weight_decay`."""

    path: str
    """Import path of the class."""
    moments: tuple[str, ...]
    """Names of its state tensors in torch. All are zero before the first update. Unless `layout` is set, each has the
    shape of its parameter."""
    non_negative: tuple[str, ...] = ()
    """Moments that cannot be negative. A checkpoint with a negative value in one of them is corrupt."""
    has_fused: bool = False
    """Whether the class accepts `fused=True`, which updates all parameters in one kernel."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of the class."""
    settable: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments that `training.optimizer_options` may set -> their defaults."""
    zero_problem: str = ""
    """Why it is not supported under DeepSpeed ZeRO, which flattens parameters and splits them between ranks. Empty = it
    is: the update of each value depends on no other value, and each moment has the shape of its parameter."""
    is_matrix_only: bool = False
    """Whether the class supports only parameters with two dimensions."""
    has_int_step: bool = False
    """Whether its state counts the updates in an int instead of a tensor."""
    layout: Callable[[tuple[int, ...]], Mapping[str, Moment]] | None = None
    """Shape of a parameter -> its moments, if they have other shapes or dtypes."""

    def moments_of(self, shape: tuple[int, ...]) -> Mapping[str, Moment]:
        """Return the moments of a parameter.

        Args:
            shape: of the parameter, unsharded.
        """
        if self.layout is not None:
            return self.layout(shape)
        return dict.fromkeys(self.moments, Moment(shape))

    def arguments(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of the class.

        Args:
            chosen: `training.optimizer_options`, without those that are not set.
        """
        return {**self.options, **self.settable, **chosen}


def _quantized(shape: tuple[int, ...]) -> dict[str, Moment]:
    """Return the moments of bitsandbytes' AdamW8bit: 8-bit codes, and a float32 scale per block."""
    numel = math.prod(shape)
    if numel < MIN_8BIT_NUMEL:
        return dict.fromkeys(("state1", "state2"), Moment(shape))
    scales = Moment((math.ceil(numel / BLOCK_SIZE),))
    codes = dict.fromkeys(("state1", "state2"), Moment(shape, "uint8"))
    return codes | dict.fromkeys(("absmax1", "absmax2"), scales)


def _factored(shape: tuple[int, ...]) -> dict[str, Moment]:
    """Return the moments of Adafactor: the means of squared gradients over rows and columns of a matrix."""
    if len(shape) < 2:
        return {"variance": Moment(shape)}
    return {"row_var": Moment((*shape[:-1], 1)), "col_var": Moment((*shape[:-2], 1, shape[-1]))}


_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_TWO_STATES = OptimizerSpec(
    "bitsandbytes.optim.PagedAdamW",
    moments=("state1", "state2"),
    non_negative=("state2",),
    settable=_ADAM,
    zero_problem="ZeRO's moments are in memory that is not paged; to keep them in host memory use offload_optimizer",
    has_int_step=True,
)
_TWO_8BIT_STATES = dataclasses.replace(
    _TWO_STATES,
    path="bitsandbytes.optim.AdamW8bit",
    moments=("state1", "state2", "absmax1", "absmax2"),
    non_negative=("absmax1", "absmax2"),
    zero_problem="ZeRO would change which values share a scale",
    layout=_quantized,
)

OPTIMIZERS: dict[str, OptimizerSpec] = {
    # Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    "adamw": OptimizerSpec(
        "torch.optim.AdamW",
        moments=("exp_avg", "exp_avg_sq"),
        non_negative=("exp_avg_sq",),
        has_fused=True,
        settable=_ADAM,
    ),
    # Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    "adamw_8bit": _TWO_8BIT_STATES,
    # Dettmers et al., QLoRA, arXiv 2305.14314: the moments are in memory that CUDA moves to the host if needed.
    "paged_adamw": _TWO_STATES,
    "paged_adamw_8bit": dataclasses.replace(_TWO_8BIT_STATES, path="bitsandbytes.optim.PagedAdamW8bit"),
    # Shazeer & Stern, Adafactor, arXiv 1804.04235.
    "adafactor": OptimizerSpec(
        "torch.optim.Adafactor",
        moments=("row_var", "col_var", "variance"),
        non_negative=("row_var", "col_var", "variance"),
        zero_problem="its moments are means over rows and columns, which ZeRO splits",
        layout=_factored,
    ),
    # Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
    "lion": OptimizerSpec(
        "bitsandbytes.optim.Lion", moments=("state1",), settable={"betas": (0.9, 0.99)}, has_int_step=True
    ),
    # Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon/.
    "muon": OptimizerSpec(
        "torch.optim.Muon",
        moments=("momentum_buffer",),
        options={"adjust_lr_fn": "match_rms_adamw"},  # so that the rates of AdamW fit
        settable={"momentum": 0.95},
        zero_problem="it orthogonalizes matrices, which ZeRO splits",
        is_matrix_only=True,
    ),
    "sgd": OptimizerSpec("torch.optim.SGD", moments=("momentum_buffer",), settable={"momentum": 0.9}),
}
"""Names for `training.optimizer`."""
