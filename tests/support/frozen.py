"""To import: from then on garbage collection leaves out what has been imported so far.

The fork server imports it last. Every run of a trainer ends with a garbage collection. In a rank
that would search, and by that copy, all of torch and Transformers, which takes longer than the
training.
"""

import gc

__all__: list[str] = []

gc.collect()
gc.freeze()
