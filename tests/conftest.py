import rorqual  # noqa: F401  before any test imports torch, so that RORQUAL_CPU lowers both
from helpers import shape_checks

shape_checks.install()

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """More threads make models of these sizes no faster, and wait for one another on a busy machine.

    Anew for each test, since what some run sets it for their process.
    """
    torch.set_num_threads(1)
