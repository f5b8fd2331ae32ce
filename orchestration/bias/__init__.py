"""The bias report of a projector: inputs, parts, files and the review of its findings."""
