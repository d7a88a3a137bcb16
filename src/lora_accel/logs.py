"""The package's logger, `logging.getLogger("lora_accel")`. Rank 0 logs everything, others only warnings and errors.

As a library, the package adds no handler: the program configures logging. The commands call `console.show_logs`.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("lora_accel")


def _is_from_rank_0_or_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or _rank() == 0


def _rank() -> int:
    """Return the rank of this process; 0 before the processes are connected."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0
    rank: int = distributed.get_rank()
    return rank


logger.addFilter(_is_from_rank_0_or_warning)
