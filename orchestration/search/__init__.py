"""The search over a recipe with hundreds of trials in few processes."""
