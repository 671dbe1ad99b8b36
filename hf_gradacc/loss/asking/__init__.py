"""What a loss is a mean over: questions put to the model, and what its answers show.

Read `ask`, then `probe`, `questions` and `evidence`.
"""
