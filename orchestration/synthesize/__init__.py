"""Instruct records that teacher models write about photographs; `synthesis.py` reads from top to bottom."""
