"""Settings: from the command line, the environment, the configuration file, in this order.

`config/casfs.toml` describes every key. A key that casfs doesn't know is an
error, not a surprise later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from store.errors import BadInput
from tools.output import parse_duration, parse_size

if TYPE_CHECKING:
    from store.repository import SourceOptions
    from tools.upstream.options import UpstreamOptions


PREFETCH = ("none", "all", "profile")
"""Which inputs a worker may fetch before an action starts."""


LOG_LEVELS = ("debug", "info", "warning", "error")


class Settings(NamedTuple):
    """What a verb may need to know. Sizes in bytes, durations in seconds, None for what isn't set.

    A named tuple and not a dataclass, which with so many fields takes 3 ms to make at each start.
    """

    store: Path
    digest_function: str = "blake3"
    engine: str = "auto"
    checkout_mode: str = "auto"
    gc_high: int | None = None
    gc_low: int | None = None
    gc_grace: int = 3600
    gc_cold: int | None = None
    gc_cold_level: int = 3
    run_keep_warm: int = 900
    run_warm_memory: int | None = None
    source_directories: tuple[Path, ...] = ()
    source_timeout: int = 30
    upstream_url: str | None = None
    upstream_token: Path | None = None
    upstream_tls_ca: Path | None = None
    upstream_tls_certificate: Path | None = None
    upstream_tls_key: Path | None = None
    serve_listen: str = "127.0.0.1:8980"
    serve_http_listen: str | None = None
    serve_http_validate_ac: bool = False
    serve_http_names: tuple[str, ...] = ()
    serve_max_body: int = 16 << 30
    serve_instances: tuple[str, ...] = ()
    serve_processes: int = 1
    serve_read_only: bool = False
    serve_max_size: int | None = None
    serve_grace: int = 60
    serve_tls_certificate: Path | None = None
    serve_tls_key: Path | None = None
    serve_tls_client_ca: Path | None = None
    serve_tokens: Path | None = None
    serve_insecure: bool = False
    serve_write_back: bool = False
    serve_max_message: int = 16 << 20
    serve_max_streams: int = 1000
    serve_max_uploads: int = 64
    serve_idle_timeout: int = 60
    serve_drain_timeout: int = 20
    serve_execute: bool = False
    serve_log_level: str = "info"
    worker_buildgrid: str | None = None
    worker_buildbarn: str | None = None
    worker_name: str | None = None
    worker_http_listen: str | None = None
    worker_insecure: bool = False
    worker_size_class: int = 0
    worker_token: Path | None = None
    worker_tls_ca: Path | None = None
    worker_tls_certificate: Path | None = None
    worker_tls_key: Path | None = None
    worker_jobs: int = 0
    worker_host_root: bool = False
    worker_network: bool = False
    worker_properties: tuple[str, ...] = ()
    worker_timeout: int = 3600
    worker_memory: int = 0
    worker_processes: int = 4096
    worker_scratch: Path | None = None
    worker_engine: str = "auto"
    worker_prefetch: str = "none"
    worker_trace: Path | None = None
    worker_action_log: Path | None = None

    @property
    def local_sources(self) -> SourceOptions:
        """Where missing blobs may come from, but for the upstream."""
        from store.repository import SourceOptions

        return SourceOptions(self.source_directories, self.source_timeout)

    @property
    def sources(self) -> SourceOptions:
        """Where missing blobs may come from. Raises BadInput."""
        upstream = self.upstream
        if upstream is None:
            return self.local_sources
        from tools.upstream.joining import with_upstream

        return with_upstream(self.local_sources, upstream)

    @property
    def upstream(self) -> UpstreamOptions | None:
        """The remote cache to ask, if any. Raises BadInput."""
        if self.upstream_url is None:
            return None
        from tools.upstream.options import UpstreamOptions

        files = (self.upstream_token, self.upstream_tls_ca, self.upstream_tls_certificate, self.upstream_tls_key)
        options = UpstreamOptions(self.upstream_url, *(None if file is None else str(file) for file in files))
        options.check()
        return options

    @property
    def source_labels(self) -> list[str]:
        """What to call the sources in a message."""
        return [*map(str, self.source_directories), *([self.upstream_url] if self.upstream_url else [])]


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


def _number(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise BadInput(f"it is a number from {least} to {most}")
        return value

    return read


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadInput("it is true or false")
    return value


def _path(value: Any) -> Path:
    path = Path(_text(value)).expanduser()
    if not path.is_absolute():
        raise BadInput(f"{path} is not an absolute path")
    return path


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadInput('it is a list of texts, as in ["main"]')
    return tuple(value)


def _directories(value: Any) -> tuple[Path, ...]:
    if not isinstance(value, list):
        raise BadInput('it is a list of directories, as in ["/net/store"]')
    return tuple(map(_path, value))


KEYS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "store": ("store", _text),
    "digest-function": ("digest_function", _one_of("blake3", "sha256")),
    "mount.engine": ("engine", _one_of("auto", "kernel", "passthrough", "fuse", "native")),
    "checkout.mode": ("checkout_mode", _one_of("auto", "reflink", "hardlink", "copy")),
    "gc.high": ("gc_high", _size),
    "gc.low": ("gc_low", _size),
    "gc.grace": ("gc_grace", _duration),
    "gc.cold": ("gc_cold", _duration),
    "gc.cold-level": ("gc_cold_level", _number(1, 22)),
    "run.keep-warm": ("run_keep_warm", _duration),
    "run.warm-memory": ("run_warm_memory", _size),
    "sources.directories": ("source_directories", _directories),
    "sources.timeout": ("source_timeout", _timeout),
    "sources.upstream": ("upstream_url", _text),
    "sources.upstream-token": ("upstream_token", _path),
    "sources.upstream-tls-ca": ("upstream_tls_ca", _path),
    "sources.upstream-tls-certificate": ("upstream_tls_certificate", _path),
    "sources.upstream-tls-key": ("upstream_tls_key", _path),
    "serve.listen": ("serve_listen", _text),
    "serve.http-listen": ("serve_http_listen", _text),
    "serve.http-validate-ac": ("serve_http_validate_ac", _yes_or_no),
    "serve.http-names": ("serve_http_names", _texts),
    "serve.max-body": ("serve_max_body", _size),
    "serve.instances": ("serve_instances", _texts),
    "serve.processes": ("serve_processes", _number(1, 64)),
    "serve.read-only": ("serve_read_only", _yes_or_no),
    "serve.max-size": ("serve_max_size", _size),
    "serve.grace": ("serve_grace", _duration),
    "serve.tls-certificate": ("serve_tls_certificate", _path),
    "serve.tls-key": ("serve_tls_key", _path),
    "serve.tls-client-ca": ("serve_tls_client_ca", _path),
    "serve.tokens": ("serve_tokens", _path),
    "serve.insecure": ("serve_insecure", _yes_or_no),
    "serve.write-back": ("serve_write_back", _yes_or_no),
    "serve.max-message": ("serve_max_message", _size),
    "serve.max-streams": ("serve_max_streams", _number(1, 1_000_000)),
    "serve.max-uploads": ("serve_max_uploads", _number(1, 1_000_000)),
    "serve.idle-timeout": ("serve_idle_timeout", _timeout),
    "serve.drain-timeout": ("serve_drain_timeout", _duration),
    "serve.execute": ("serve_execute", _yes_or_no),
    "serve.log-level": ("serve_log_level", _one_of(*LOG_LEVELS)),
    "worker.buildgrid": ("worker_buildgrid", _text),
    "worker.buildbarn": ("worker_buildbarn", _text),
    "worker.name": ("worker_name", _text),
    "worker.http-listen": ("worker_http_listen", _text),
    "worker.insecure": ("worker_insecure", _yes_or_no),
    "worker.size-class": ("worker_size_class", _number(0, (1 << 32) - 1)),
    "worker.token": ("worker_token", _path),
    "worker.tls-ca": ("worker_tls_ca", _path),
    "worker.tls-certificate": ("worker_tls_certificate", _path),
    "worker.tls-key": ("worker_tls_key", _path),
    "worker.jobs": ("worker_jobs", _number(1, 1024)),
    "worker.host-root": ("worker_host_root", _yes_or_no),
    "worker.network": ("worker_network", _yes_or_no),
    "worker.properties": ("worker_properties", _texts),
    "worker.timeout": ("worker_timeout", _timeout),
    "worker.memory": ("worker_memory", _size),
    "worker.processes": ("worker_processes", _number(1, 1 << 22)),
    "worker.scratch": ("worker_scratch", _path),
    "worker.engine": ("worker_engine", _one_of("auto", "kernel", "passthrough", "native")),
    "worker.prefetch": ("worker_prefetch", _one_of(*PREFETCH)),
    "worker.trace": ("worker_trace", _path),
    "worker.action-log": ("worker_action_log", _path),
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
