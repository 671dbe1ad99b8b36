"""Rows become updates: membership, shares of ranks, micro-batches. No Trainer, no ranks.

Read `targets`, `sampler`, `dealing`, `planner`, `collator`, `update`, `loader`. The DataLoader's
workers run this folder and nothing else of the package. Rooms: `draws`, what is random for a row;
`trees`, rows that begin alike.
"""
