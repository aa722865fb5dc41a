"""Augmentations: DSA, and multi-formation, which stores several images in one."""
