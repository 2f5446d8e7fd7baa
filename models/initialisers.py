"""Random weights from each module's own initialiser, drawn in the constructor's order, one block at a time.

A constructor makes a module's children in order, then initialises the module's own parameters with `reset_parameters`.
The constructor of a Hugging Face model ends with `_init_weights` for each of its modules that has not had it. All of
this is replayed here, in that order and from one seed, so values equal those of plain PyTorch under the same seed,
unless a constructor draws something else (GPT-2's and ViT's do), makes its modules in another order than it registers
them, or changes values by code of its own.

Values are kept in memory for one block at a time, and for what is in no block. `_init_weights` comes later than the
draws, and may leave their values as they are, so a block is then drawn a second time. A tied parameter has the values
that are drawn for it under its first name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.isa.errors import StateError

Give = Callable[[str, Tensor], None]
"""Takes a parameter's value, by the parameter's first name."""


def initialise(model: nn.Module, empty: Mapping[str, Tensor], blocks: Iterable[str], seed: int, give: Give) -> None:
    """Draws the values of all parameters from `seed` and hands them to `give`; buffers are written in place.

    `empty` has the parameters without memory, by their first names; `blocks` are the names of the blocks. The model's
    own parameters are not read, and the global random state is left unchanged. Raises StateError for a module with
    parameters that nothing initialises.
    """
    check_initialisers(model)
    replay = _Replay(model, empty, frozenset(blocks), give)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), replay.without_parameters():
        torch.manual_seed(seed)
        replay.construct(model)
        replay.end()


def check_initialisers(model: nn.Module) -> None:
    """Raises StateError for a module with parameters that nothing initialises."""
    of_models = _of_models(model)
    for path, module in model.named_modules():
        if _initialiser(module) is None and id(module) not in of_models and _own(module):
            raise _unknown(path, module)


class _Replay:
    def __init__(self, model: nn.Module, empty: Mapping[str, Tensor], blocks: frozenset[str], give: Give) -> None:
        self.give = give
        self.of_models = _of_models(model)
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.blocks = {id(module) for path, module in model.named_modules() if path in blocks}
        self.held = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.first: dict[int, tuple[int, str]] = {}
        for module, name, parameter in self.held:
            self.first.setdefault(id(parameter), (id(module), name))
        self.empty = {(id(m), name): empty[self.names[id(p)]] for m, name, p in self.held}
        self.owners = {(id(m), name): p for m, name, p in self.held}
        self.states: dict[int, Tensor] = {}  # of the generator, when a module's construction began
        self.constructed: set[int] = set()
        self.initialised: set[int] = set()

    @contextmanager
    def without_parameters(self) -> Iterator[None]:
        """Within, parameters have no memory, so that nothing writes to the model's own."""
        for module, name, _ in self.held:
            self._take_back(module, name)
        try:
            yield
        finally:
            for module, name, parameter in self.held:
                module._parameters[name] = parameter

    def construct(self, module: nn.Module) -> None:
        """Draws what a module's constructor draws. Blocks are handed over as soon as their values are final."""
        if id(module) in self.constructed:
            return
        self.constructed.add(id(module))
        self.states[id(module)] = torch.get_rng_state()
        for child in module.children():
            self.construct(child)
        self._lend(module)
        _reset(module)
        if isinstance(module, PreTrainedModel):
            self._initialise(module, module)
        elif id(module) in self.of_models:
            self._drop_block(module)
        elif id(module) in self.blocks:
            self._hand_over(module)

    def _initialise(self, module: nn.Module, model: PreTrainedModel) -> None:
        """The end of a Hugging Face model's construction: `_init_weights`, children first."""
        if id(module) in self.initialised:
            return
        self.initialised.add(id(module))
        is_block = id(module) in self.blocks
        if is_block:
            self._construct_again(module)
        for child in module.children():
            self._initialise(child, child if isinstance(child, PreTrainedModel) else model)
        model._init_weights(module)
        if is_block:
            self._hand_over(module)

    def _construct_again(self, module: nn.Module) -> None:
        now = torch.get_rng_state()
        torch.set_rng_state(self.states[id(module)])
        for part in _from_the_leaves_up(module):
            self._lend(part)
            _reset(part)
        torch.set_rng_state(now)

    def _lend(self, module: nn.Module) -> None:
        """Gives memory to a module's own parameters, filled with NaN so that any left uninitialised are noticed."""
        for name in _own(module):
            values = torch.empty_like(self.empty[id(module), name], device="cpu")
            module._parameters[name] = nn.Parameter(values.fill_(torch.nan) if values.is_floating_point() else values,
                                                    requires_grad=False)  # fmt: skip

    def _take_back(self, module: nn.Module, name: str) -> None:
        module._parameters[name] = nn.Parameter(torch.empty_like(self.empty[id(module), name]), requires_grad=False)

    def _drop_block(self, module: nn.Module) -> None:
        """Frees the values drawn for a block that `_init_weights` reaches later."""
        if id(module) in self.blocks:
            for part in module.modules():
                for name in _own(part):
                    self._take_back(part, name)

    def _hand_over(self, module: nn.Module) -> None:
        """Gives away and frees the values of a module; a tied parameter's are those drawn under its first name."""
        for part in module.modules():
            for name in _own(part):
                values = part._parameters[name]
                if values is None or values.is_meta:
                    continue
                if values.is_floating_point() and values.isnan().any():
                    raise _unknown(self.paths[id(part)], part)
                owner = self.owners[id(part), name]
                if self.first[id(owner)] == (id(part), name):
                    self.give(self.names[id(owner)], values.detach())
                self._take_back(part, name)

    def end(self) -> None:
        """Hands over what is in no block. Raises StateError if a block was written to after it was handed over."""
        for module in dict.fromkeys(module for module, _, _ in self.held):
            self._hand_over(module)
        for module, name, _ in self.held:
            written = module._parameters[name]
            if written is not None and written._version:
                raise StateError(
                    f"{self.paths[id(module)]}.{name} is also initialised by a module that contains its block, which "
                    "initialize() does not support; load values with load_state_dict(...)"
                )


def _of_models(model: nn.Module) -> set[int]:
    """Ids of the modules that some Hugging Face model's `_init_weights` reaches."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {id(part) for module in models for part in module.modules()}


def _initialiser(module: nn.Module) -> Callable[[], object] | None:
    """The method with which a module's constructor draws its parameters, or None."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _reset(module: nn.Module) -> None:
    initialiser = _initialiser(module)
    if initialiser is not None:
        initialiser()


def _unknown(path: str, module: nn.Module) -> StateError:
    return StateError(
        f"{path or 'the model'} ({type(module).__name__}) has parameters but no way to initialise them: define a "
        "method reset_parameters(), as torch's own modules do, or load values with load_state_dict(...)"
    )


def _own(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def _from_the_leaves_up(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _from_the_leaves_up(child)
    yield module
