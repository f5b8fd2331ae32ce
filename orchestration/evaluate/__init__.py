"""Evaluation of projectors: measures with intervals, comparisons, leakage, and the job that writes them down."""
