"""The order of samples as a pure function, and Ray Data executing it."""
