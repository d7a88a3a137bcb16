"""The frozen base model, quantized or not, and its adapter."""
