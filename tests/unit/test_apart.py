import math
import os

import pytest
import torch

from diffpress.errors import InfrastructureError
from diffpress.processes import apart


def test_an_answer_comes_from_a_fresh_process():
    assert apart(os.getpid) != os.getpid()
    assert apart(torch.get_num_threads) == torch.get_num_threads()
    assert apart(sorted, [2, 3, 1], reverse=True) == [3, 2, 1]
    assert apart(print, "said aloud, and not taken for an answer") is None


def test_what_went_wrong_there_is_told():
    with pytest.raises(InfrastructureError, match=r"a process for sqrt ended early: ValueError: .+"):
        apart(math.sqrt, -1.0)
