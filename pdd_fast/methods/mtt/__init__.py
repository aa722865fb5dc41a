"""Trajectory matching (MTT)."""
