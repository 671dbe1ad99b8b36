"""What may go wrong in an update, and what undoes it.

Read `rollback`, `out_of_memory`, `non_finite`; then `checkpoints` and `signals`.
"""
