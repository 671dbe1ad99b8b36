"""A trainer's own loss: asked, taken apart into terms, run in two passes where it couples rows.

Read `asking`, then `settle` and `passes`.
"""
