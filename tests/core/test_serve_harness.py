"""vla-evaluation-harness's protocol in its own bytes: messages below are packed as its client (0.8) packs them."""

from __future__ import annotations

import io
import time
from typing import Any

import msgpack
import numpy as np
import pytest
from serving import TOLD, ByHand, serving
from websockets.sync.client import connect

from vlm4vla_core.actions import BRIDGE, CALVIN, LIBERO
from vlm4vla_core.harness import action_spec


class Client:
    """One connection of the harness: every message gets the next number and the time."""

    def __init__(self, address: str, path: str = "/") -> None:
        self.socket, self.seq = connect(f"ws://{address}{path}", compression=None, proxy=None, max_size=None), 0

    def send(self, kind: str, payload: object) -> None:
        self.seq += 1
        message = {"type": kind, "payload": payload, "seq": self.seq, "timestamp": time.time()}
        self.socket.send(msgpack.packb(message, use_bin_type=True))

    def ask(self, kind: str, payload: object) -> dict[str, Any]:
        self.send(kind, payload)
        reply = msgpack.unpackb(self.socket.recv(10))
        assert set(reply) == {"type", "payload", "seq", "timestamp"} and reply["seq"] == self.seq
        return reply

    def act(self, picture: object, words: object = "go", name: str = "agentview") -> np.ndarray:
        reply = self.ask("observation", {"images": {name: picture}, "task_description": words})
        assert reply["type"] == "action", reply
        array = reply["payload"]["actions"]
        assert array["__ndarray__"] is True and array["dtype"] == "<f4" and array["shape"] == [7]
        return np.frombuffer(array["data"], "<f4")


PICTURE = np.full((8, 6, 3), 100, np.uint8)
RAW = {"__image__": True, "format": "raw", "data": PICTURE.tobytes(), "dtype": "|u1", "shape": [8, 6, 3]}
PLAIN = {"__ndarray__": True, "data": PICTURE.tobytes(), "dtype": "|u1", "shape": [8, 6, 3]}


def encoded(kind: str, picture: np.ndarray = PICTURE) -> dict[str, Any]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=kind)
    return {"__image__": True, "format": kind.lower(), "data": buffer.getvalue(), "shape": list(picture.shape)}


def test_an_episode_as_the_harness_plays_it() -> None:
    policy = ByHand()
    with serving(policy, execute=3) as server:
        client = Client(server.address)
        hello = client.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1, "benchmark": "libero"})
        assert hello["type"] == "hello" and hello["payload"]["protocol_version"] == 1
        assert hello["payload"]["action_spec"]["rotation"]["format"] == "euler_xyz"
        client.send("episode_start", {"task": {"name": "x"}})
        # Action k of a chunk says k in its third number; the chunk is cut at `execute`, then the policy looks again.
        asked = [PLAIN, RAW, encoded("PNG"), encoded("JPEG"), RAW]
        assert [client.act(one)[2] for one in asked] == [0, 1, 2, 0, 1]
        np.testing.assert_array_equal(client.act(RAW), [100, 2, 2, 0, 0, 0, 1])
        assert client.act(RAW)[2] == 0
        assert client.act(RAW, "other words")[:3].tolist() == [100, 11, 0]  # new words: look again
        client.send("episode_end", {"metrics": {"success": True}, "steps": 8, "elapsed_sec": 1.0})
        client.send("episode_start", {"task": {"name": "y"}, "recording": {"sid": "s", "eid": "e"}})
        assert client.act(RAW, "other words")[2] == 0  # a new episode does not go on with the old chunk
        assert len(policy.batches) == 5


def test_two_clients_keep_their_own_chunks() -> None:
    with serving(ByHand()) as server:
        one, two = Client(server.address), Client(server.address)
        assert [one.act(RAW)[2], one.act(RAW)[2], two.act(RAW)[2], one.act(RAW)[2], two.act(RAW)[2]] == [0, 1, 0, 2, 1]


def test_the_policy_s_camera_is_chosen_by_name_and_never_guessed() -> None:
    with serving(ByHand()) as server:
        client = Client(server.address)
        images = {"wrist": PLAIN, "front": encoded("PNG", PICTURE + 50)}
        reply = client.ask("observation", {"images": images, "task_description": "go"})
        assert np.frombuffer(reply["payload"]["actions"]["data"], "<f4")[0] == 150
        client.send("episode_start", {})
        reply = client.ask("observation", {"images": {"a": RAW, "b": RAW}, "task_description": "go"})
        assert reply["type"] == "error" and "one named 'front'; got ['a', 'b']" in reply["payload"]["error"]


def observation(picture: object, words: object = "go") -> dict[str, Any]:
    return {"images": {"x": picture}, "task_description": words}


MALFORMED = [
    ("observation", observation({**PLAIN, "dtype": "|i1"}), "uint8 (H, W, 3)"),
    ("observation", observation({**PLAIN, "dtype": ["|u1"]}), "uint8 (H, W, 3)"),
    ("observation", observation({**PLAIN, "shape": [8, 6, 4]}), "damaged picture"),
    ("observation", observation({**PLAIN, "shape": [1 << 63, 3]}), "damaged picture"),
    ("observation", observation({"__ndarray__": True}), "without data"),
    ("observation", observation({**encoded("PNG"), "data": b"\x89PNG"}), "neither PNG nor JPEG"),
    ("observation", observation({**encoded("PNG"), "data": encoded("PNG")["data"][:50]}), ""),
    ("observation", observation({**encoded("PNG"), "data": encoded("GIF")["data"]}), "neither PNG nor JPEG"),
    ("observation", observation({**encoded("PNG"), "data": None}), "without data"),
    ("observation", observation("picture"), "uint8 (H, W, 3)"),
    ("observation", observation(PLAIN, 3), "list of texts"),
    ("observation", observation(PLAIN, PLAIN), "list of texts"),
    ("observation", observation(PLAIN, "break"), "the policy failed"),
    ("observation", {}, "'images' has to hold one picture"),
    ("observation", PLAIN, "'images' has to hold one picture"),
    ("observation", [], "a message is a map of type"),
    ("dance", {}, "unknown message type 'dance'"),
]


def test_malformed_messages_get_one_error_each_and_the_client_stays() -> None:
    with serving(ByHand()) as server:
        client = Client(server.address)
        for kind, payload, words in MALFORMED:
            client.send(kind, payload)
            reply = msgpack.unpackb(client.socket.recv(10))
            assert reply["type"] == "error" and words in reply["payload"]["error"], (payload, reply)
        rng = np.random.default_rng(0)
        whole = msgpack.packb({"type": "observation", "payload": observation(RAW), "seq": 1, "timestamp": 0.0})
        for data in (b"", b"\xc1", whole[:-1], whole + b"1", "text", b"\x81\x90\x01", b"\x91" * 5000):
            client.socket.send(data)
            assert msgpack.unpackb(client.socket.recv(10))["type"] == "error"
        for _ in range(200):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] = rng.integers(256)
            client.socket.send(bytes(damaged))  # might now be a message without an answer, so another one follows
            client.send("dance", {})
            while msgpack.unpackb(client.socket.recv(10))["payload"].get("error") != "unknown message type 'dance'":
                pass


def test_a_small_file_of_a_vast_picture_is_not_unpacked() -> None:
    picture = encoded("PNG", np.zeros((4200, 4200, 3), np.uint8))
    with serving(ByHand()) as server:
        reply = Client(server.address).ask("observation", observation(picture))
    assert reply["payload"]["error"] == "a picture of 17640000 pixels; at most 16777216 are read"


def test_the_token_stands_in_the_address() -> None:
    with serving(ByHand(), token="right") as server:
        assert Client(server.address, "/?token=right").act(RAW)[0] == 100


@pytest.mark.parametrize(
    ("convention", "rotation", "gripper"),
    [
        # As the harness's own benchmarks declare: LIBERO axis angle, closed at +1; CALVIN Euler, closed at -1.
        (LIBERO, "axis_angle", "binary_close_positive"),
        (CALVIN, "euler_xyz", "binary_close_negative"),
        (BRIDGE, "euler_xyz", "continuous_01"),
    ],
)
def test_conventions_in_the_harness_s_words(convention: Any, rotation: str, gripper: str) -> None:
    spec = action_spec(convention.to_dict())
    assert (spec["rotation"]["format"], spec["gripper"]["format"]) == (rotation, gripper)
    assert spec["position"]["format"] == "delta_xyz"
    assert all(set(part) >= {"name", "dims", "format"} for part in spec.values())


@pytest.mark.parametrize(("benchmark", "first"), [("vla_eval.benchmarks.calvin.benchmark:X", 2.0), ("other", 100.0)])
def test_calvin_s_shares_become_metres_for_the_harness_s_calvin(benchmark: str, first: float) -> None:
    with serving(ByHand(), {**TOLD, "convention": CALVIN.to_dict()}) as server:
        client = Client(server.address)
        client.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1, "benchmark": benchmark})
        action = client.act(RAW)
        assert action[0] == pytest.approx(first) and action[6] == 1  # 100 shares of 0.02 m
