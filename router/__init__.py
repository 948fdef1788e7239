"""The router: OpenAI-compatible HTTP edge, dispatch over worker pairs, recovery. No torch, no Ray."""
