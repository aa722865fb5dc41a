"""Stages of progressive dataset distillation, for any method."""
