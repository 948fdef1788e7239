"""The decode pool: receives KV caches, admits their sequences once verified, and draws tokens 2 … n.

An aggregated worker, for comparison and for small installations, prefills and decodes in one engine.
"""
