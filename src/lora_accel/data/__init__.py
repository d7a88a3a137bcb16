"""Text to batches: rows of any known format, templates, masks, the ledger, and the order of examples."""
