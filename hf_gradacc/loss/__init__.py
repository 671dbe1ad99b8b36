"""What a loss is a mean over, asked of the model; and cheaper ways to the same loss.

Read `facts`, `probe`, `asking`, then `shortcuts`.
"""
