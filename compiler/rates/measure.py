"""Measures a machine: matmuls, operators, copies and updates, alone and at the same time."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import get_args

import torch
from torch import Tensor
from torch import distributed as dist

from ...runtime.distributed.ranks import Ranks
from ...runtime.isa.layout import verified_view
from ...runtime.isa.moments import Moments, stored_dtype, stored_numel
from ...runtime.isa.torch_private import below_autograd
from ...runtime.kernels.device_updates import DeviceKernel
from ...runtime.kernels.host_updates import HostKernel
from ...runtime.kernels.split_pairs import SplitPair
from ...runtime.kernels.update_rules import AdamHyper, AdamMoments, Gradient
from ...runtime.memory.streams import Arrival, copy_engine, host_buffer
from ...runtime.optimizer.updates import host_threads
from .stopwatch import Load, Run, seconds_behind, seconds_each

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=10)

SMALL_FLOP = 2 * 1024**3
"""Matmuls up to this size take about as long as their launches."""

SMALL_RUNS = 300
"""Runs to time at once: few enough for CUDA's launch queue, and enough to time."""

LOAD_S = 0.02
"""Seconds of work launched at a time to keep the device busy."""

COPIES = 4
"""Copies in each direction that are launched at a time to keep the bus busy."""

EXCHANGES = 20

LOOP_FACTOR = 2.5
"""How much longer operators take their launching thread in programs than in a loop, which finds its objects in the
processor's caches and never changes threads: three times on an H200 machine, by a step of OPT-1.3B x 1 (`geminifx
calibrate`, `benchmarks/trust.py`), less on one where the loop took longer."""


@dataclass(frozen=True)
class Effort:
    """How much to measure, and for how long.

    Fields:
        needed_bytes: device memory that measuring takes.
        sizes: the n of the n x n matmuls to time.
        sustained_s, each_s: seconds to time the largest matmul of each dtype for, and anything else.
        copied_bytes, operator_bytes: bytes per copy, of more than the processor's caches, or copies would not slow
            the host's updates down, and per tensor that an elementwise operator reads or writes.
        host_params, device_params: parameters per update on the host and on the device.
        updates_on_device: whether to measure updates on the device, whose kernel may have to be built first.
    """

    needed_bytes: int
    sizes: tuple[int, ...]
    sustained_s: float
    each_s: float
    copied_bytes: int
    operator_bytes: int
    host_params: int
    device_params: int
    updates_on_device: bool


@dataclass(frozen=True)
class Measurements:
    """What was measured: seconds of one run (`_s`), or bytes or parameters per second (`_per_s`); None if not measured.

    `products_s` has a row per dtype of DTYPES and a column per size of Effort.
    """

    products_s: tuple[tuple[float, ...], ...]
    memory_bytes_per_s: float
    kernel_s: float
    launch_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    both_bytes_per_s: float
    host_params_per_s: float
    host_beside_params_per_s: float
    torch_params_per_s: float
    device_params_per_s: float | None = None
    host_bf16_params_per_s: float | None = None
    host_int8_params_per_s: float | None = None
    device_bf16_params_per_s: float | None = None
    device_int8_params_per_s: float | None = None
    network_bytes_per_s: float | None = None
    network_latency_s: float | None = None


class Bench:
    """Measures one device, its host, and its exchanges with other processes."""

    def __init__(self, device: torch.device, effort: Effort, ranks: Ranks) -> None:
        self.device, self.effort, self.ranks = device, effort, ranks
        self.engine = copy_engine(device)
        self.random = torch.Generator(device).manual_seed(0)  # leaves the global generator alone
        largest = self._product(torch.bfloat16, max(effort.sizes))
        largest_s = seconds_each(largest, self.wait, effort.each_s)
        self.launched_at_once = max(1, round(LOAD_S / largest_s))
        self.products = Load(lambda: self._launch_products(largest), self.engine)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self) -> Measurements:
        try:
            up, down, both = self._copies()
            host, beside = self._host_updates()
        finally:
            self.products.end()
            self.wait()
        network = self._network() if self.ranks.together else (None, None)
        device = self._device_updates() if self.effort.updates_on_device else {}
        return Measurements(
            products_s=tuple(tuple(self._product_s(dtype, n) for n in self.effort.sizes) for dtype in DTYPES),
            memory_bytes_per_s=self._memory(),
            kernel_s=self._kernel_s(),
            launch_s=self._launch_s(),
            up_bytes_per_s=up,
            down_bytes_per_s=down,
            both_bytes_per_s=both,
            host_params_per_s=host["exact"],
            host_beside_params_per_s=beside,
            host_bf16_params_per_s=host.get("bf16"),
            host_int8_params_per_s=host.get("int8"),
            torch_params_per_s=self._torch_updates(),
            device_params_per_s=device.get("exact"),
            device_bf16_params_per_s=device.get("bf16"),
            device_int8_params_per_s=device.get("int8"),
            network_bytes_per_s=network[0],
            network_latency_s=network[1],
        )

    # -- the device ----------------------------------------------------------------------------------------

    def _launch_products(self, product: Run) -> Arrival:
        for _ in range(self.launched_at_once):
            product()
        return self.engine.mark()

    def _product(self, dtype: torch.dtype, size: int) -> Run:
        """A matmul of random numbers: multiplying zeros takes less power and is faster."""
        shape, on = (size, size), {"generator": self.random, "device": self.device}
        a, b = (torch.randn(shape, dtype=torch.float32, **on).to(dtype) for _ in range(2))
        c = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=c)

    def _product_s(self, dtype: torch.dtype, size: int) -> float:
        product, largest = self._product(dtype, size), max(self.effort.sizes)
        if 2 * size**3 <= SMALL_FLOP:
            return self._behind_products(product)
        return seconds_each(product, self.wait, self.effort.sustained_s if size == largest else self.effort.each_s)

    def _behind_products(self, run: Run) -> float:
        seconds = seconds_behind(self.products.keep, run, SMALL_RUNS, self.device)
        self.products.end()
        return seconds

    def _memory(self) -> float:
        numel = self.effort.operator_bytes // 2
        a, b, c = (torch.ones(numel, dtype=torch.bfloat16, device=self.device) for _ in range(3))
        return 3 * a.nbytes / seconds_each(lambda: torch.add(a, b, out=c), self.wait, self.effort.each_s)

    def _kernel_s(self) -> float:
        return self._behind_products(self._tiny())

    def _launch_s(self) -> float:
        """Seconds to call an operator as programs do, with the views it reads: from a third of a linear layer, a layer
        norm and an addition. The minimum counts: disturbances only make it longer."""
        size = 16  # of which a device's arithmetic takes no time
        chunk = torch.ones(size * size + 3 * size, device=self.device)
        x = torch.ones(1, size, size, device=self.device)

        def run() -> None:
            weight, bias = verified_view(chunk, 0, (size, size)), verified_view(chunk, size * size, (size,))
            h = torch.addmm(bias, x.view(size, size), weight.t()).view(1, size, size)
            scale, shift = (verified_view(chunk, size * size + i * size, (size,)) for i in (1, 2))
            torch.add(torch.native_layer_norm(h, [size], scale, shift, 1e-5)[0], x)

        with torch.no_grad(), below_autograd():
            return LOOP_FACTOR * seconds_each(run, self.wait, self.effort.each_s, choose=min) / 3

    def _tiny(self) -> Run:
        x = torch.ones(64, device=self.device)
        return lambda: torch.ops.aten.add.Tensor(x, x)

    # -- copies, while products run ------------------------------------------------------------------------

    def _copies(self) -> tuple[float, float, float]:
        """Bytes per second up alone, down alone, and in each direction while both and the host's updates run: all three
        share the host's memory, and a step that copies in both directions mostly updates, too."""
        (here, there), done = self._buffers(), self._done()

        def up() -> Arrival:
            return self.engine.to_device(here[0], there[0], done)

        def down() -> Arrival:
            return self.engine.to_host(there[1], here[1], done)

        def measured(*copies: Callable[[], Arrival]) -> float:
            def run() -> None:
                self.products.keep()
                for arrival in [copy() for copy in copies]:
                    self.engine.finish(arrival)

            return self.effort.copied_bytes / seconds_each(run, _nothing, self.effort.each_s)

        alone = measured(up), measured(down)
        with self._updating():
            return *alone, measured(up, down)

    def _buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two buffers on the device and two on the host, one for each direction."""
        count, pinned = self.effort.copied_bytes, self.device.type == "cuda"
        here = [torch.empty(count, dtype=torch.uint8, device=self.device) for _ in range(2)]
        return here, [host_buffer(count, torch.uint8, pinned) for _ in range(2)]

    def _done(self) -> Arrival:
        """An arrival that is already complete: copies that wait for it wait for nothing."""
        mark = self.engine.mark()
        self.engine.finish(mark)
        return mark

    # -- updates -------------------------------------------------------------------------------------------

    def _host_updates(self) -> tuple[dict[Moments, float], float]:
        """Parameters per second of our host kernel: alone for each format of moments that it takes, and with exact ones
        while copies run in both directions."""
        kernel, threads, params = HostKernel(), host_threads(self.ranks.on_this_host), self.effort.host_params

        def run(moments: Moments, before: Run) -> float:
            update = _adam(params, moments, torch.device("cpu"))

            def once() -> None:
                before()
                kernel.adam(*update, HYPER, threads)

            return params / seconds_each(once, _nothing, self.effort.each_s)

        alone = {moments: run(moments, _nothing) for moments in _taken_by(kernel)}
        with self._copying() as keep_copying:
            return alone, run("exact", keep_copying)

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Context in which another thread keeps updating parameters on the host; it raises what that thread raised."""
        kernel, threads, is_over = HostKernel(), host_threads(self.ranks.on_this_host), Event()
        update = _adam(self.effort.host_params, "exact", torch.device("cpu"))

        def keep_updating() -> None:
            while not is_over.is_set():
                kernel.adam(*update, HYPER, threads)

        with ThreadPoolExecutor(1) as pool:
            updating = pool.submit(keep_updating)
            try:
                yield
            finally:
                is_over.set()
            updating.result()

    @contextmanager
    def _copying(self) -> Iterator[Run]:
        """Yields a function that keeps copies running in both directions as long as it is called often enough."""
        here, there = self._buffers()
        done = self._done()

        def launch() -> Arrival:
            for _ in range(COPIES):
                self.engine.to_host(there[1], here[1], done)
                arrival = self.engine.to_device(here[0], there[0], done)
            return arrival

        load = Load(launch, self.engine)
        try:
            yield load.keep
        finally:
            load.end()
            self.wait()  # for the other direction, too: no copy may outlive its buffers

    def _torch_updates(self) -> float:
        count = self.effort.host_params
        weight = torch.nn.Parameter(torch.full((count,), 0.02, dtype=torch.float32, device="cpu"))
        gradient, copy = (torch.full((count,), 1e-3, dtype=torch.bfloat16, device="cpu") for _ in range(2))
        optimizer = torch.optim.AdamW([weight])

        def run() -> None:
            weight.grad = gradient.float()
            optimizer.step()
            copy.copy_(weight.detach())

        return count / seconds_each(run, _nothing, self.effort.each_s)

    def _device_updates(self) -> dict[Moments, float]:
        kernel, params = DeviceKernel(), self.effort.device_params

        def run(moments: Moments) -> float:
            update = _adam(params, moments, self.device)
            return params / seconds_each(lambda: kernel.adam(*update, HYPER), self.wait, self.effort.each_s)

        return {moments: run(moments) for moments in _taken_by(kernel)}

    # -- other processes -----------------------------------------------------------------------------------

    def _network(self) -> tuple[float, float]:
        """Bytes per second that a process receives in an all-gather, and the seconds of an all-reduce of one number.
        All processes must run the same number of exchanges."""
        size, count = self.ranks.size, self.effort.copied_bytes // self.ranks.size
        shard = torch.empty(count, dtype=torch.uint8, device=self.device)
        whole = torch.empty(count * size, dtype=torch.uint8, device=self.device)
        one = torch.zeros(1, device=self.device)
        latency_s = self._exchange_s(lambda: self.ranks.call(dist.all_reduce, one))
        gather_s = self._exchange_s(lambda: self.ranks.call(dist.all_gather_into_tensor, whole, shard))
        return count * (size - 1) / max(gather_s - latency_s, gather_s / 2), latency_s

    def _exchange_s(self, exchange: Run) -> float:
        bursts = iter([1, EXCHANGES])

        def run() -> None:
            for _ in range(next(bursts)):
                exchange()

        return seconds_each(run, self.wait, 0.0) / EXCHANGES


def _nothing() -> None:
    """The `wait` of runs that are done when they return."""


def _taken_by(kernel: HostKernel | DeviceKernel) -> tuple[Moments, ...]:
    """The formats of moments that a kernel takes as they are stored."""
    return get_args(Moments) if kernel.widens else ("exact",)


def _adam(params: int, moments: Moments, device: torch.device) -> tuple[SplitPair, Gradient, AdamMoments]:
    """The tensors that one AdamW update reads and writes."""

    def full(value: float, dtype: torch.dtype, numel: int = params) -> Tensor:
        return torch.full((numel,), value, dtype=dtype, device=device)

    stored = stored_dtype(moments, torch.float32)
    mean, square = (full(0, stored, stored_numel(stored, params)) for _ in range(2))
    pair = SplitPair(full(0.02, torch.bfloat16), full(0, torch.int16))
    return pair, Gradient(full(1e-3, torch.bfloat16)), AdamMoments(mean, square)
