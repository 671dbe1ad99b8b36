"""Each claim runs against the stock Trainer and ours; every difference is named."""

import pytest
from support.line import KINDS
from support.stock_differences import DIFFERENCES


@pytest.fixture(params=list(KINDS))
def kind(request):
    """The class of trainer that the claim is made of."""
    return KINDS[request.param]


def pytest_collection_modifyitems(items):
    for item in items:
        values = getattr(item, "callspec", None)
        if values is None or values.params.get("kind") != "ours":
            continue
        reason = DIFFERENCES.get(item.originalname)
        if reason is not None:  # strict: a difference that has gone is a fault of the table
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
