"""Losses that compare rows with each other: where they begin, and the same loss in two passes.

Read `replay`, then `joint`.
"""
