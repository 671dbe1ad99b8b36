"""Hold the accumulated gradient of your own model and rows against the whole batch's.

Read `parity`, then `gradients`; `preflight` runs the longest rows once.
"""

import typing

from hf_gradacc._exports import load_when_asked

if typing.TYPE_CHECKING:
    from hf_gradacc.verify.parity import verify_parity
    from hf_gradacc.verify.result import ParityReport

__all__ = ["ParityReport", "verify_parity"]

_MODULES = {
    "parity": ("verify_parity",),
    "result": ("ParityReport",),
}

if not typing.TYPE_CHECKING:  # a type checker that saw this would take any name for exported
    __getattr__, __dir__ = load_when_asked(__name__, _MODULES)
