"""What is wrong with a recipe, found before anything is loaded.

Read `checks`, `values`, `together`.
"""
