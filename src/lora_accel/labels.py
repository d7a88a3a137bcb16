"""The label of a token that is not supervised, shared by data, batches and losses."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The ignore index of torch's cross-entropy, and of the labels of transformers."""
