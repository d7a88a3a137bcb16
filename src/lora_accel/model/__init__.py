"""Weights: the frozen base model, whole or quantised, and the adapter on it."""
