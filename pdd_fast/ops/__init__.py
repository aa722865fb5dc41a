"""Operators: one file each, with schema, checks, plain-torch reference and back ends.

No other package takes a tensor's address.
"""
