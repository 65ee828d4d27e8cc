"""Fusion: generation and scoring woven together at sample level, without a change of the algorithm."""
