"""Rows that begin alike, computed as trees: each common prefix once.

Read `layout`, `hooks` and `attention`; `kept` is a beginning that serves several micro-batches.
"""
