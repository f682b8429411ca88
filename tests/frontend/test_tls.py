"""TLS on both sides of the front end."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import trustme

from prism_trt.deploy.server import TritonServer
from prism_trt.errors import PrismError
from prism_trt.frontend.server import Address
from prism_trt.frontend.triton import read_authorities
from tests.frontend.conftest import ROOT, running


@contextmanager
def tls_proxy(backend: str, context: ssl.SSLContext) -> Iterator[int]:
    """A port that speaks TLS for a server that does not."""
    context.set_alpn_protocols(["h2"])
    host, port = backend.split(":")
    loop = asyncio.new_event_loop()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # one side has gone
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(asyncio.sleep(0))


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def write_certificate(authority: trustme.CA, directory: Path) -> tuple[Path, Path, Path]:
    """Certificate, key and authority as files."""
    certificate = authority.issue_cert("localhost")
    paths = directory / "cert.pem", directory / "key.pem", directory / "ca.pem"
    certificate.cert_chain_pems[0].write_to_path(str(paths[0]))
    certificate.private_key_pem.write_to_path(str(paths[1]))
    authority.cert_pem.write_to_path(str(paths[2]))
    return paths


def test_tls_on_both_sides(server: TritonServer, authority: trustme.CA, tmp_path: Path) -> None:
    cert, key, ca = write_certificate(authority, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    # Without idle connections: asyncio waits half a minute for the other side to end TLS.
    trusting = httpx.Client(
        verify=ssl.create_default_context(cafile=ca), limits=httpx.Limits(max_keepalive_connections=0)
    )
    arguments = ["--host", "127.0.0.1", "--tls-cert", str(cert), "--tls-key", str(key), "--grpc-tls-ca"]
    with tls_proxy(server.grpc_url, context) as port:
        with running(f"localhost:{port}", *arguments, str(ca)) as frontend:
            assert frontend.url.startswith("https://127.0.0.1:")
            frontend.url = frontend.url.replace("127.0.0.1", "localhost")
            answer = frontend.openai(http_client=trusting).completions.create(model="prism", prompt="a", max_tokens=3)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 3
            with pytest.raises(openai.APIConnectionError):
                frontend.openai().models.list()

        other = tmp_path / "other.pem"
        trustme.CA().cert_pem.write_to_path(str(other))
        with running(f"localhost:{port}", *arguments, str(other)) as distrustful:
            distrustful.url = distrustful.url.replace("127.0.0.1", "localhost")
            with pytest.raises(openai.InternalServerError, match="cannot be reached"):
                distrustful.openai(http_client=trusting).completions.create(model="prism", prompt="a", max_tokens=3)


def test_certificates_that_are_none_are_refused(authority: trustme.CA, tmp_path: Path) -> None:
    cert, key, _ = write_certificate(authority, tmp_path)
    with pytest.raises(PrismError, match="pass both --tls-cert and --tls-key"):
        Address(certificate=cert).check_certificate()
    with pytest.raises(PrismError, match="are no certificate and key"):
        Address(certificate=key, key=cert).check_certificate()
    Address(certificate=cert, key=key).check_certificate()
    for path in (ROOT / "LICENSE", tmp_path / "absent"):
        with pytest.raises(PrismError, match="holds no certificates"):
            read_authorities(path)
