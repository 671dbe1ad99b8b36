"""The way into the command line, which Ctrl-C may end before anything is loaded."""

import sys

import pytest

from hf_gradacc import __main__


def test_ctrl_c_while_it_is_being_loaded_is_no_traceback(monkeypatch):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "hf_gradacc.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "hf_gradacc.cli", raising=False)
    monkeypatch.delattr("hf_gradacc.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 130
