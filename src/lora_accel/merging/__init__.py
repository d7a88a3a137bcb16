"""Base + adapter -> a plain model folder."""
