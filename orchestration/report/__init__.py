"""What a team decides by: the page about a model, and the gates before an alias moves to it."""
