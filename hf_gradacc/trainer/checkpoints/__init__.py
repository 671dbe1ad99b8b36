"""Checkpoints: written whole or not at all, chosen, and resumed from.

Read `saving`, `position` and `resume`.
"""
