"""Rows that begin alike: found, planned as trees, dealt to ranks, drawn together. Integers only.

Read `prefixes`, `cost` and `plan`; then `kept`, `dealing` and `families`.
"""
