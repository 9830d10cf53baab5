"""Correct models in the conventions of the wild, and what they become with one bug each: what the harness is held to.

``bases/`` has one self-contained file a model, as a stranger would write it, without ``diymodel.model``; ``bugs/`` has
the changes, one file a concern.
"""
