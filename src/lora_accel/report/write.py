"""`lora-accel report`, and the report at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_accel.errors import ConfigError, first_line
from lora_accel.logs import logger
from lora_accel.pages import check_page_path, write_page
from lora_accel.paths import real_path
from lora_accel.report.charts import loss_chart
from lora_accel.report.figures import draw_png
from lora_accel.report.page import render_page, run_names
from lora_accel.report.read import RunRecord, read_run
from lora_accel.saving.atomic import write_bytes

REPORT, COMPARISON, LOSS_IMAGE = "report.html", "comparison.html", "loss.png"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of a run, or of several compared.

    Args:
        folders: run folders.
        out: file to write; None = report.html in the run folder, with loss.png beside it, or for several runs
            comparison.html in the first one's.

    Returns:
        The file.

    Raises:
        ConfigError: the file cannot be written, or a run is named twice.
        ArtifactError: a folder is not that of a run, or has no metrics.
    """
    if len({real_path(folder) for folder in folders}) < len(folders):
        raise ConfigError("report: a run is named twice; name each run once")
    file = out if out is not None else folders[0] / (REPORT if len(folders) == 1 else COMPARISON)
    runs = [read_run(folder) for folder in folders]
    check_page_path(file, "--out")
    write_page(file, render_page(runs), "--out")
    if out is None and len(runs) == 1 and (image := loss_image(runs[0])) is not None:
        write_bytes(folders[0] / LOSS_IMAGE, image)
    return file


def loss_image(run: RunRecord) -> bytes | None:
    """Return the loss curve as a PNG image; None if no loss is logged."""
    return draw_png(loss_chart([run], run_names([run]))) if "loss" in run.log.train else None


def report_finished_run(folder: Path) -> None:
    """Write the report at the end of a run. The run has succeeded, so a failure is a note."""
    try:
        logger.info(f"report: {write_report([folder])}")
    except Exception as error:  # of the disk, of matplotlib, of a damaged log
        logger.warning(f"note: the report cannot be written: {first_line(error)}; try lora-accel report {folder}")
