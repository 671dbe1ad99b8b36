"""Every key of a recipe, its type, default and meaning.

Read `sections`.
"""
