"""What a server allows; nothing heavy is imported here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from blip2.configs.checks import require
from blip2.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    Args:
        host, port: where it listens.
        api_key: required of every request but for the page's own files and `/healthz`; needed off loopback.
        url_hosts: hosts from which image URLs are fetched; none by default.
        queue: requests that may wait for the model.
        timeout: seconds that a request may take, waiting included.
        max_batch: requests that go through the model together.
        max_body: bytes of a request.
        max_pixels: of an image, before any is decoded.
        max_images: of one question, the frames of films included; 1 takes no films either.
        max_tokens: longest text that a request may ask for.

    Raises:
        ConfigError: a value that cannot be used, or a host off loopback without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    url_hosts: tuple[str, ...] = ()
    queue: int = 64
    timeout: float = 60.0
    max_batch: int = 16
    max_body: int = 24 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 16
    max_tokens: int = 128

    def __post_init__(self) -> None:
        require(self.queue >= 1, "--queue", self.queue, "1 or more")
        require(self.max_batch >= 1, "--max-batch", self.max_batch, "1 or more")
        require(self.max_images >= 1, "--max-images", self.max_images, "1 or more")
        require(self.timeout > 0, "--timeout", self.timeout, "positive seconds")
        require(0 <= self.port < 65536, "--port", self.port, "from 0 (any free port) to 65535")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise ConfigError("--api-key must be ASCII characters, and not empty")
        if not self.api_key and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines: give --api-key (or $BLIP2_API_KEY), "
                "or leave --host at 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
