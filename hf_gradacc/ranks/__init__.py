"""What ranks tell each other: the only calls of `torch.distributed`.

Read `engine`, then `collectives`.
"""
