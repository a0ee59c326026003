"""Keys and values of configs: read from YAML, unknown ones refused, each brought to the type of its field."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_LARGEST_FLOAT = (2.0 - 2.0**-23) * 2.0**127  # of float32, in which networks compute


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds, with 1e-5 and the like as numbers: to PyYAML, as to YAML 1.1, they are texts.

    Raises FileNotFoundError, or ValueError for a file that is no YAML.
    """
    import yaml

    try:
        return with_numbers(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a YAML file of keys and values: {error}") from error


def write_yaml(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write keys and values as a YAML file, in their order."""
    import yaml

    Path(path).write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")


def with_numbers(value: Any) -> Any:
    """The value, and all values in it, with texts that are numbers as numbers."""
    if isinstance(value, Mapping):
        return {key: with_numbers(item) for key, item in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], section: str = "") -> None:
    """Raises ValueError for the first key that is not known, and names a near one."""
    names = list(known)
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {section}{near[0]}?" if near else f"known keys: {', '.join(names)}"
            raise ValueError(f"config {section}{key}: unknown key, got {values[key]!r}; {hint}")


def typed(name: str, kind: str, value: Any, *, least: int | None = None) -> Any:
    """The value of a key in the type of its dataclass field, as its annotation names it, or ValueError.

    least  what an integer must be at least
    """
    if kind.endswith(" | None"):
        if value is None:
            return None
        kind = kind.removesuffix(" | None")
    # bool is an int to Python, and `num_layers: yes` in YAML is a bool.
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"config {name}: expected true or false, got {value!r}")
    if kind == "int":
        wanted = "an integer" if least is None else f"an integer >= {least}"
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            raise ValueError(f"config {name}: expected {wanted}, got {value!r}")
        if abs(value) >= 1 << 63:
            raise ValueError(f"config {name}: expected an integer of 64 bits, got {value!r}")
    if kind == "float":
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"config {name}: expected a finite number, got {value!r}")
        if abs(value) > _LARGEST_FLOAT:
            raise ValueError(f"config {name}: expected a number that float32 can hold, got {value!r}")
        # An integer written in YAML must compare equal to, and be saved like, the float it stands for.
        return float(value)
    if kind == "str" and not isinstance(value, str):
        raise ValueError(f"config {name}: expected a text, got {value!r}")
    if kind.startswith("Mapping") and not isinstance(value, Mapping):
        raise ValueError(f"config {name}: expected keys and values, got {value!r}")
    return value
