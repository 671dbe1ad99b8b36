"""Files of other tools become recipes: Axolotl's and LLaMA-Factory's.

`keys` says what becomes of a key, `draft` collects a recipe and what it lacks; `axolotl` and
`llamafactory` hold a table each; `importing` reads a file and writes the recipe.
"""
