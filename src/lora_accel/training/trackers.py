"""Starts the trackers of a run, and continues the same run in each of them after a resume."""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lora_accel.config.files import config_to_yaml
from lora_accel.config.flat import flatten
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ArtifactError, TrainingError, first_line
from lora_accel.saving.atomic import read_json, write_json

IDS = "trackers.json"
"""File in the run folder: the id of this run in each tracker, by the tracker's name."""
PROJECT = "lora_accel"
"""Default of `logging.project`."""
CONFIG_PER_START = ("trackio", "clearml")
"""Trackers that get the config at each start: in Trackio, that of a start replaces the earlier one, even if it is
empty; in ClearML, a start is a new task."""


def start_trackers(accelerator: Accelerator, config: RunConfig, first_step: int) -> None:
    """Start the trackers of `logging.trackers`, each with the run's project and name, and log the config.

    A run that begins at step 0 is a new one in each tracker, even if one was started in this folder before.

    Accelerate has one project name for all trackers, and takes it as TensorBoard's folder, so each is started alone.

    Raises:
        TrainingError: one cannot be started.
    """
    folder, kinds = Path(config.output_dir), list(accelerator.log_with)
    ids, trackers = _read_ids(folder) if first_step else {}, []
    for kind in kinds:
        name = str(getattr(kind, "value", kind))
        is_new, run_id = name not in ids, ids.get(name) or secrets.token_hex(16)
        project, options = tracker_options(name, config, None if is_new else run_id, run_id)
        try:
            accelerator.log_with = [kind]
            accelerator.init_trackers(project, init_kwargs={name: options})
            trackers += accelerator.trackers
            if accelerator.is_main_process and (is_new or name in CONFIG_PER_START):
                _log_config(accelerator.trackers[0], config)
            if accelerator.is_main_process and is_new:
                ids[name] = _id_of(accelerator.trackers[0]) or run_id
                write_json(folder / IDS, ids)
        except Exception as error:  # each library raises its own
            raise TrainingError(
                f"logging.trackers: {name} cannot be started: {first_line(error)}. Fix it or set "
                "logging.trackers=[], and run the same command to resume"
            ) from error
    accelerator.log_with, accelerator.trackers = kinds, trackers


def tracker_options(name: str, config: RunConfig, stored_id: str | None, run_id: str) -> tuple[str, dict[str, Any]]:
    """Return the project name for a tracker of Accelerate, and the arguments of its library.

    Args:
        stored_id: the run's id in this tracker, of an earlier start; None = this is the first one.
        run_id: the stored id, or a new one for the libraries in which the user chooses it.
    """
    folder = Path(config.output_dir)
    project, run_name = config.logging.project or PROJECT, config.logging.run_name or folder.absolute().name
    options: Mapping[str, dict[str, Any]] = {
        "wandb": {"id": run_id, "name": run_name, "resume": "allow", "dir": str(folder)},
        # The name is the identity of a run in Trackio.
        "trackio": {"name": f"{run_name}-{run_id[:6]}"} | _if_known("trackio", "init", {"resume": "allow"}),
        "mlflow": {"run_name": run_name, "run_id": stored_id},
        "comet_ml": {"experiment_key": run_id},
        "aim": {"experiment": project} | ({"run_hash": stored_id} if stored_id else {}),
        "clearml": {"project_name": project, "task_name": run_name},
        # By default it writes dvc.yaml into the working directory.
        "dvclive": {
            "dir": str(folder / "dvclive"),
            "dvcyaml": str(folder / "dvclive" / "dvc.yaml"),
            "resume": stored_id is not None,
        },
        "swanlab": {"experiment_name": run_name, "logdir": str(folder / "swanlab")}
        | _if_known("swanlab", "init", {"id": run_id[:21], "resume": "allow"}),  # its ids have 21 characters
    }
    # The first argument is TensorBoard's folder in the run folder, and the name of a run in Aim.
    first = {"tensorboard": "tensorboard", "aim": run_name}.get(name, project)
    return first, options.get(name, {})


def log_replies(trackers: Sequence[Any], step: int, replies: Sequence[tuple[str, str]]) -> None:
    """Log the replies of an evaluation as text, in the trackers that have text.

    Args:
        trackers: Accelerate's.
        replies: (prompt, reply) pairs.
    """
    for tracker in trackers:
        if tracker.name in ("wandb", "clearml"):
            tracker.log_table("replies", columns=["prompt", "reply"], data=[list(pair) for pair in replies], step=step)
        elif tracker.name == "comet_ml":
            for prompt, reply in replies:  # its other values have no step: the last one replaces the earlier ones
                tracker.tracker.log_text(f"{prompt}\n\n{reply}", step=step)
        elif tracker.name in ("tensorboard", "trackio"):
            texts = {f"replies/{number}": f"{p}\n\n{r}" for number, (p, r) in enumerate(replies)}
            tracker.log(texts, step=step)
        elif tracker.name == "aim":
            import aim

            for number, (prompt, reply) in enumerate(replies):
                tracker.tracker.track(aim.Text(f"{prompt}\n\n{reply}"), name=f"replies/{number}", step=step)
        elif tracker.name == "swanlab":
            import swanlab

            tracker.log({f"replies/{n}": swanlab.Text(f"{p}\n\n{r}") for n, (p, r) in enumerate(replies)}, step=step)
        elif tracker.name == "mlflow":
            import mlflow

            text = "\n\n".join(f"> {prompt}\n{reply}" for prompt, reply in replies)
            mlflow.log_text(text, f"replies/step-{step:08}.txt")


def _log_config(tracker: Any, config: RunConfig) -> None:
    """Log the full config. TensorBoard gets text: its table of hyper-parameters is a second run in another folder."""
    if tracker.name == "tensorboard":
        text = "\n".join(f"    {line}" for line in config_to_yaml(config).splitlines())  # Markdown: verbatim
        tracker.tracker.add_text("config", text)
    else:
        options = flatten(config.model_dump())
        for name, value in options.items():
            if value is not None and not isinstance(value, (str, int, float)):
                options[name] = json.dumps(value, ensure_ascii=False)
        tracker.store_init_configuration(options)


def _id_of(tracker: Any) -> str | None:
    """Return the id that a library has chosen for the run; None = it takes ours, or has none."""
    find: dict[str, Callable[[], str]] = {
        "mlflow": lambda: str(tracker.tracker.info.run_id),
        "aim": lambda: str(tracker.tracker.hash),
    }
    return find[tracker.name]() if tracker.name in find else None


def _if_known(module: str, function: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a function of an installed package has; none without the package."""
    try:
        parameters = inspect.signature(getattr(__import__(module), function)).parameters
    except (ImportError, AttributeError):
        return {}
    return {key: value for key, value in options.items() if key in parameters}


def _read_ids(folder: Path) -> dict[str, str]:
    """Return the ids of the run; empty for a new one."""
    try:
        return {name: str(run_id) for name, run_id in read_json(folder / IDS).items()}
    except ArtifactError:
        return {}
