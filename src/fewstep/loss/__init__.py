"""Losses: pure functions, tensors in, tensor out."""
