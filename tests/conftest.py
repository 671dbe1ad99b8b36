"""What every test needs: no hub, one thread, no W&B account."""

import gc
import os
import signal
import sys

# A shell's background job ignores SIGINT, and so would the runs in it that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before transformers is imported: each look-up of a hub that is not there would wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if not os.environ["CUDA_VISIBLE_DEVICES"]:  # else DeepSpeed tells that it found none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# For the processes that tests start, whatever the shell says and however many cores there are:
# other numbers of threads sum in another order, and threads that wait for a core spin.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import hypothesis
import pytest
import torch
import transformers

torch.set_num_threads(1)
# Other work on the machine makes any example slow.
hypothesis.settings.register_profile("without a clock", deadline=None)
hypothesis.settings.load_profile("without a clock")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.hookimpl(tryfirst=True)  # before pytest itself selects by mark
def pytest_collection_modifyitems(config, items):
    """Leave out thorough tests unless they are asked for; begin with the files of slow ones.

    A slow file that came last would leave a core idle.
    """
    from support.thorough import is_thorough

    thorough = [item for item in items if is_thorough(item.nodeid)]
    for item in thorough:
        item.add_marker("thorough")
    if not config.option.markexpr and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=thorough)
        left = set(thorough)
        items[:] = [item for item in items if item not in left]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _modules_are_not_searched():
    """Let garbage collection leave out what imports have made.

    Every run of a trainer ends with one. Over all that torch and Transformers are made of it takes
    longer than the training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    """Keep tests from finding a developer's W&B key, and W&B's files out of the checkout."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    if "wandb" in sys.modules:  # it keeps the first test's settings, such as its folder, for all
        from support.tracked import end_wandb_run

        end_wandb_run()


@pytest.fixture
def in_float64():
    """Run a test without the float32 of norms and softmaxes.

    They sum a row in an order that hangs on the processor and on the width it is padded to.
    """
    from support.reference import float64_everywhere

    with float64_everywhere():
        yield
