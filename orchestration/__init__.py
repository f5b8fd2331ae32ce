"""The jobs: data, train, tune, evaluate, track and the command line."""
