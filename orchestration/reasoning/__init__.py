"""The reasoning model's jobs: stages of training, evaluation, export, explanations."""
