"""Generation, evaluation and chat with base models, adapters and merged models."""
