"""The page about a model that a team decides by, and the gates that it passes before an alias moves to it."""
