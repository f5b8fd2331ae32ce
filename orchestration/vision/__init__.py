"""Encoders over images: features computed once and stored with their provenance."""
