"""What may go wrong in an update, and how it is undone.

Read `rollback`, `out_of_memory`, `non_finite`; then `checkpoints` and `signals`.
"""
