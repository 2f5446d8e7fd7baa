"""The benchmark of updates: a row for every kernel and every way to store states, with the bytes that it moves."""

import pytest
import torch
import update_rates
from geminifx.runtime.kernels.host_updates import TORCH, available_variants


def test_every_kernel_is_measured_in_every_way_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_rates, "SECONDS_EACH", 0.0)
    rows = list(update_rates.on_host(1000, torch.get_num_threads()))
    ways = [(row.kernel, row.moments, row.masters) for row in rows]
    compiled = [variant for variant in available_variants() if variant != TORCH]
    expected = {(variant, *way) for variant in compiled for way in update_rates.WAYS}
    expected |= {(TORCH, "exact", "exact"), (TORCH, "exact", "bf16-stochastic")}
    assert set(ways[2:]) == expected and len(set(ways)) == len(ways) and ways[0][0] == "copy"
    assert all(row.gparams_per_s > 0 for row in rows)
    assert {row.masters: round(row.gbytes_per_s / row.gparams_per_s) for row in rows if row.moments == "bf16"} == {
        "exact": 18, "bf16-stochastic": 14,
    }  # fmt: skip
