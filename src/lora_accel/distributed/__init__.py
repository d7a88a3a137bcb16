"""Processes, backends and launches."""
