"""Settings: from the command line, the environment, the configuration file, in this order.

`config/casfs.toml` describes every key. A key that casfs doesn't know is an
error, not a surprise later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store.errors import BadInput
from tools.output import parse_duration, parse_size

if TYPE_CHECKING:
    from store.repository import SourceOptions


@dataclass(frozen=True, slots=True)
class Settings:
    """What a verb may need to know. Sizes in bytes, durations in seconds, None for what isn't set."""

    store: Path
    digest_function: str = "blake3"
    engine: str = "auto"
    checkout_mode: str = "auto"
    gc_high: int | None = None
    gc_low: int | None = None
    gc_grace: int = 3600
    gc_cold: int | None = None
    gc_cold_level: int = 3
    source_directories: tuple[Path, ...] = ()
    source_timeout: int = 30

    @property
    def sources(self) -> SourceOptions:
        """Where missing blobs may come from."""
        from store.repository import SourceOptions

        return SourceOptions(self.source_directories, self.source_timeout)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BadInput("it is a text in quotes")
    return value


def _one_of(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise BadInput(f"it is one of {', '.join(choices)}")
        return str(value)

    return read


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return parse_size(_text(value))


def _duration(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return parse_duration(_text(value))


def _timeout(value: Any) -> int:
    seconds = _duration(value)
    if not seconds:
        raise BadInput("it is at least 1s")
    return seconds


def _level(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 22:
        raise BadInput("it is a number from 1 to 22")
    return value


def _directories(value: Any) -> tuple[Path, ...]:
    if not isinstance(value, list):
        raise BadInput('it is a list of directories, as in ["/net/store"]')
    paths = tuple(Path(_text(item)).expanduser() for item in value)
    for path in paths:
        if not path.is_absolute():
            raise BadInput(f"{path} is not an absolute path")
    return paths


KEYS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "store": ("store", _text),
    "digest-function": ("digest_function", _one_of("blake3", "sha256")),
    "mount.engine": ("engine", _one_of("auto", "passthrough", "fuse", "native")),
    "checkout.mode": ("checkout_mode", _one_of("auto", "reflink", "hardlink", "copy")),
    "gc.high": ("gc_high", _size),
    "gc.low": ("gc_low", _size),
    "gc.grace": ("gc_grace", _duration),
    "gc.cold": ("gc_cold", _duration),
    "gc.cold-level": ("gc_cold_level", _level),
    "sources.directories": ("source_directories", _directories),
    "sources.timeout": ("source_timeout", _timeout),
}
"""Each key of the file: the setting it stands for, and how its value is read."""


def load_settings(
    store: str | None = None, config: str | None = None, environ: Mapping[str, str] = os.environ
) -> Settings:
    """The settings, given what the command line said. Raises BadInput naming file and key."""
    if store == "" or config == "":
        # An unset variable in a script: going on with the default would be a surprise.
        raise BadInput(f"{'--store' if store == '' else '--config'} is empty: name a path, or leave the option out")
    values = _read_file(config, environ)
    chosen = store or environ.get("CASFS_STORE") or values.pop("store", None)
    values.pop("store", None)
    if chosen is None:
        from platformdirs import user_cache_path

        path = user_cache_path("casfs")
    else:
        path = Path(chosen).expanduser()
    return Settings(path.absolute(), **values)


def _read_file(config: str | None, environ: Mapping[str, str]) -> dict[str, Any]:
    named = config or environ.get("CASFS_CONFIG")
    if named:
        path = Path(named).expanduser()
    else:
        from platformdirs import user_config_path

        path = user_config_path("casfs") / "config.toml"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if named:
            raise BadInput(f"there is no configuration {path}") from None
        return {}
    except OSError as error:
        raise BadInput(f"can't read the configuration {path}: {error.strerror}") from error
    return _parse(text, path)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    import tomllib

    try:
        document = tomllib.loads(text.decode())
    except ValueError as error:
        raise BadInput(f"{path}: not TOML: {error}") from error
    values = {}
    for key, value in _flatten(document):
        if key not in KEYS:
            raise BadInput(f"{path}: unknown key {key!r}{_suggest(key)}")
        name, read = KEYS[key]
        try:
            values[name] = read(value)
        except BadInput as error:
            raise BadInput(f"{path}: {key} = {value!r}: {error}") from error
    return values


def _flatten(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    groups = {key.partition(".")[0] for key in KEYS if "." in key}
    for key, value in document.items():
        if isinstance(value, dict) and key in groups:
            yield from ((f"{key}.{below}", inner) for below, inner in value.items())
        else:
            yield key, value


def _suggest(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, KEYS, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(KEYS)}"
