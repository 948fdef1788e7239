"""What runs in pods besides routers and workers: the head, model download, drain before a pod ends, checks."""
