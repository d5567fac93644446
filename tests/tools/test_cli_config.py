"""Where settings come from, and how sizes and durations are read and written."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from store.errors import BadInput
from tests.tools.conftest import REPOSITORY, Casfs
from tools.config import KEYS, Settings, load_settings
from tools.exits import Exit
from tools.output import count, format_duration, format_size, parse_duration, parse_size


def test_the_store_comes_from_the_option_the_environment_the_file_the_cache(casfs: Casfs) -> None:
    del casfs.environment["CASFS_STORE"]
    (casfs.directory / "file").write_text("x")

    def chosen(*options: str) -> str:
        casfs.ok(*options, "add", "file")
        return Path(casfs.ok(*options, "stats", "--json").json["store"]).name

    assert chosen() == "casfs"
    assert (casfs.directory / "cache" / "casfs" / "format").exists()
    (casfs.directory / "config" / "casfs").mkdir(parents=True)
    (casfs.directory / "config" / "casfs" / "config.toml").write_text(f'store = "{casfs.directory}/from-file"')
    assert chosen() == "from-file"
    (casfs.directory / "named.toml").write_text(f'store = "{casfs.directory}/from-named-file"')
    casfs.environment["CASFS_CONFIG"] = "named.toml"
    assert chosen() == "from-named-file"
    casfs.environment["CASFS_STORE"] = "from-environment"
    assert chosen() == "from-environment"
    assert chosen("--store", "from-option") == "from-option"
    # After the verb it counts as much as before it.
    assert casfs.ok("stats", "--json", "--store", "from-option").json["store"].endswith("from-option")


def test_the_example_says_every_key_with_its_default() -> None:
    text = (REPOSITORY / "config" / "casfs.toml").read_text()
    groups = ("mount", "run", "checkout", "gc", "sources", "serve", "worker")
    assert tomllib.loads(text) == {group: {} for group in groups}
    everything = tomllib.loads(re.sub(r"(?m)^#(?=[a-z-]+ = )", "", text))
    flat = {f"{group}.{key}" for group, keys in everything.items() if isinstance(keys, dict) for key in keys}
    assert flat | {key for key, value in everything.items() if not isinstance(value, dict)} == set(KEYS)


def test_the_defaults_in_the_example_are_the_defaults(tmp_path: Path) -> None:
    text = (REPOSITORY / "config" / "casfs.toml").read_text()
    # Without those that have no default, or one by the machine: the size of a store is a person's choice.
    chosen = "high|low|cold|directories|upstream[a-z-]*|warm-memory|max-size|http-listen|tls-[a-z-]+|tokens"
    chosen += "|jobs|memory|scratch|trace|action-log|properties|buildgrid|buildbarn|name|token"
    without = re.sub(rf"(?m)^#({chosen}) = .*$", "", text)
    (tmp_path / "all.toml").write_text(re.sub(r"(?m)^#(?=[a-z-]+ = )", "", without))
    environ = {"HOME": str(tmp_path)}
    found = load_settings("store", str(tmp_path / "all.toml"), environ)
    assert found == Settings(Path("store").absolute())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stor = 'x'", "did you mean 'store'?"),
        ("[mount]\nengin = 'auto'", "did you mean 'mount.engine'?"),
        ("[mount]\nengine = 'warp'", "it is one of auto, kernel, passthrough, fuse, native"),
        ("store = 3", "a text in quotes"),
        ("store = ''", "a text in quotes"),
        ("digest-function = 'md5'", "it is one of blake3, sha256"),
        ("[gc]\nhigh = 'much'", "not a size"),
        ("[gc]\nhigh = -1", "a text in quotes"),
        ("[gc]\ngrace = 'soon'", "not a duration"),
        ("gc = 3", "unknown key 'gc'"),
        ("[serve]\ngrpc-transport = 'grpcio'", "unknown key 'serve.grpc-transport'"),
        ("= = =", "not TOML"),
        ("\xff", "not TOML"),
    ],
)
def test_a_wrong_configuration_is_named_with_its_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "casfs.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput) as caught:
        load_settings(None, str(path), {})
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_configuration_that_can_not_be_read_is_named(casfs: Casfs) -> None:
    assert "nosuch" in casfs.fails(Exit.USAGE, "--config", "nosuch", "stats")
    assert "Is a directory" in casfs.fails(Exit.USAGE, "--config", ".", "stats")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("0", 0), ("1024", 1024), ("20GiB", 20 << 30), ("20G", 20 << 30), ("20GB", 20 * 10**9), ("1.5k", 1536)),
        *(("1 MiB", 1 << 20), ("7B", 7), ("7 b", 7)),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1e3", "1.G", "\u0661", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadInput):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90", 90), ("15m", 900), ("1h", 3600), ("2d", 172800), ("1w", 604800)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1.5h", "-1", "1y", "\u0661"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(BadInput):
        parse_duration(text)


def test_numbers_for_people() -> None:
    sizes = (0, 1023, 1024, 1536, 99 << 20, 100 << 20, 5 << 60)
    assert [format_size(size) for size in sizes] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 KiB", "99.0 MiB", "100 MiB", "5.0 EiB")
    ]
    assert [format_duration(seconds) for seconds in (0.25, 59, 61, 3600, 90061)] == [
        *("0.2 s", "59.0 s", "1 min 1 s", "1 h 0 min", "1 d 1 h")
    ]
    assert [count(number, "directory") for number in (0, 1, 12000)] == [
        *("0 directories", "1 directory", "12,000 directories")
    ]
