"""The policy server under good, bad, slow and vanishing clients; every socket on loopback, every wait bounded."""

from __future__ import annotations

import ast
import contextlib
import json
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TOLD, ByHand, by_hand, serving
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vlm4vla_core import client
from vlm4vla_core.client import RemoteError, RemotePolicy, pack, unpack


def pictures(n: int, seed: int = 0, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def raw(address: str, path: str = "/policy") -> Any:
    return connect(f"ws://{address}{path}", compression=None, proxy=None, open_timeout=10, max_size=None)


def get(address: str, path: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# --- the wire ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["?", "u1", "<i4", ">i8", "<f4", ">f8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_arrays_come_back_as_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    back = unpack(pack({"type": "x", "a": array, "b": array.T}))
    np.testing.assert_array_equal(back["a"], array)
    np.testing.assert_array_equal(back["b"], array.T)
    assert back["a"].dtype.str == np.dtype(dtype).newbyteorder("<").str.replace("<b1", "|b1").replace("<u1", "|u1")


def test_an_array_s_bytes_are_what_the_page_says() -> None:
    by_hand = b"\x82\xa4type\xa1x\xa1a\xc7\x0c\x01\x93\xa3|u1\x92\x01\x02\xc4\x02\x07\x08"
    assert pack({"type": "x", "a": np.array([[7, 8]], np.uint8)}) == by_hand


def test_objects_are_neither_sent_nor_read() -> None:
    with pytest.raises(TypeError):
        pack({"type": "x", "a": object()})
    for dtype in ("|O", "O", "|V8", "<M8[s]", "<U4", "<c8", "(2,)<f4", ["<f4"], None):
        bad = msgpack.ExtType(1, msgpack.packb([dtype, [1], b"\0" * 8]))
        with pytest.raises(ValueError, match="no array of type"):
            unpack(msgpack.packb({"type": "x", "a": bad}))


@pytest.mark.parametrize("shape", [[3], [-1, -2], [2, True], [2.0], [1] * 9, "2", None, [1 << 62, 1 << 62], [2, 0]])
def test_a_shape_that_does_not_fit_is_refused(shape: object) -> None:
    bad = msgpack.ExtType(1, msgpack.packb(["|u1", shape, b"\0\0"]))
    with pytest.raises(ValueError, match="does not fit"):
        unpack(msgpack.packb({"type": "x", "a": bad}))


VALID = pack({"type": "predict", "id": 3, "images": pictures(1), "instructions": ["go"], "alone": False})


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_damaged_messages_are_a_value_error_or_still_a_message(data: st.DataObject) -> None:
    damaged = bytearray(VALID[: data.draw(st.integers(0, len(VALID)))])
    places = st.integers(0, min(60, max(len(damaged) - 1, 0)))
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        if damaged:
            damaged[place] = byte
    with contextlib.suppress(ValueError):
        assert isinstance(unpack(bytes(damaged))["type"], str)


# --- what clients are told and asked -------------------------------------------------------------------------


def test_the_policy_is_told_and_answers() -> None:
    with serving(ByHand()) as server, RemotePolicy(server.address) as policy:
        assert policy.policy == TOLD and policy.chunk == 4 and policy.camera == "front"
        assert policy.convention["gripper_open"] == 1.0
        images, words = pictures(3), ["go", "left", "up"]
        for alone in (False, True):
            np.testing.assert_array_equal(policy.predict(images, words, alone=alone), by_hand(images, words))
        assert server.server.policy.batches == [3, 1, 1, 1]


BAD: list[tuple[object, str]] = [
    (b"", "not a msgpack message"),
    (b"\xc1", "not a msgpack message"),
    (b"\x91" * 5000, "not a msgpack message"),  # nested too deep
    (b"\xdd\xff\xff\xff\xff", "not a msgpack message"),  # announces 4 thousand million entries
    (b"\xc6\xff\xff\xff\xff", "not a msgpack message"),
    (VALID[:-1], "not a msgpack message"),
    (VALID + b"x", "not a msgpack message"),
    ("words", "text message"),
    (b"\x01", "a message is a map"),
    (b"\x80", "a message is a map"),
    (pack({"type": 3}), "a message is a map"),
    (b"\x81\xa4type\xa1\xff", "not a msgpack message"),  # no UTF-8
    (pack({"type": "predict"}), "'id' has to be a whole number"),
    (pack({"type": "predict", "id": -1}), "'id' has to be"),
    (pack({"type": "predict", "id": True}), "'id' has to be"),
    (pack({"type": "shutdown", "id": 1}), "unknown message type 'shutdown'"),
    (pack({"type": "predict", "id": 1}), "'images' has to be uint8 (B, H, W, 3), got NoneType"),
]


def ask(**changes: object) -> bytes:
    return pack({"type": "predict", "id": 1, "images": pictures(2), "instructions": ["a", "b"], **changes})


BAD += [
    (ask(images=pictures(2).astype(np.float32)), "got float32 (2, 8, 8, 3)"),
    (ask(images=pictures(2)[0]), "got uint8 (8, 8, 3)"),
    (ask(images=pictures(2)[..., :2]), "got uint8 (2, 8, 8, 2)"),
    (ask(images=np.zeros((0, 8, 8, 3), np.uint8)), "1 to 6"),
    (ask(images=np.zeros((2, 0, 8, 3), np.uint8)), "not empty"),
    (ask(images=np.zeros((7, 1, 1, 3), np.uint8), instructions=["a"] * 7), "1 to 6"),
    (ask(images=[1, 2]), "got list"),
    (ask(instructions=["a"]), "2 pictures and 1 instructions"),
    (ask(instructions="ab"), "list of texts"),
    (ask(instructions=["a", 3]), "list of texts"),
    (ask(instructions=["a", " "]), "empty or longer"),
    (ask(instructions=["a", "b" * 2001]), "empty or longer"),
    (ask(instructions=["a", "refuse"]), "this instruction is refused"),
    (ask(instructions=["a", "break"]), "the policy failed (RuntimeError)"),
]


def test_every_malformed_message_gets_one_clear_error_and_the_connection_lives_on() -> None:
    with serving(ByHand(), max_pictures=6) as server, raw(server.address) as socket_:
        assert unpack(socket_.recv(10))["type"] == "hello"
        for bad, words in BAD:
            socket_.send(bad)
            reply = unpack(socket_.recv(10))
            assert reply["type"] == "error" and words in reply["error"], (bad, reply)
            assert "secret" not in reply["error"] and len(reply["error"]) < 200
        socket_.send(ask())
        reply = unpack(socket_.recv(10))
        assert (reply["type"], reply["id"]) == ("actions", 1)
        np.testing.assert_array_equal(reply["actions"], by_hand(pictures(2), ["a", "b"]))


def test_random_damage_never_stops_the_server() -> None:
    rng = np.random.default_rng(0)
    with serving(ByHand()) as server, raw(server.address) as socket_:
        socket_.recv(10)
        for _ in range(300):
            damaged = bytearray(VALID[: rng.integers(1, len(VALID) + 1)])
            for place in rng.integers(0, min(len(damaged), 60), rng.integers(0, 4)):
                damaged[place] = rng.integers(256)
            socket_.send(bytes(damaged))
            assert unpack(socket_.recv(10))["type"] in ("error", "actions")


def test_huge_messages_are_refused_before_they_are_read() -> None:
    with serving(ByHand(), max_bytes=100_000) as server:
        with (
            RemotePolicy(server.address) as policy,
            pytest.raises(RemoteError, match=r"closed the connection.*100000"),
        ):
            policy.predict(pictures(1, size=400), ["go"])
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:  # announces 8 exabytes
            shake(plain)
            plain.sendall(b"\x82\xff" + struct.pack(">Q", 1 << 62) + b"\0\0\0\0")
            assert plain.recv(1 << 16)  # hello, then the closing frame, at once
        with RemotePolicy(server.address) as policy:
            assert policy.predict(pictures(1), ["go"]).shape == (1, 4, 7)


def shake(plain: socket.socket) -> None:
    """The opening handshake of a websocket by hand (RFC 6455, section 4.1)."""
    plain.sendall(
        b"GET /policy HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += plain.recv(1 << 16)
    assert b" 101 " in answer


# --- who may come in -----------------------------------------------------------------------------------------


def test_a_wrong_token_gets_nothing() -> None:
    with serving(ByHand(), token="right") as server:
        for token in (None, "", "wrong", "righ", "rightx", "r\u00ef"):
            with pytest.raises(RemoteError, match=r"refuses the token|no policy server answers"):
                RemotePolicy(server.address, token, timeout=10)
        for path in ("/", "/policy", "/?token=wrong", "/policy?token=", "/elsewhere"):
            with pytest.raises(InvalidStatus) as refused:
                raw(server.address, path)
            response = refused.value.response
            assert response.status_code == 401 and json.loads(response.body) == {"error": "wrong or missing token"}
        assert server.server.policy.batches == []
        with RemotePolicy(server.address, "right") as policy:
            assert policy.predict(pictures(1), ["go"]).shape == (1, 4, 7)


def test_health_says_only_that_it_lives() -> None:
    with serving(ByHand(), token="right") as server:
        assert get(server.address, "/health") == (200, '{"status": "ok"}\n')
    with serving(ByHand()) as server:
        assert get(server.address, "/elsewhere")[0] == 404
        assert get(server.address, "/policy")[0] == 426  # no websocket


def test_one_client_too_many_is_told_so() -> None:
    with serving(ByHand(), max_clients=2) as server:
        first, second = RemotePolicy(server.address), RemotePolicy(server.address)
        with pytest.raises(RemoteError, match="has its 2 clients"):
            RemotePolicy(server.address)
        first.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                RemotePolicy(server.address).close()
                break
            except RemoteError:
                time.sleep(0.01)
        else:
            pytest.fail("the place of the client that left is not free again")
        assert second.predict(pictures(1), ["go"]).shape == (1, 4, 7)
        second.close()


def test_a_client_that_asks_too_fast_is_held_back() -> None:
    with serving(ByHand(), rate=20) as server, RemotePolicy(server.address) as policy:
        began = time.monotonic()
        for _ in range(26):
            policy.predict(pictures(1), ["go"])
        assert time.monotonic() - began > 0.2  # 20 at once, then 20 a second


def test_a_server_of_another_kind_is_no_policy_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ByHand()) as server:
        monkeypatch.setattr(client, "PROTOCOL", 2)
        with pytest.raises(RemoteError, match="protocol 1, this client 2"):
            RemotePolicy(server.address)
        with pytest.raises(RemoteError, match="HTTP status 404"):
            RemotePolicy(server.address + "/elsewhere")
    with pytest.raises(RemoteError, match="no policy server answers at"):
        RemotePolicy(server.address, timeout=5)  # it has gone


# --- many, slow and vanishing ones ---------------------------------------------------------------------------


def storm(address: str, clients: int, requests: int) -> None:
    """Each client asks with its own pictures and words and compares what comes back with the work by hand."""

    def one(number: int) -> None:
        with RemotePolicy(address) as policy:
            for k in range(requests):
                images = pictures(1 + k % 2, seed=1000 * number + k, size=6 + number % 2)
                words = ["go" * (number + 1)] * len(images)
                np.testing.assert_array_equal(policy.predict(images, words), by_hand(images, words))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(clients), timeout=120))


def test_requests_that_wait_are_predicted_together_and_answered_apart() -> None:
    slow = ByHand(wait=0.02)
    with serving(slow, max_batch=6) as server:
        storm(server.address, 8, 6)
    assert 1 < max(slow.batches) <= 6 and sum(slow.batches) == 8 * 9


@pytest.mark.parametrize(
    ("most", "alone", "expected"), [(4, False, [4, 4, 2]), (64, False, [10]), (64, True, [1] * 10)]
)
def test_no_prediction_is_larger_than_max_batch(most: int, alone: bool, expected: list[int]) -> None:
    policy, images, words = ByHand(), pictures(10), [f"go {k}" for k in range(10)]
    with serving(policy, max_batch=most) as server, RemotePolicy(server.address) as remote:
        np.testing.assert_array_equal(remote.predict(images, words, alone), by_hand(images, words))
    assert policy.batches == expected


@pytest.mark.slow
def test_thirty_two_clients() -> None:
    slow = ByHand(wait=0.02)
    with serving(slow) as server:
        storm(server.address, 32, 40)
    assert sum(slow.batches) == 32 * 60 and max(slow.batches) > 8


def test_a_refused_request_does_not_take_its_neighbours_with_it() -> None:
    slow = ByHand(wait=0.05)
    with serving(slow) as server:

        def one(number: int) -> object:
            with RemotePolicy(server.address) as policy:
                try:
                    return policy.predict(pictures(1, number), ["refuse" if number % 2 else "go"])
                except RemoteError as error:
                    return str(error)

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(one, range(6), timeout=60))
    assert answers[1::2] == ["this instruction is refused"] * 3
    for number in (0, 2, 4):
        np.testing.assert_array_equal(answers[number], by_hand(pictures(1, number), ["go"]))
    assert max(slow.batches) > 1


def test_slow_and_vanishing_clients_hold_nobody_up() -> None:
    with serving(ByHand(wait=0.01), idle_s=0.5) as server:
        plain = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(6)]
        plain[0].sendall(b"GET /policy HT")  # never ends its handshake
        for one in plain[1:]:
            shake(one)
        plain[1].sendall(b"\x82\xff" + struct.pack(">Q", 5000) + b"\0\0\0\0half")  # never ends its message
        masked = b"\x82\xfe" + struct.pack(">H", len(VALID)) + b"\0\0\0\0" + VALID
        for one in plain[2:5]:  # asks, and is gone without a word
            one.sendall(masked)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
        with RemotePolicy(server.address) as policy:
            assert policy.predict(pictures(1), ["go"]).shape == (1, 4, 7)
        for one in plain[1], plain[5]:  # half a message, or silence: both are let go
            ended = b""
            while piece := one.recv(1 << 16):
                ended += piece
            assert b"silent or slow for too long" in ended
        for one in plain:
            one.close()
        deadline = time.monotonic() + 10
        while server.server._clients and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.server._clients == 0 and server.server._busy == 0


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next() -> None:
    with serving(ByHand(wait=0.5)) as server:
        policy = RemotePolicy(server.address, timeout=0.2)
        with pytest.raises(RemoteError, match=r"no answer within 0\.2 s"):
            policy.predict(pictures(1), ["go"])
        with pytest.raises(RemoteError, match="closed"):
            policy.predict(pictures(1), ["go"])


def test_a_server_that_stops_answers_what_is_under_way() -> None:
    slow = ByHand(wait=0.5)
    with serving(slow) as server:
        idle = raw(server.address)
        idle.recv(10)
        with RemotePolicy(server.address) as policy, ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(policy.predict, pictures(1), ["go"])
            deadline = time.monotonic() + 10
            while not slow.batches and time.monotonic() < deadline:
                time.sleep(0.005)
            server.tell()
            np.testing.assert_array_equal(under_way.result(10), by_hand(pictures(1), ["go"]))
        server.stop()
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(10)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "the server stops")
        with pytest.raises(RemoteError, match="no policy server"):
            RemotePolicy(server.address, timeout=5)


def test_an_address_in_use_is_named() -> None:
    import asyncio

    from vlm4vla_core.errors import InputError
    from vlm4vla_core.serve import PolicyServer

    with serving(ByHand()) as server, pytest.raises(InputError, match=rf"cannot listen.*127\.0\.0\.1:{server.port}"):
        asyncio.run(PolicyServer(ByHand(), TOLD).run("127.0.0.1", server.port, asyncio.Event(), lambda port: None))
    assert threading.active_count() < 20


# --- the client is one file ----------------------------------------------------------------------------------


def test_the_client_needs_nothing_but_three_packages_and_python_3_8() -> None:
    source = Path(client.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    names = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    outside = names - set(sys.stdlib_module_names)
    assert outside == {"msgpack", "numpy", "websockets"}
    # Annotations are never evaluated, so that `str | None` may stand in them under 3.8.
    assert "from __future__ import annotations" in source
