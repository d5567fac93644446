"""The pages: what they show and let nobody do; and that a real browser shows them without a complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from store.digest import Digest
from store.repository import Store
from tests.conftest import Requirements
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, SHA256, HttpClient, Server, connected, running, wait_for
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.requests import write_digest

EVIL = "<img src=x onerror=alert(1)>\"'&.txt"


class Links(HTMLParser):
    """Links by their text, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: dict[str, str] = {}
        self.tags: set[str] = set()
        self.text = ""
        self._href: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "a":
            self._href = dict(attrs)["href"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self._href = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._href is not None:
            self.links[data] = self._href


def look(web: HttpClient, path: str) -> Links:
    answer = web("GET", path)
    assert answer.status == 200, answer
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    page = Links(answer.body.decode())
    assert not page.tags & {"script", "img", "link", "iframe", "form"}
    return page


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a store with a manifest, a lease, a result of each kind."""
    casfs = Casfs(tmp_path_factory.mktemp("stocked"))
    tree = casfs.directory / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / EVIL).write_text("<b>evil</b> contents\n")
    (tree / "deep" / "binary").write_bytes(bytes(range(256)))
    (tree / "deep" / "empty").write_bytes(b"")
    (tree / "deep" / "long.txt").write_bytes(b"a line\n" * 100_000)
    (tree / "link").symlink_to("deep/<i>")
    casfs.ok("manifest", "create", "sources", tree)
    with Store.open(casfs.store) as store:
        root = store.manifests.get("sources").root
        with store.leases.acquire("mount", [root], "/mnt/<u>somewhere"), running(casfs, *HTTP) as server:
            with connected(server) as client, HttpClient(server) as web:
                [digest] = client.add(b"an output")
                outputs = [reapi.OutputFile(path="out/<s>.o", digest=write_digest(digest))]
                client.put_result(SHA256.of(b"action"), reapi.ActionResult(output_files=outputs), "main/<x>")
                assert web("PUT", f"/ac/{'c3' * 32}", b"opaque").status == 200
            yield server


def test_from_the_overview_into_a_tree_and_a_blob(stocked: Server) -> None:
    with HttpClient(stocked) as web:
        top = look(web, "/")
        assert "/mnt/<u>somewhere" in top.text
        tree = look(web, top.links["sources"])
        assert "link to deep/<i>" in tree.text
        evil = look(web, tree.links[EVIL])
        assert "<b>evil</b> contents" in evil.text
        assert web("GET", evil.links["Download"]).body == b"<b>evil</b> contents\n"
        deep = look(web, tree.links["deep/"])
        dumped = look(web, deep.links["binary"])
        assert "00000010  10 11 12" in dumped.text
        assert "It has no bytes" in look(web, deep.links["empty"]).text
        long = look(web, deep.links["long.txt"])
        assert "As text, the beginning" in long.text
        assert len(long.text) < 80_000
        message = look(web, tree.links["Its Directory message"])
        assert look(web, message.links["Look at it as a tree"]).links == tree.links
        assert "Look at it as a tree" not in dumped.links


def test_results_are_shown_with_their_outputs(stocked: Server) -> None:
    with HttpClient(stocked) as web:
        top = look(web, "/")
        assert "main/<x>" in top.text
        result = look(web, top.links[SHA256.of(b"action").hex[:16] + "…"])
        assert "an output" in look(web, result.links["out/<s>.o"]).text
        opaque = top.links["c3" * 8 + "…"]
        assert web("GET", opaque).body == b"opaque"


def test_an_input_root_that_was_only_uploaded_is_shown(stocked: Server) -> None:
    message = reapi.Directory(files=[reapi.FileNode(name="a.c", digest=write_digest(SHA256.of(b"int a;\n")))])
    with connected(stocked) as client, HttpClient(stocked) as web:
        [root] = client.add(message.SerializeToString())
        page = look(web, f"/tree/sha256/{root.hex}/{root.size}")
        assert "a.c" in page.links
        assert web("GET", page.links["a.c"]).status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/blob/sha256/../../../../etc/passwd",
        "/blob/md5/" + "00" * 32 + "/1",
        "/blob/sha256/" + "00" * 32 + "/x",
        "/tree/sha256/" + "00" * 31 + "/1",
        "/blob/sha256/" + "%2e" * 32 + "/1",
        "/result/sha256/" + "00" * 32 + "/-1",
    ],
)
def test_nothing_but_a_digest_is_looked_for(stocked: Server, path: str) -> None:
    with HttpClient(stocked) as web:
        answer = web("GET", path)
        assert answer.status in (400, 404)
        assert answer.headers["Content-Type"].startswith("text/plain")


def test_what_is_no_tree_is_400_and_what_is_gone_404(stocked: Server) -> None:
    digest = Digest(SHA256, b"\0" * 32, 12)
    with connected(stocked) as client, HttpClient(stocked) as web:
        [text] = client.add(b"this is no Directory message")
        assert web("GET", f"/tree/sha256/{text.hex}/{text.size}").status == 400
        for kind in ("tree", "blob", "result"):
            assert web("GET", f"/{kind}/sha256/{digest.hex}/{digest.size}").status == 404


# Pages of others, whose host's name was made to lead here


def test_a_loopback_server_answers_to_no_name_but_its_own(casfs: Casfs) -> None:
    with running(casfs, *HTTP) as server, HttpClient(server) as web:
        path = web.put_blob(b"not for everybody")
        port = server.http_address.rpartition(":")[2]
        evil = f"evil.example:{port}"
        for page in ("/", "/metrics", path, f"/ac/{'00' * 32}", "/nowhere"):
            assert web("GET", page, Host=evil).status == 421
        refused = web("PUT", f"/ac/{'00' * 32}", b"poison", Host=evil)
        assert (refused.status, b"--http-name" in refused.body) == (421, True)
        assert web("DELETE", f"/ac/{'00' * 32}", Host=evil).status == 421
        assert web("GET", "/healthz", Host=evil).status == 200
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]"):
            assert web("GET", path, Host=host).status == 200


def test_names_are_configured_and_who_serves_others_needs_none(casfs: Casfs) -> None:
    with running(casfs, *HTTP, "--http-name", "Cache.Example") as server, HttpClient(server) as web:
        assert web("GET", "/", Host="cache.example:80").status == 200
        assert web("GET", "/", Host="evil.example").status == 421
    everywhere = ("--http-listen", "0.0.0.0:0", "--insecure")
    with running(casfs, *everywhere) as server, HttpClient(server) as web:
        assert web("GET", "/", Host="whatever.example").status == 200
    with running(casfs, *everywhere, "--http-name", "cache.example") as server, HttpClient(server) as web:
        assert web("GET", "/", Host="whatever.example").status == 421


@pytest.mark.long
def test_a_browser_that_was_led_here_by_dns_gets_nothing(
    stocked: Server, tmp_path: Path, requires: Requirements
) -> None:
    requires.programs("chromium", "chromedriver")
    browser = Browser(tmp_path / "profile", "--host-resolver-rules=MAP evil.example 127.0.0.1")
    port = stocked.http_address.rpartition(":")[2]
    try:
        browser.open(f"http://evil.example:{port}/")
        assert browser.run("return document.body.innerText").startswith("this server isn't called 'evil.example")
        browser.open(f"http://localhost:{port}/")
        assert browser.run("return document.title") == "casfs"
    finally:
        browser.close()
        shutil.rmtree(tmp_path / "profile", ignore_errors=True)


# A real browser


class Browser:
    """Headless Chromium, driven through WebDriver."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._driver.stdout is not None
        port = next(match[1] for line in self._driver.stdout if (match := re.search(r"on port (\d+)\.", line)))
        self._url = f"http://127.0.0.1:{port}/session"
        arguments = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={directory}"),
            *options,
        ]
        capabilities = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._send("", {"capabilities": {"alwaysMatch": capabilities}})
        self._url += f"/{session['sessionId']}"

    def _send(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, url: str) -> None:
        self._send("/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._send("/execute/sync", {"script": script, "args": []})

    def click(self, text: str) -> None:
        found = self._send("/element", {"using": "link text", "value": text})
        self._send(f"/element/{next(iter(found.values()))}/click", {})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self._send("/se/log", {"type": "browser"})]

    def close(self) -> None:
        try:
            self._send("", method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.communicate(timeout=20)


@pytest.mark.long
@pytest.mark.parametrize(("width", "scheme"), [(1200, 1), (400, 0)])
def test_a_browser_shows_it(stocked: Server, tmp_path: Path, requires: Requirements, width: int, scheme: int) -> None:
    requires.programs("chromium", "chromedriver")
    options = (f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}")
    browser = Browser(tmp_path / "profile", *options)
    try:
        browser.open(f"http://{stocked.http_address}/")
        assert browser.run("return document.title") == "casfs"
        # The stylesheet was let through, and fits the scheme; nothing is wider than the window.
        back = "return getComputedStyle(document.body).backgroundColor"
        assert browser.run(back) == ("rgb(22, 24, 26)" if scheme == 0 else "rgb(251, 251, 249)")
        fits = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        plot = "const r = document.querySelector('svg').getBoundingClientRect(); return r.width > 200 && r.height > 40"
        assert browser.run(plot)

        with HttpClient(stocked) as web:
            assert web("GET", f"/ac/{'c3' * 32}").status == 200  # a hit to be shown

        def columns() -> Any:
            browser.open(f"http://{stocked.http_address}/")
            return browser.run("return document.querySelectorAll('svg rect.hit').length")

        wait_for(columns, 30)
        for link in ("sources", EVIL, "casfs", "sources", "deep/", "binary", "casfs"):
            assert browser.run(fits), browser.run("return location.href")
            browser.click(link)
        assert browser.run("return document.querySelectorAll('script').length") == 0
        assert browser.complaints() == []
    finally:
        browser.close()
        shutil.rmtree(tmp_path / "profile", ignore_errors=True)
