"""Bring a cluster up, keep it at its desired size, take it down: the `baton` command and Baton's use of Ray."""
