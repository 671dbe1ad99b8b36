"""The model of a recipe: loaded, adapted, and where its answers end.

Read `load`.
"""
