"""Use of trained models: labels and explanations for images, a few or millions."""
