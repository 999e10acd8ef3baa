"""What the direct transport makes of an answer's bytes, whichever way they are cut, and what it refuses."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx2
import pytest

from ghostvis_cli.engines.http1 import DirectTransport

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HELLO = CHUNKED + b"5\r\nhello\r\n6;note=1\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world"


class Bytes:
    """A server that answers each request with the next sequence of writes, then closes where told to."""

    def __init__(self, *answers: Sequence[bytes], close: bool = False) -> None:
        self.answers, self.close = list(answers), close
        self.connections = 0
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                for piece in self.answers.pop(0):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.close:
                    return
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def client(server: Bytes, **settings: float) -> AsyncIterator[httpx2.AsyncClient]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    transport = DirectTransport(
        certificates=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        most_connections=4,
        keepalive_s=settings.get("keepalive_s", 5.0),
    )
    async with (
        listening,
        httpx2.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{port}") as found,
    ):
        yield found


async def body(server: Bytes) -> bytes:
    async with client(server) as found:
        return (await found.get("/")).content


@pytest.mark.parametrize("answer", [HELLO, SIZED, b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HELLO])
async def test_an_answer_is_the_same_in_one_piece_and_byte_by_byte(answer: bytes) -> None:
    assert await body(Bytes([answer])) == b"hello world"
    assert await body(Bytes([bytes([byte]) for byte in answer])) == b"hello world"


async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    assert await body(Bytes([b"HTTP/1.0 200 OK\r\n\r\nhello", b" world"], close=True)) == b"hello world"


async def test_a_status_without_a_body_ends_with_its_head() -> None:
    assert await body(Bytes([b"HTTP/1.1 204 No Content\r\n\r\n"])) == b""


async def test_a_connection_is_used_again_after_a_whole_answer() -> None:
    server = Bytes([HELLO], [SIZED], [HELLO])
    async with client(server) as found:
        texts = [(await found.get("/")).text for _ in range(3)]
    assert (texts, server.connections) == (["hello world"] * 3, 1)


async def test_an_idle_connection_is_left_once_its_time_is_over() -> None:
    server = Bytes([HELLO], [HELLO])
    async with client(server, keepalive_s=-1.0) as found:
        await found.get("/")
        await found.get("/")
    assert server.connections == 2


async def test_a_connection_with_bytes_behind_the_answer_is_not_used_again() -> None:
    server = Bytes([HELLO + b"HTTP/1.1 200 OK\r\n\r\n"], [HELLO])
    async with client(server) as found:
        await found.get("/")
        assert (await found.get("/")).text == "hello world"
    assert server.connections == 2


async def test_a_request_goes_out_with_its_path_headers_and_body() -> None:
    server = Bytes([SIZED])
    async with client(server) as found:
        await found.post("/v1/x?y=1", content=b"abc", headers={"X-A": "b"})
    first, *headers = server.requests[0].split(b"\r\n")
    assert first == b"POST /v1/x?y=1 HTTP/1.1"
    assert {b"X-A: b", b"Content-Length: 3"} <= set(headers)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nName : x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        CHUNKED + b"five\r\nhello\r\n0\r\n\r\n",
        CHUNKED + b"4\r\nhello\r\n0\r\n\r\n",
        CHUNKED + b"1" * 5000,
        b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200_000,
    ],
    ids=["no HTTP", "no colon", "space", "length", "coding", "size", "long chunk", "long line", "long head"],
)
async def test_bytes_that_are_no_answer_are_refused(answer: bytes) -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        await body(Bytes([answer]))


@pytest.mark.parametrize("answer", [b"", HELLO[:20], CHUNKED, HELLO[:60], HELLO[:-2], SIZED[:-1]])
async def test_an_answer_that_breaks_off_is_no_answer(answer: bytes) -> None:
    with pytest.raises(httpx2.RemoteProtocolError, match="closed the connection"):
        await body(Bytes([answer], close=True))


async def test_a_server_waits_while_nobody_reads_its_answer() -> None:
    much = b"x" * (64 << 20)  # more than sockets hold
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(much)
    server = Bytes([head + much, b""])
    async with client(server) as found, found.stream("GET", "/") as response:
        pieces = response.aiter_bytes()
        first = await anext(pieces)
        assert len(first) < len(much) // 2
        assert len(first) + sum([len(piece) async for piece in pieces]) == len(much)


async def test_requests_beyond_the_limit_wait_for_a_place() -> None:
    server = Bytes(*[[HELLO]] * 12)
    async with client(server) as found:
        answers = await asyncio.gather(*(found.get("/") for _ in range(12)))
    assert {answer.text for answer in answers} == {"hello world"}
    assert server.connections <= 4
