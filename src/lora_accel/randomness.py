"""Random numbers as pure functions of a key, so no generator state has to be saved.

A resumed run gets the same numbers as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.intp]


def derive_seed(seed: int, *key: int) -> int:
    """Return a 64-bit seed for a key, such as (step, position in the step).

    SplitMix64, once per number: Steele, Lea & Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    mask = 2**64 - 1
    state = seed
    for number in key:
        z = (state + (number + 1) * 0x9E3779B97F4A7C15) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        state = z ^ z >> 31
    return state


def permutation(count: int, *key: int) -> Order:
    """Return the permutation of range(count) for a key, [count].

    Sorts raw Philox output, which numpy guarantees never to change.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def token_keys(key: int, input_ids: Sequence[int]) -> npt.NDArray[np.int32]:
    """Return an odd int32 key for each token, a hash of `key` and of the tokens up to and including it, [T].

    The keys of dropout (model/dropout.py). Equal beginnings have equal keys, wherever they are computed.
    """
    hashes = prefix_hashes(key, input_ids) >> np.uint64(32)
    keys: npt.NDArray[np.int32] = hashes.astype(np.uint32).view(np.int32)
    keys |= 1
    return keys


def prefix_hashes(key: int, input_ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return a hash of `key` and of the tokens up to and including each one, [T].

    The sum of hashed tokens times powers of an odd number is a polynomial hash; SplitMix64 mixes it.
    """
    tokens = _mix(np.asarray(input_ids, dtype=np.uint64) + np.uint64(1))
    powers = np.cumprod(np.full(len(tokens), _ODD, dtype=np.uint64))
    return _mix(np.cumsum(tokens * powers, dtype=np.uint64) + np.uint64(key))


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ z >> np.uint64(31)
    return mixed
