"""Tests of lora_accel.planning."""
