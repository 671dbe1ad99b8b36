"""Checks on a real accelerator, in one command that ends by itself.

    python -m benchmarks.gpu                  on the first CUDA device, under ten minutes
    python -m benchmarks.gpu --device cpu     the same code on tiny sizes: a rehearsal
    python -m benchmarks.gpu --list           what would run
    python -m benchmarks.gpu --only memory    names that begin so

Each group of checks is a process of its own, so an error that poisons a CUDA context, a crash or a
hang costs one check. Every result is on the disk before the next check begins.
"""
