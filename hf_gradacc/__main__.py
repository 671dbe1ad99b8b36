"""`python -m hf_gradacc`, which is also how torchrun and accelerate start a recipe."""

from hf_gradacc.cli import main

main()
