"""Operators: one file each, with schema, checks, plain-torch reference and back ends. Nothing else
takes an address.
"""
