"""The engine shared by all workers: model, kernels, caches, scheduling and the types every process speaks."""
