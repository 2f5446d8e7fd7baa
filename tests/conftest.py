"""What every test stands on: one thread, and the arena in RAM for a device, unless the test says that it is of CUDA.

Tests run on a CPU, also where there is a GPU: torch sees none, and processes that they start see none. Those marked
`cuda` are of the GPU; without one they are skipped. All of them run in one worker, for they measure a GPU's memory.
Others run in one worker file by file, for tests of a file share what they captured or launched.

The number of threads is fixed, as kernels' sums depend on it, and several workers have one machine.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lasting_imports

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it, and for processes that are started

import hypothesis
import pytest
import torch
from geminifx.runtime.isa.torch_private import dispatch_modes, leave_mode
from geminifx.runtime.kernels import device_updates
from geminifx.runtime.memory import hardware
from late_copies import BY_NAME, LateCopies, Launches
from shared_captures import shared_captures

_VISIBLE = os.environ.setdefault("TESTS_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
"""What was visible when the tests were started: their workers inherit an environment without a GPU."""

if _VISIBLE == "all":
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = _VISIBLE
_IS_AVAILABLE = torch.cuda.is_available
HAS_CUDA = torch.cuda.is_available()
"""Asked before the environment changes: the driver reads that once, when it is first asked."""
os.environ["TESTS_GPUS"] = str(torch.cuda.device_count())

# No clock decides: neither how long an example takes, nor how long it takes to draw one.
_NO_CLOCK = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("tests", **_NO_CLOCK, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("tests")


def _see_cuda(seen: bool) -> None:
    """Show or hide the GPU, to torch and to whoever has asked it before."""
    torch.cuda.is_available = _IS_AVAILABLE if seen else lambda: False
    if seen and _VISIBLE == "all":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = _VISIBLE if seen else ""
    device_updates._compiles.cache_clear()


_see_cuda(False)


@contextmanager
def _on_cuda() -> Iterator[None]:
    _see_cuda(True)
    try:
        yield
    finally:
        torch.cuda.device_count()  # which torch keeps from here on, and would count anew in the other environment
        _see_cuda(False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """No fixture: those of modules and of the session are set up before a test's own."""
    if HAS_CUDA and item.get_closest_marker("cuda"):
        with _on_cuda():
            return (yield)
    return (yield)


def _of_torch() -> dict[str, object]:
    """What torch keeps for the thread or the process, and any test could leave changed for those behind it."""
    return {
        "dispatch modes": dispatch_modes(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "oneDNN": torch._C._get_mkldnn_enabled(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def same_torch() -> Iterator[None]:
    """Each test leaves torch as it was: the one that does not fails, and not a hundred behind it."""
    before = _of_torch()
    yield
    after = _of_torch()
    while dispatch_modes():
        leave_mode()
    assert after == before


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run campaigns whole, not a twentieth of each")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _is_left_out(item, config)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.xdist_group("cuda"))
            if not HAS_CUDA:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif not item.get_closest_marker("xdist_group") and not item.get_closest_marker("campaign"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    try:
        return (yield)
    finally:
        lasting_imports.end()


def _is_left_out(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether a test is of a campaign that is not run whole, and not of the part that is run then."""
    campaign = item.get_closest_marker("campaign")
    return campaign is not None and campaign.kwargs.get("whole", False) and not config.getoption("--whole")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Of campaigns that were run whole, the rows for campaigns/COUNTS.md. Tests of one file share its cases."""
    cases, failed = dict[str, Counter[str]](), Counter[str]()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            file, _, test = report.nodeid.partition("[")[0].partition("::")
            told = dict(report.user_properties)
            if "cases" in told:
                cases.setdefault(Path(file).stem, Counter())[test] += told["cases"]
                failed[Path(file).stem] += outcome == "failed"
    for campaign in sorted(cases) if config.getoption("--whole") else ():
        parts = f"a case in {failed[campaign]} of 20 parts" if failed[campaign] else "0"
        terminalreporter.write_line(f"| {campaign} | {max(cases[campaign].values()):,} | {parts} |")


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models that are alike are captured once for all tests that use this, but for tests that count captures."""
    with nullcontext() if "captures" in request.fixturenames else shared_captures():
        yield


@pytest.fixture
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The engine that copies between the tiers, by its name in `late_copies.ENGINES`: parametrize it, indirectly."""
    made: list[LateCopies] = []
    launches = Launches()

    def engine(device: torch.device) -> LateCopies:
        made.append(BY_NAME[request.param](launches))
        return made[-1]

    if request.param in BY_NAME:
        monkeypatch.setattr(hardware, "copy_engine", engine)
    yield request.param
    assert [told for one in made for told in one.violations] == []
