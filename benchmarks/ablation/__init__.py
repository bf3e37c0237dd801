"""Paired comparison of necks: many small trainings that differ in one thing, several at a time."""
