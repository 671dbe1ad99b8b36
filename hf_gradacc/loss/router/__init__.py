"""The router loss of a mixture of experts, balanced over the whole update.

Read `balance`, then `terms`.
"""
