"""What a loss is a mean over, asked of the model; and cheaper ways to the same loss.

Here are the rules a loss may follow (`facts`, `coupling`, `terms`). Rooms: `asking`, which of them
it is; `coupled` and `router`, losses that rows share; `shortcuts` and `trees`, cheaper ways.
"""
