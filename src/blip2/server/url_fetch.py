"""Images from allowed hosts: the address is resolved once, looked at, and the one that is connected to.

Redirects are not followed, proxies not used; an address that is not public is refused whatever the
name is that leads to it.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urlsplit

from blip2.server.errors import RequestError, bad

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_CHUNK = 65536
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PROTOCOL = ipaddress.ip_network("192.0.0.0/24")  # parts of it count as global
_CONNECT = 5.0  # seconds


def fetch(url: str, hosts: tuple[str, ...], *, limit: int, timeout: float) -> bytes:
    """The bytes behind an http(s) URL of an allowed host.

    Args:
        hosts: as `--allow-url-hosts` names them, a port among them where it is not 80 or 443.
        limit: bytes.
        timeout: seconds in all.

    Raises:
        RequestError: 4xx with the reason.
    """
    parts, host, port = allowed(url, hosts)
    address = public_address(host, port)
    try:
        return _get(parts, host, port, address, limit, time.monotonic() + timeout)
    except (OSError, http.client.HTTPException, ValueError):
        raise bad(f"image cannot be fetched from {host}", "image", "image_not_fetched") from None


def allowed(url: str, hosts: tuple[str, ...]) -> tuple[SplitResult, str, int]:
    """A URL's parts, host and port.

    Raises:
        RequestError: 400 not a plain http(s) URL; 403 a host that is not allowed.
    """
    refused = bad("image's URL cannot be read: send http(s)://host/path, or a data URL", "image", "invalid_image")
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
        host = (parts.hostname or "").encode("idna").decode("ascii").lower()
    except (ValueError, KeyError):
        raise refused from None
    if not host or "@" in parts.netloc or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise refused
    usual = port == _PORTS[parts.scheme]
    named = {name.lower() for name in hosts}
    if f"{host}:{port}" not in named and not (usual and host in named):
        raise RequestError(
            403,
            f"this server fetches no images from {host}: send the image as a data URL, or start the server with "
            f"--allow-url-hosts {host}"[:400],
            code="host_not_allowed",
            param="image",
        )
    return parts, host, port


def public_address(host: str, port: int) -> str:
    """The address to connect to; every address of the name must be public.

    Raises:
        RequestError: 403 a private, loopback or link-local one is among them; 400 no such host.
    """
    try:
        addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise bad(f"image cannot be fetched from {host}: no such host", "image", "image_not_fetched") from None
    if not addresses or not all(is_public(address) for address in addresses):
        raise RequestError(403, f"{host} is not a public address", code="host_not_allowed", param="image")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, whatever it is wrapped in."""
    try:
        ip: Address = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local or ip.scope_id is not None:
            return False
    elif ip in _PROTOCOL:
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not ip.is_unspecified


def _get(parts: SplitResult, host: str, port: int, address: str, limit: int, deadline: float) -> bytes:
    connection = http.client.HTTPConnection(host, port)
    try:
        sock = socket.create_connection((address, port), timeout=min(_CONNECT, _left(deadline)))
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection.sock = sock
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/jpeg, image/png, image/webp", "User-Agent": "blip2"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise bad(
                f"image cannot be fetched: {host} answered {answer.status} (redirects are not followed)",
                "image",
                "image_not_fetched",
            )
        data = bytearray()
        while True:
            if sock.fileno() >= 0:  # closed with the last bytes
                sock.settimeout(_left(deadline))
            chunk = answer.read1(_CHUNK)
            if not chunk:
                return bytes(data)
            data += chunk
            if len(data) > limit:
                raise RequestError(413, f"image has more than {limit} bytes", code="image_too_large", param="image")
    finally:
        connection.close()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
