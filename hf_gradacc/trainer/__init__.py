"""The stock Trainer's hooks, and the parts they call. Only this folder touches its internals.

Read `mixin` (every hook, in the order the stock loop calls them), then `runner` and `step`. Rooms:
`loss`, what a trainer's own loss needs; `optimizer`; `checkpoints`.
"""

from hf_gradacc.compat import check_versions

check_versions()
