"""Trains Baton-nano, the small DeepSeek V3.2 model that the repository ships. Nothing here is needed to serve it.

`python -m llm_engine.training` runs everything; `samples` and the skills are plain Python and also feed the evaluation.
"""
