"""Modules and parameters per pyramid level, under the levels' names in state dicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn


class LevelModules(nn.Module):
    """A sequence of modules, one per level, each under its level's name.

    A position stands for different strides in pyramids that start at different levels; a name does not.

    Args:
        names: Names of the levels, all different.
        modules: One for each.

    Example:
        >>> convs = LevelModules(["p3", "p4"], [nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1)])
        >>> list(convs.state_dict()), convs[1] is convs.p4, len(convs)
        (['p3.weight', 'p3.bias', 'p4.weight', 'p4.bias'], True, 2)
    """

    def __init__(self, names: Sequence[str], modules: Iterable[nn.Module]) -> None:
        super().__init__()
        for name, module in zip(names, modules, strict=True):
            self.add_module(name, module)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the levels."""
        return tuple(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __getitem__(self, position: int) -> nn.Module:
        return list(self)[position]

    def __setitem__(self, position: int, module: nn.Module) -> None:
        setattr(self, self.names[position], module)


class LevelParameters(nn.Module):
    """A sequence of parameters, one per level, each under its level's name.

    Args:
        names: Names of the levels, all different.
        values: One for each.
    """

    def __init__(self, names: Sequence[str], values: Iterable[Tensor]) -> None:
        super().__init__()
        for name, value in zip(names, values, strict=True):
            self.register_parameter(name, nn.Parameter(value))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the levels."""
        return tuple(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def __getitem__(self, position: int) -> nn.Parameter:
        return list(self)[position]


def positional_keys(model: nn.Module) -> dict[str, str]:
    """Map each key of a state dict to the key with the levels' positions in place of their names.

    Checkpoints of format version 1 and other frameworks have such keys.

    Example:
        >>> positional_keys(nn.Sequential(LevelModules(["p3"], [nn.Linear(2, 2, bias=False)])))
        {'0.p3.weight': '0.0.weight'}
    """
    beginnings = [
        (f"{path}.{name}.", f"{path}.{position}.")
        for path, module in model.named_modules()
        if isinstance(module, (LevelModules, LevelParameters))
        for position, name in enumerate(module.names)
    ]
    keys = {}
    for key in model.state_dict():
        found = next(((named, counted) for named, counted in beginnings if f"{key}.".startswith(named)), None)
        keys[key] = key if found is None else f"{found[1]}{f'{key}.'[len(found[0]) :]}"[:-1]
    return keys
