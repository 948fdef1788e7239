"""Torch-free nouns that every process shares: configuration, requests, messages, hand-off tickets, errors."""
