"""Read the configs that runs recorded. One of an older version lacks newer options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lora_accel.config.schema import RunConfig


def with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recorded config with each missing option filled in as its run was trained.

    That is the default, except for `training.warmup_from_zero`: before this option, every warm-up started at 0.
    """
    training = {"warmup_from_zero": True} | dict(config["training"])
    try:
        return RunConfig.model_validate({**config, "training": training}).model_dump()
    except ValidationError:
        return config  # of a newer version, or edited: compare it unchanged
