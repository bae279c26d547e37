"""Grover search for attention: a differentiable amplification layer, and sparse attention with its errors and costs."""
