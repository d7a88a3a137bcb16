"""Convert rows of any supported format to tokenized examples: templates, loss masks, the ledger and the cache."""
