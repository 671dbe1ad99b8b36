"""`hf-gradacc plan`: the updates of a recipe, their time and memory, before a weight is loaded.

Read `updates`, then `screen`.
"""
