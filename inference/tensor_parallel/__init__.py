"""A model of `transformers` cut over several ranks: each computes with its heads and its part of the vocabulary."""
