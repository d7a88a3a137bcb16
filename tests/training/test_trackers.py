"""Trackers: project and name, the config once, replies as text, and the same run after a resume."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_accel import run_training
from lora_accel.config.schema import RunConfig
from lora_accel.distributed.launch import check_trackers
from lora_accel.errors import ConfigError
from lora_accel.training.trackers import log_replies, start_trackers, tracker_options
from tests.conftest import reset_accelerator

CALLS: list[tuple[Any, ...]] = []


class FakeWandb(GeneralTracker):
    """Records what Accelerate's tracker for W&B gets."""

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        CALLS.append(("init", run_name, kwargs))

    tracker = None

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        CALLS.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        CALLS.append(("log", step, values))

    def log_table(self, table_name: str, columns: list[str], data: list[Any], step: int, **kwargs: Any) -> None:
        CALLS.append(("table", step, table_name, columns, data))

    def finish(self) -> None: ...


@pytest.fixture
def _fake_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", FakeWandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])


@pytest.mark.usefixtures("_fake_wandb")
def test_resumed_run_is_the_same_run(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The id is kept in the run folder, and the config is logged once."""
    logging = {"trackers": ["wandb"], "project": "orders", "run_name": "first"}
    evaluation = {"every_steps": 2, "prompts": ["repeat alpha"], "max_new_tokens": 2}
    config = make_config(training={"max_steps": 4}, logging=logging, evaluation=evaluation)
    folder = run_training(config).parent
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    shutil.rmtree(folder / "adapter")
    reset_accelerator()
    run_training(config)

    (_, project, first), (_, _, second) = [call for call in CALLS if call[0] == "init"]
    assert project == "orders"
    assert first == second == {"id": first["id"], "name": "first", "resume": "allow", "dir": str(folder)}
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": first["id"]}
    ((_, values),) = [call for call in CALLS if call[0] == "config"]
    assert values["training.max_steps"] == 4
    assert json.loads(values["data.train"])[0]["path"] == config.data.train[0].path
    assert all(isinstance(value, (str, int, float, type(None))) for value in values.values())
    tables = [call for call in CALLS if call[0] == "table"]
    assert [call[1] for call in tables][-4:] == [2, 4, 2, 4]
    assert tables[0][3] == ["prompt", "reply"]
    assert tables[0][4][0][0] == "repeat alpha"


@pytest.mark.usefixtures("_fake_wandb")
def test_run_that_begins_again_is_a_new_run(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """It may have another config, and W&B drops steps that an earlier run has logged."""
    config = make_config(training={"max_steps": 1}, logging={"trackers": ["wandb"]})
    folder = run_training(config).parent
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "adapter")
    reset_accelerator()
    run_training(config)
    (_, _, first), (_, _, second) = [call for call in CALLS if call[0] == "init"]
    assert first["id"] != second["id"]
    assert len([call for call in CALLS if call[0] == "config"]) == 2


def test_tensorboard_has_config_and_replies_as_text(make_config: Callable[..., RunConfig]) -> None:
    evaluation = {"prompts": ["repeat alpha"], "max_new_tokens": 2}
    config = make_config(training={"max_steps": 1}, logging={"trackers": ["tensorboard"]}, evaluation=evaluation)
    folder = run_training(config).parent
    assert [path.name for path in (folder / "tensorboard").iterdir() if path.is_dir()] == []
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "max_steps: 1" in texts["config/text_summary"]
    assert texts["replies/0/text_summary"].startswith("repeat alpha\n\n")
    assert "train/loss" in events.Tags()["scalars"]


def test_each_library_gets_project_name_and_id(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config()
    folder = str(tmp_path / "run")
    assert tracker_options("tensorboard", config, None, "id") == ("tensorboard", {})
    assert tracker_options("mlflow", config, "old", "id") == ("lora_accel", {"run_name": "run", "run_id": "old"})
    assert tracker_options("mlflow", config, None, "id")[1]["run_id"] is None, "MLflow chooses it"
    assert tracker_options("trackio", config, None, "abcdefgh")[1]["name"] == "run-abcdef"
    assert tracker_options("aim", config, "old", "id") == ("run", {"experiment": "lora_accel", "run_hash": "old"})
    assert "run_hash" not in tracker_options("aim", config, None, "id")[1]
    assert tracker_options("dvclive", config, "id", "id")[1] == {
        "dir": f"{folder}/dvclive",
        "dvcyaml": f"{folder}/dvclive/dvc.yaml",
        "resume": True,
    }


def test_same_experiment_in_a_swanlab_that_can_resume(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(project: str, id: str | None = None, resume: str | None = None) -> None: ...

    config = make_config()
    assert "id" not in tracker_options("swanlab", config, None, "0123456789abcdef" * 2)[1]
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(init=init))
    options = tracker_options("swanlab", config, None, "0123456789abcdef" * 2)[1]
    assert (options["id"], options["resume"]) == ("0123456789abcdef01234", "allow")


@pytest.mark.parametrize(("name", "num_configs"), [("wandb", 1), ("trackio", 2), ("clearml", 2)])
def test_config_is_logged_at_each_start_where_a_start_replaces_it(
    make_config: Callable[..., RunConfig], tmp_path: Path, name: str, num_configs: int
) -> None:
    class Tracker(FakeWandb):
        pass

    Tracker.name = name
    CALLS.clear()
    config = make_config()
    (tmp_path / "run").mkdir()
    for first_step in (0, 2):
        accelerator = SimpleNamespace(log_with=[name], is_main_process=True, trackers=[Tracker("x")])
        accelerator.init_trackers = lambda project, init_kwargs: None
        start_trackers(cast(Accelerator, accelerator), config, first_step)
    assert len([call for call in CALLS if call[0] == "config"]) == num_configs


def test_replies_in_comet_aim_and_swanlab_are_text_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[tuple[Any, ...]] = []

    class Comet(FakeWandb):
        name = "comet_ml"
        tracker = SimpleNamespace(log_text=lambda text, step: texts.append((text, step)))

    class Aim(FakeWandb):
        name = "aim"
        tracker = SimpleNamespace(track=lambda text, name, step: texts.append((name, text, step)))

    class Swanlab(FakeWandb):
        name = "swanlab"

    monkeypatch.setitem(sys.modules, "aim", SimpleNamespace(Text=lambda text: ("text", text)))
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(Text=lambda text: ("text", text)))
    CALLS.clear()
    log_replies([Comet("x"), Aim("x"), Swanlab("x")], 3, [("prompt", "reply")])
    assert texts == [("prompt\n\nreply", 3), ("replies/0", ("text", "prompt\n\nreply"), 3)]
    assert CALLS[-1] == ("log", 3, {"replies/0": ("text", "prompt\n\nreply")})


def test_replies_are_left_out_where_there_is_no_text() -> None:
    class NoText(FakeWandb):
        name = "dvclive"

    CALLS.clear()
    log_replies([NoText("x")], 1, [("prompt", "reply")])
    assert [call[0] for call in CALLS] == ["init"]


def test_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    with pytest.raises(ConfigError, match="not installed: wandb; run pip install wandb, or leave out"):
        check_trackers(["tensorboard", "wandb"])
    with pytest.raises(ConfigError, match=r"'wandbb' is not a tracker of Accelerate.*installed here are tensorboard"):
        check_trackers(["wandbb"])
