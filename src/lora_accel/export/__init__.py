"""Adapters in formats of other tools."""
