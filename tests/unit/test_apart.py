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
    with pytest.raises(InfrastructureError, match=r"_exit ended early: exit status 3"):
        apart(os._exit, 3)
    with pytest.raises(InfrastructureError, match=r"abort ended early: killed by signal 6"):
        apart(os.abort)


def test_the_working_directory_is_not_imported_from(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    assert apart(math.sqrt, 4.0) == 2
