"""Ranks share the memory and the cores of their host, whoever has started them."""

from pathlib import Path

import pytest
from launching import ranks_of

SCRIPT = Path(__file__).parent / "hosts.py"


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "told"), [("one", "4000000000 6\n"), ("apart", "8000000000 14\n")])
def test_a_host_is_divided_by_the_ranks_that_meet_on_it(hosts: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # torchrun's; srun and mpirun set none
    assert ranks_of(SCRIPT, hosts) == [(0, told)] * 2
