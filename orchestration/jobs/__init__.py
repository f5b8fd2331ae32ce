"""One job: a recipe becomes a run, stage after stage, under Ray Train."""
