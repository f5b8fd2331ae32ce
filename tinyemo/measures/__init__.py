"""Measures of a classifier with intervals and tests, from arrays: numpy and scipy, no cluster and no storage."""
