"""The prefill pool: computes prompts, draws the first token, and hands the KV cache on while it is still computing."""
