"""The arguments of `model.optimizer(...)`, and the training state that they need."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch.optim import SGD, Optimizer

from ..isa.errors import ArgumentError, wrong_argument
from ..isa.formats import OwnFormat
from ..isa.layout import Rule
from ..isa.moments import Masters, Moments
from .hyper_checks import check_group, is_number
from .kinds import ALL, KINDS, name_of


@dataclass(frozen=True)
class Declared:
    """The arguments of `model.optimizer(...)`.

    Fields:
        kind: one of `KINDS`, for all groups that do not name another as their "kind".
        hyper: its keyword arguments.
        max_grad_norm: clip the norm of all gradients to this.
        in_backward: update each chunk as soon as its gradient is complete.
        accumulate: how many backwards make one step.
        moments: how moments are stored: exactly, as bfloat16, or as 8-bit codes.
        masters: whether float32 masters are kept exactly, or rounded stochastically to bfloat16 weights.
        seed: of stochastic rounding.
    """

    kind: type[Optimizer]
    hyper: dict[str, Any]
    max_grad_norm: float | None = None
    in_backward: bool = False
    accumulate: int = 1
    moments: Moments = "exact"
    masters: Masters = "exact"
    seed: int = 0

    def counts(self, kind: type[Optimizer]) -> bool:
        """Whether the number of its steps is part of a parameter's state; stochastic rounding always needs it."""
        return KINDS[kind].counts or self.masters != "exact"

    def kind_of(self, group: Mapping[str, Any]) -> type[Optimizer]:
        """The optimizer of a group. Raises ArgumentError for an unknown one."""
        asked = group.get("kind", self.kind)
        found = next((kind for kind in KINDS if asked in (kind, kind.__name__)), None)
        if found is None:
            raise wrong_argument("the kind of a group", asked, f"one of {ALL}")
        return found

    def defaults_of(self, kind: type[Optimizer]) -> dict[str, Any]:
        """The options of a group that does not set them."""
        return kind([torch.empty(1, 1)], **self._hyper_of(kind)).defaults

    def _hyper_of(self, kind: type[Optimizer]) -> dict[str, Any]:
        return self.hyper if kind is self.kind else {}

    def check(self, dtypes: Iterable[torch.dtype]) -> None:
        """Raises ArgumentError for arguments that are invalid or do not go together."""
        if isinstance(self.kind, Optimizer):
            name = name_of(type(self.kind))
            raise ArgumentError(f"kind: model.optimizer(...) takes the class {name}, not an instance of it")
        if not isinstance(self.kind, type) or self.kind not in KINDS:
            raise wrong_argument(
                "kind",
                self.kind,
                f"one of {ALL}. Any other element-wise optimizer works over model.parameters() instead",
            )
        check_group(replace(self, hyper={}).defaults_of(self.kind) | self.hyper)
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise wrong_argument("accumulate", self.accumulate, "how many backwards make one step, 1 or more")
        if type(self.in_backward) is not bool:
            raise wrong_argument("in_backward", self.in_backward, "True or False")
        norm = self.max_grad_norm
        if norm is not None and not (is_number(norm) and 0 < norm < math.inf):
            raise wrong_argument("max_grad_norm", norm, "a positive number, or None")
        if self.moments not in get_args(Moments):
            raise wrong_argument("moments", self.moments, f"one of {', '.join(map(repr, get_args(Moments)))}")
        if self.masters not in get_args(Masters):
            raise wrong_argument("masters", self.masters, f"one of {', '.join(map(repr, get_args(Masters)))}")
        if type(self.seed) is not int:
            raise wrong_argument("seed", self.seed, "an int")
        if self.in_backward:
            self._check_in_backward(dtypes)

    def check_masters(self, trained: Mapping[str, tuple[torch.dtype, torch.dtype]], *, sharded: bool) -> None:
        """Raises ArgumentError if masters cannot be the weights alone. `trained` maps names of parameters to the
        dtypes of their masters and of their weights; `sharded`: processes hold parts of single parameters."""
        if self.masters == "exact":
            return
        if sharded:
            raise ArgumentError(
                f"masters={self.masters!r} draws random numbers by element index, which is not known where tensors "
                "are sharded over processes; leave it out, or leave tensor= out of parallel="
            )
        if (torch.float32, torch.bfloat16) not in trained.values():
            told = ", ".join(
                f"{name} is {own} and computes in {computing}" for name, (own, computing) in trained.items()
            )
            raise ArgumentError(
                f"masters={self.masters!r} is for float32 masters of weights that compute in bfloat16, but no trained "
                f"parameter has such a master{': ' * bool(told)}{told[:200]}; compile with precision='bf16', or leave "
                "it out"
            )

    def check_whole(self, groups: Any, *, sharded: bool, zero: int) -> None:
        """Raises ArgumentError if parameters that are updated as wholes would be cut: processes hold parts of single
        parameters (`sharded`), or divide their states (`zero` above 0)."""
        kinds = [self.kind, *map(self.kind_of, _dicts(groups))]
        whole = next((kind for kind in kinds if KINDS[kind].rule != "elements"), None)
        if whole is not None and (sharded or zero):
            cut = "tensor= shards" if sharded else f"zero={zero} divides"
            raise ArgumentError(
                f"{name_of(whole)} updates entire parameters, which {cut} over processes; leave that out of "
                "parallel=, or use an element-wise optimizer, such as torch.optim.AdamW"
            )

    def _check_in_backward(self, dtypes: Iterable[torch.dtype]) -> None:
        if self.max_grad_norm is not None:
            raise ArgumentError(
                "in_backward=True updates before the norm of all gradients is known, so max_grad_norm cannot be "
                "applied; leave one of the two out"
            )
        if torch.float16 in dtypes:
            raise ArgumentError(
                "in_backward=True updates before it is known whether a float16 gradient has overflowed; leave it out, "
                "or compile with precision='bf16'"
            )

    def filled(self, groups: Any) -> list[dict[str, Any]]:
        """Parameter groups with all options filled in by the torch.optim classes, and the name of each group's kind if
        any group names one. Raises ArgumentError for what a class does not take."""
        if not any("kind" in group for group in _dicts(groups)):
            return self._filled(self.kind, groups)
        kinds, given = [self.kind_of(group) for group in _dicts(groups)], _dicts(groups)
        found = [
            self._filled(kind, [{key: value for key, value in group.items() if key != "kind"}])[0]
            for kind, group in zip(kinds, given, strict=True)
        ]
        return [group | {"kind": kind.__name__} for kind, group in zip(kinds, found, strict=True)]

    def _filled(self, kind: type[Optimizer], groups: Any) -> list[dict[str, Any]]:
        try:
            made = kind(groups, **self._hyper_of(kind)).param_groups
        except (TypeError, ValueError, KeyError) as error:
            raise ArgumentError(
                f"{name_of(kind)} does not accept these params and options: {error}; expected parameters of the "
                f"model, or groups of them, and options of that class{self._other_kinds(kind)}"
            ) from error
        for group in made:
            check_group(group)
        return made

    @staticmethod
    def _other_kinds(kind: type[Optimizer]) -> str:
        if KINDS[kind].rule != "matrices":
            return ""
        return (
            ". Put parameters that are not matrices in a group of another kind: model.optimizer(torch.optim.Muon, "
            '[{"params": matrices}, {"params": others, "kind": torch.optim.AdamW, "lr": 3e-4}], lr=2e-2)'
        )

    def format(self, groups: list[dict[str, Any]], names: Mapping[int, str]) -> OwnFormat:
        """The state to plan memory for, given the filled parameter groups; `names` are by `id(parameter)`."""
        moments, rules = self.moments_of(groups), self.rules_of(groups, names)
        if self.moments != "exact" and not moments and not any(rule == "matrices" for _, rule in rules):
            told = "keeps factored moments" if rules else "without momentum has no moments to store"
            raise ArgumentError(
                f"moments={self.moments!r}: {name_of(self.kind)} {told}; leave it out"
                f"{'' if rules else ', or give a momentum above 0'}"
            )
        return OwnFormat(moments, self.in_backward, self.accumulate, self.moments, self.masters, rules)

    def moments_of(self, groups: list[dict[str, Any]]) -> int:
        """The number of moments that element-wise updates keep of each element. Raises ArgumentError if groups are of
        several element-wise kinds."""
        kinds = {self.kind_of(group) for group in groups} or {self.kind}
        single = {kind for kind in kinds if KINDS[kind].rule == "elements"}
        if len(single) > 1:
            raise ArgumentError(
                f"the parameter groups use {', '.join(sorted(map(name_of, single)))}, which are all element-wise; "
                "expected only one element-wise optimizer, besides torch.optim.Muon and torch.optim.Adafactor"
            )
        kind = next(iter(single), None)
        if kind is SGD and not any(group.get("momentum") for group in groups if self.kind_of(group) is SGD):
            return 0
        return 0 if kind is None else len(KINDS[kind].moments)

    def rules_of(self, groups: list[dict[str, Any]], names: Mapping[int, str]) -> tuple[tuple[str, Rule], ...]:
        """The names of the parameters that are not updated element by element, and the rule of each."""
        return tuple(
            (names[id(parameter)], KINDS[self.kind_of(group)].rule)
            for group in groups
            for parameter in group["params"]
            if KINDS[self.kind_of(group)].rule != "elements"
        )


def _dicts(groups: Any) -> list[dict[str, Any]]:
    """The groups that are dicts; empty for a plain list of parameters."""
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list | tuple) else []
