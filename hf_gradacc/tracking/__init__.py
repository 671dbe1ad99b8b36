"""The numbers of a run: what is measured, and the files, terminal, W&B and reports it goes to.

Read `install` first, then `window` (log keys and their formulas) and `run_files`.
"""

import typing

from hf_gradacc._exports import load_when_asked

if typing.TYPE_CHECKING:
    from hf_gradacc.tracking.install import attach_report, record_event
    from hf_gradacc.tracking.parity_file import read_parity, record_parity
    from hf_gradacc.tracking.report import build_report

__all__ = ["attach_report", "build_report", "read_parity", "record_event", "record_parity"]

_MODULES = {
    "install": ("attach_report", "record_event"),
    "parity_file": ("read_parity", "record_parity"),
    "report": ("build_report",),
}

if not typing.TYPE_CHECKING:  # a type checker that saw this would take any name for exported
    __getattr__, __dir__ = load_when_asked(__name__, _MODULES)
