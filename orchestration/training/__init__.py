"""The projector job: prepare, loop, report, one run per size."""
