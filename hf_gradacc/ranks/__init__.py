"""How ranks work together: the only calls of `torch.distributed`.

Read `engine`, then `collectives`.
"""
