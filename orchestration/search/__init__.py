"""Hyper-parameter search: hundreds of short trials in few processes, then runs of the winner."""
