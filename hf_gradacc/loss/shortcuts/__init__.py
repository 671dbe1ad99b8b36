"""Cheaper ways to the same loss, and how they are tried on the model before they are taken.

Read `choose` and `trials`; `sharing` decides on trees.
"""
