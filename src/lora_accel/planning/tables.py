"""The estimate as tables for the terminal."""

from __future__ import annotations

from lora_accel.console import format_table
from lora_accel.planning.estimate import Estimate, Option
from lora_accel.planning.memory import PARTS


def estimate_tables(estimate: Estimate) -> list[str]:
    """Return the tables of an estimate, and notes on what it assumes and what in it is unknown."""
    tables = [_parameters(estimate), _parts(estimate), _layouts(estimate), *_device_notes(estimate)]
    if estimate.computed_share < 1:
        share = estimate.computed_share
        tables.append(f"shared prefixes: {share:.0%} of the tokens are computed, a factor of {1 / share:.2f}")
    if estimate.untraced:
        tables.append(
            f"note: activations and temporaries are unknown: {estimate.untraced}. lora-accel plan --measure runs them"
        )
    return tables


def format_bytes(count: int) -> str:
    """Return a size in GB, or in MB below a tenth of a GB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _parameters(estimate: Estimate) -> str:
    counts = estimate.parameters
    total, trained = (sum(x.numel for x in counts if x.is_trained or not only) for only in (False, True))
    rows = [
        (count.kind, f"{count.num_tensors:,}", f"{count.numel:,}", "yes" if count.is_trained else "")
        for count in counts
    ]
    title = f"parameters: {total:,}, {trained:,} of them trained ({trained / total:.3%})"
    return format_table(title, rows, headers=("kind", "tensors", "parameters", "trained"))


def _parts(estimate: Estimate) -> str:
    """Return the parts of the memory of one device, without ZeRO, for each way to store the base."""
    plain = [option for option in estimate.options if not option.layout.zero_stage]
    last = plain[-1].layout
    options = [option for option in plain if option.layout == last]
    rows = [(part, *(format_bytes(option.memory.parts[part]) for option in options if option.memory)) for part in PARTS]
    rows.append(("total", *(format_bytes(option.memory.total) for option in options if option.memory)))
    framework = format_bytes(estimate.available.framework)
    rows.append(("libraries", *(framework for _ in options)))
    num_sharing = last.num_ranks if estimate.available.kind == "cpu" else 1
    totals = [estimate.needed_bytes(option) // num_sharing for option in options if option.memory]
    rows.append(("process", *map(format_bytes, totals)))
    num_rows, width = estimate.micro_batch
    title = f"memory per device ({last.name}), for a micro-batch of {num_rows} x {width:,} tokens"
    title += ", activations recomputed" if estimate.recomputes else ""
    return format_table(title, rows, headers=("part", *(_bits(option) for option in options)))


def _layouts(estimate: Estimate) -> str:
    """Return the total of each layout, and whether it fits."""
    variants = list(dict.fromkeys(_bits(option) for option in estimate.options))
    names = list(dict.fromkeys(option.layout.name for option in estimate.options))
    rows = []
    for name in names:
        options = {_bits(option): option for option in estimate.options if option.layout.name == name}
        cells = [_cell(estimate, options[bits]) for bits in variants]
        host = max((option.memory.host for option in options.values() if option.memory), default=0)
        rows.append((name, *cells, format_bytes(host) if host else ""))
    free = f"{format_bytes(estimate.available.bytes)} free on {estimate.available.kind}"
    headers = ("layout", *(f"{bits}, fits" for bits in variants), "CPU memory")
    return format_table(f"memory per device by layout ({free})", rows, headers=headers)


def _device_notes(estimate: Estimate) -> list[str]:
    """Return where the ranks are assumed to run; nothing for a single one."""
    num_ranks, available = max(option.layout.num_ranks for option in estimate.options), estimate.available
    if num_ranks == 1:
        return []
    if available.kind == "cpu":
        return [f"note: fits assumes that all {num_ranks:,} ranks run on this machine and share its memory"]
    note = f"note: fits assumes one device for each of the {num_ranks:,} ranks"
    if num_ranks > available.num_devices:
        note += (
            f", but this machine has {available.num_devices:,} (visible {available.kind} devices): the others must be "
            "on other machines. Ranks that share a device need the memory of each"
        )
    return [note]


def _cell(estimate: Estimate, option: Option) -> str:
    if option.memory is None:
        return "not supported"
    answer = {True: "yes", False: "no", None: "unknown"}[estimate.fits(option)]
    return f"{format_bytes(option.memory.total)}, {answer}"


def _bits(option: Option) -> str:
    return "as loaded" if option.bits is None else f"{option.bits} bits"
