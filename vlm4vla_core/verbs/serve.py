"""Answer simulators that live elsewhere: a checkpoint behind a websocket, until it is told to stop (Ctrl-C, SIGTERM).

Clients: `vlm4vla evaluate --remote`, the one file vlm4vla_core/client.py (Python 3.8 or newer), and the containers of
vla-evaluation-harness. Only this machine can connect unless --host says otherwise; use a token then.

Example: vlm4vla serve runs/walk/vla --port 8765 --token-file token.txt
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional


@dataclass(frozen=True)
class Args:
    checkpoint: Positional[Path]
    """Checkpoint or run folder of a policy."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all, which needs a token."""
    port: int = 8765
    """Port; 0 for any free one, which is printed."""
    token: str | None = None
    """Secret that clients have to give (others on this machine can read it in the list of processes)."""
    token_file: Path | None = None
    """File with that secret."""
    device: str = "cpu"
    """Where the policy computes: cpu, cuda, cuda:1."""
    execute: int | None = None
    """For vla-evaluation-harness: actions of each chunk before the policy looks again; all when left out."""
    max_bytes: int = 64 << 20
    """Largest message."""
    max_clients: int = 64
    """Clients at once."""
    max_batch: int = 64
    """Pictures predicted together."""
    rate: float = 1000.0
    """Requests per second of one client; a faster one is held back."""
    deterministic: bool = False
    """Predict every picture by itself, so that no rounding depends on other clients."""
    json: Path | None = None
    """Also write address and policy as JSON, once clients can connect."""


def run(args: Args) -> int:
    import asyncio
    import signal

    from vlm4vla_core import checkpoint, folders
    from vlm4vla_core.errors import InputError
    from vlm4vla_core.policy import VLAPolicy
    from vlm4vla_core.serve import Limits, PolicyServer, read_token

    if args.token and args.token_file:
        raise InputError("give --token or --token-file, not both")
    token = args.token or read_token(args.token_file)
    if args.host not in ("127.0.0.1", "::1", "localhost") and token is None:
        raise InputError("others could connect without a token", where=args.host, fix="add --token-file FILE")
    numbers = {name: getattr(args, name) for name in ("max_bytes", "max_clients", "max_batch", "rate")}
    for name, value in numbers.items():
        if not value > 0:
            raise InputError(f"--{name.replace('_', '-')} has to be positive, got {value}")
    folder = checkpoint.resolve(args.checkpoint)
    policy = VLAPolicy.load(folder, args.device)
    told = describe(policy, folder)
    if args.execute is not None and not 1 <= args.execute <= told["chunk"]:
        raise InputError(f"--execute {args.execute} does not fit the policy's chunk of {told['chunk']}")
    limits = Limits(**{**numbers, "max_batch": 1 if args.deterministic else args.max_batch})
    server = PolicyServer(policy, told, token=token, limits=limits, execute=args.execute)

    def ready(port: int) -> None:
        said = f"token needed: {'yes' if token else 'no'}; stop with Ctrl-C"
        print(f"serving {told['model']} ({folder}) at ws://{args.host}:{port}, {said}", flush=True)
        if args.json:
            folders.write_json(args.json, {"host": args.host, "port": port, "policy": told})

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await server.run(args.host, args.port, stop, ready)

    asyncio.run(main())
    print("stopped")
    return 0


def describe(policy: Any, folder: Path) -> dict[str, Any]:
    """What clients are told of a policy and the checkpoint it was read from, as JSON values."""
    from vlm4vla_core import checkpoint

    labels = checkpoint.row_labels(folder)
    return {
        "model": labels["model"],
        "fingerprint": labels["run_id"],
        "labels": labels,
        "domains": list(policy.backbone.lineage.get("domains", ())),
        "convention": policy.config.convention.to_dict(),
        "chunk": policy.config.chunk,
        "camera": policy.config.camera,
        "image_size": policy.backbone.image_size,
    }
