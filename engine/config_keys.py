"""Values of a model's configuration by their keys, each checked: errors name the key, its value and what fits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

REQUIRED = object()


def integer(config: Mapping[str, Any], key: str, default: Any = REQUIRED, minimum: int = 1) -> int:
    value = config.get(key)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"{key}: missing; expected an integer")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{key}: {value!r}; expected an integer of at least {minimum}")
    return value


def number(config: Mapping[str, Any], key: str, default: Any = REQUIRED) -> float:
    value = config.get(key)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"{key}: missing; expected a positive number")
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key}: {value!r}; expected a positive number")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key}: {value!r}; expected true or false")
    return value


def divide(number: int, by: int, name: str, by_name: str) -> int:
    if number % by:
        raise ValueError(f"{name}: {number} is not divisible by {by_name} ({by}), and no head size is given")
    return number // by


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One id, a list of them, or none."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(integer({key: i}, key, minimum=0) for i in ids)


def unique(*groups: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for group in groups for i in group))
