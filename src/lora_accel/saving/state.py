"""The state.json of a checkpoint, validated. A manifest shows that a file is the one that was written, not by whom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_accel.errors import ArtifactError
from lora_accel.json_text import parse_strictly
from lora_accel.paths import open_to_read

MAX_STATE_BYTES = 10_000_000
Count = Annotated[int, Field(ge=0, lt=2**53)]


class StepState(BaseModel):
    """Everything in a checkpoint except its tensors. Older versions wrote fewer fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    step: int = Field(ge=1, lt=2**53)
    epoch: Count | None = None
    examples: Count | None = None
    skipped: Count = 0
    overflowed: Count = 0
    loss_scale: dict[str, float | int] | None = None
    evaluations: list[dict[str, float | int]] = []
    """The step, the fingerprint and the metrics of the evaluations before this checkpoint was saved."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    begun_from: str | None = Field(None, max_length=200)
    begun_at: str | None = Field(None, max_length=10_000)
    provenance: dict[str, Any] | None = None
    files: dict[str, str] | None = None
    """SHA-256 of the tensor files that were saved with this state."""


def read_state(file: Path, listed: dict[str, str]) -> dict[str, Any]:
    """Read the state.json of a checkpoint.

    Args:
        file: in a folder named step-NUMBER, or a copy of one under another name.
        listed: SHA-256 by name, as the checkpoint's manifest lists them.

    Returns:
        The state, with defaults of the fields that older versions did not write.

    Raises:
        ArtifactError: a field is missing, unknown, or has a value that the run cannot have written. The message names
            the file and the field.
    """
    try:
        with open_to_read(file) as stream:
            data = stream.read(MAX_STATE_BYTES + 1)
        if len(data) > MAX_STATE_BYTES:
            raise ArtifactError(f"{file}: over {MAX_STATE_BYTES:,} bytes; is this the state of a checkpoint?")
        values = parse_strictly(data.decode("utf-8"), allow_nan=False)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError, too
        raise ArtifactError(f"{file}: cannot be read: {error}") from None
    try:
        state = StepState.model_validate(values)
    except ValidationError as error:
        raise ArtifactError(f"{file}: {_describe(error)}") from None
    if problem := _contradiction(state, file.parent.name, listed):
        raise ArtifactError(f"{file}: {problem}")
    defaults = {"skipped": state.skipped, "overflowed": state.overflowed, "evaluations": state.evaluations}
    return dict(values) | defaults


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{field[:100]} is not a field that this version knows; was it written by a newer version?"
    if first["type"] == "missing":
        return f"{field} is missing"
    shown = repr(first["input"])
    return f"{field or 'it'}={shown[:60]}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _contradiction(state: StepState, folder: str, listed: dict[str, str]) -> str | None:
    """Return what in a state contradicts itself, the name of its folder, or the files beside it."""
    if state.skipped + state.overflowed > state.step:
        return f"skipped={state.skipped} and overflowed={state.overflowed} are more than step={state.step}"
    steps = [entry.get("step", 0) for entry in state.evaluations]
    if steps != sorted(set(steps)) or any(not 1 <= step < state.step for step in steps):
        return f"evaluations has the steps {steps!r:.60}, which are not increasing and before step={state.step}"
    number = re.fullmatch(r"step-(\d{8,})", folder)
    if number and int(number[1]) != state.step:
        return f"step={state.step}, but the folder is {folder}; was it renamed?"
    for name, sha256 in (state.files or {}).items():
        if listed.get(name) != sha256:
            return f"{name[:100]} is not the file that was saved with this state; was it copied from another step?"
    return None
