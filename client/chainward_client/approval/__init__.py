"""Runs at a hospital where a person approves each: what waits, what was decided, and on what."""
