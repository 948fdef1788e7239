"""The device side of one worker: batches, caches, weights, sampling and the engine that drives a model."""
