"""The weights of merged models: streamed if possible, and compared with base + adapter."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, LoraAccelError
from lora_accel.faults import fault_point
from lora_accel.merging.base import Base, read_base_config
from lora_accel.merging.base_weights import load_base_fp32, open_weights
from lora_accel.merging.job import MergeOptions, PendingMerge
from lora_accel.merging.shards import Weights, shard_layout, write_shards
from lora_accel.merging.streaming import MergedTensors, NotStreamableError, check_lora_biases
from lora_accel.merging.trained_on import check_base_hashes
from lora_accel.merging.verification import Agreement, compare, logits_of, logits_of_folder, token_ids
from lora_accel.model.sizes import load_config
from lora_accel.saving.atomic import sync
from lora_accel.saving.attach import keeps_base_weights, load_adapter

VERIFY_MEMORY_FACTOR = 1.3
"""Memory that verification needs, as a multiple of the model's size in float32."""

T = TypeVar("T")


def write_weights(
    merges: Sequence[PendingMerge],
    base: Base,
    options: MergeOptions,
    pool: ThreadPoolExecutor,
    hashing: Future[dict[str, str]],
) -> list[list[torch.Tensor] | None]:
    """Write the weights and config.json of each model.

    Returns:
        For each model the logits of base + adapter, if the base had to be loaded, or None.
    """
    try:
        if not all(keeps_base_weights(merge.job.adapter) for merge in merges):
            raise NotStreamableError("the adapter's initialization changes the base's weights")
        weights = open_weights(base)
        trusted = base.trust_remote_code
        models = [
            MergedTensors(
                m.job.adapter, weights, read_base_config(base), transform=m.transform, trust_remote_code=trusted
            )
            for m in merges
        ]
    except NotStreamableError:
        return [_merge_loaded(merge, base, options) for merge in merges]
    # While a tensor is computed, threads write and hash the last one, hash the base and sync files, without the GIL.
    with ThreadPoolExecutor(1) as writer, _fewer_torch_threads(2):
        shards = []
        for merge, tensors in zip(merges, models, strict=True):
            tensors.config.save_pretrained(merge.folder)
            layout = shard_layout(list(tensors.groups()), options.max_shard_bytes)
            shards.append(write_shards(merge.folder, layout, tensors.read, writer))
        syncing: list[Future[None]] = []
        for number, written in _round_robin(shards):  # so that a tensor of the base is read once for all merges
            if written is None:
                continue
            fault_point("merge.mid")
            file, sha256 = written
            merges[number].hashes[file] = sha256
            syncing.append(pool.submit(sync, merges[number].folder / file))
            if hashing.done():
                check_base_hashes([merge.job for merge in merges], base, hashing.result(), options)
    for synced in syncing:
        synced.result()
    return [None] * len(merges)


def _round_robin(iterators: Sequence[Iterator[T]]) -> Iterator[tuple[int, T]]:
    """Yield one item of each iterator in turn, with the iterator's index, until all are exhausted."""
    active = dict(enumerate(iterators))
    while active:
        for index, iterator in list(active.items()):
            try:
                item = next(iterator)
            except StopIteration:
                del active[index]
            else:
                yield index, item


@contextlib.contextmanager
def _fewer_torch_threads(number: int) -> Iterator[None]:
    """Reduce torch's threads by a number, for other threads that compute at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - number))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _merge_loaded(merge: PendingMerge, base: Base, options: MergeOptions) -> list[torch.Tensor]:
    """Load the full base, let PEFT merge, and save.

    Returns:
        The logits of base + adapter, which are cheap to compute while both are loaded.
    """
    stored_dtype, stored = base.config.dtype or torch.float32, open_weights(base).specs
    model = load_adapter(load_base_fp32(base, merge.transform), merge.job.adapter, force=options.force)
    check_lora_biases(model, merge.job.adapter)
    reference = logits_of(model, token_ids(merge.tokenizer, model.config.vocab_size))
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # raised by safe_merge if a sum is not finite
        raise ArtifactError(f"{merge.job.source}: {error}") from None
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(stored[name].dtype if name in stored else stored_dtype)
    merged.config.use_cache, merged.config.dtype = True, stored_dtype
    size = {} if options.max_shard_bytes is None else {"max_shard_size": options.max_shard_bytes}
    try:
        merged.save_pretrained(merge.folder, **size)
    except NotImplementedError:  # experts that were fused while they were loaded quantized
        raise ArtifactError(
            f"{base.name}: transformers cannot write this model's weights after loading them quantized; pass --base "
            "with the same model in 16 or 32 bits"
        ) from None
    fault_point("merge.mid")
    return reference


def verify_merge(
    merge: PendingMerge, base: Base, options: MergeOptions, reference: list[torch.Tensor] | None
) -> Agreement | None:
    """Compare the written model with base + adapter.

    Args:
        reference: logits of base + adapter; None = not computed yet. If they are given, the model fits into memory and
            is always compared.

    Returns:
        None if verification is disabled or memory is insufficient.
    """
    specs = Weights(merge.folder).specs.values()
    needed = VERIFY_MEMORY_FACTOR * sum(spec.num_bytes * 4 / spec.dtype.itemsize for spec in specs)
    fits = needed < psutil.virtual_memory().available
    if reference is None and not (fits if options.verify is None else options.verify):
        return None
    config = load_config(ModelSection(name_or_path=str(merge.folder), trust_remote_code=base.trust_remote_code))
    rows = token_ids(merge.tokenizer, config.get_text_config().vocab_size)
    if reference is None:
        model = load_adapter(load_base_fp32(base, merge.transform), merge.job.adapter, force=options.force)
        reference = logits_of(model, rows)
        del model
        gc.collect()
    dtypes = (spec.dtype for spec in specs if spec.dtype.is_floating_point)
    least_precise = min(dtypes, key=lambda dtype: dtype.itemsize)
    agreement = compare(
        reference, logits_of_folder(merge.folder, rows, trust_remote_code=base.trust_remote_code), least_precise
    )
    if not agreement.is_within_limit:
        raise LoraAccelError(
            f"{merge.job.out}: the merged model's logits differ from base + adapter by {agreement.mean_moved:.3g} "
            f"standard deviations on average, above the limit of {agreement.limit:.3g}; nothing was written"
        )
    return agreement
