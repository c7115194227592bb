"""Code as the official releases are built, written from the specification: official names, signatures, structure.

Imports nothing of this project: it is what `dropin.patch` is tried on.
"""
