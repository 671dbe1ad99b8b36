"""Recipe files as written: YAML with bases, overrides and variables; what is wrong, by line.

Read `source`.
"""
