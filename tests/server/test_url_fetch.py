"""Remote images: which hosts and addresses are refused, and that the looked-at address is the one connected to."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from blip2.server import url_fetch
from blip2.server.errors import RequestError


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.0.8",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "2002:c0a8:101::",
        "2001:db8::1",
        "nonsense",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not url_fetch.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert url_fetch.is_public(address)


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://other.example/a.jpg", 403),
        ("http://127.0.0.1/a.jpg", 403),
        ("http://pictures.example.evil.net/a.jpg", 403),
        ("http://pictures.example:8080/a.jpg", 403),
        ("http://pictures.example@evil.net/a.jpg", 400),
        ("http://evil.net:80@pictures.example/a.jpg", 400),
        ("http://pictures.example\\@evil.net/", 400),
        ("ftp://pictures.example/a.jpg", 400),
        ("file:///etc/passwd", 400),
        ("gopher://pictures.example/", 400),
        ("http:///a.jpg", 400),
        ("http://pictures.example:99999/", 400),
        ("http://[::1/a", 400),
        ("http://pictures.example/a\r\nX: y", 400),
        ("http://pictures.example/a b", 400),
    ],
)
def test_urls_that_are_not_allowed(url: str, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        url_fetch.allowed(url, ("pictures.example",))
    assert caught.value.status == status


def test_allowed_urls() -> None:
    parts = url_fetch.allowed("https://Pictures.Example/a.jpg?x=1", ("pictures.example",))
    assert parts[1:] == ("pictures.example", 443)
    assert url_fetch.allowed("http://pictures.example:81/", ("pictures.example:81",))[1:] == ("pictures.example", 81)


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    resolved: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        resolved.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(url_fetch.socket, "getaddrinfo", getaddrinfo)
    return resolved


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["169.254.169.254"], []])
def test_an_allowed_name_that_leads_inside_is_refused(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    resolving(monkeypatch, *addresses)
    monkeypatch.setattr(url_fetch.socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(RequestError) as caught:
        url_fetch.fetch("http://pictures.example/a.jpg", ("pictures.example",), limit=100, timeout=1)
    assert caught.value.status == 403


class Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = {"/moved": 302, "/none": 404}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1/secret")
        self.end_headers()
        self.wfile.write(b"x" * 500 + self.headers["Host"].encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A server that stands for the public address 8.8.8.8; the addresses that were connected to."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connected: list[Any] = []

    def pinned(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(server.server_address[:2])
        return connection

    monkeypatch.setattr(url_fetch.socket, "create_connection", pinned)
    yield connected
    server.shutdown()
    server.server_close()


def test_the_address_that_was_looked_at_is_connected_to(monkeypatch: pytest.MonkeyPatch, pictures: list[Any]) -> None:
    resolved = resolving(monkeypatch, "8.8.8.8")
    data = url_fetch.fetch("http://pictures.example/a.jpg", ("pictures.example",), limit=1000, timeout=5)
    assert data == b"x" * 500 + b"pictures.example"
    assert pictures == [("8.8.8.8", 80)]
    assert resolved == ["pictures.example"]  # resolved once: no second answer of DNS can lead elsewhere


@pytest.mark.parametrize(("path", "limit", "status"), [("moved", 1000, 400), ("none", 1000, 400), ("a", 100, 413)])
def test_redirects_errors_and_too_many_bytes(
    monkeypatch: pytest.MonkeyPatch, pictures: list[Any], path: str, limit: int, status: int
) -> None:
    resolving(monkeypatch, "8.8.8.8")
    with pytest.raises(RequestError) as caught:
        url_fetch.fetch(f"http://pictures.example/{path}", ("pictures.example",), limit=limit, timeout=5)
    assert caught.value.status == status
    assert len(pictures) == 1
