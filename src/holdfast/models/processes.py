"""What `accelerate launch` and `torchrun` started, as a `holdfast.share.Share`."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from holdfast.errors import ConfigError
from holdfast.share import ALONE, Share, is_alone, sharing

# Judges, edits and calibrations run on one process; the others wait for as long as a busy endpoint takes.
_PATIENCE = timedelta(days=2)


def started(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes were started together; 1 without a launcher."""
    return int(environment.get("WORLD_SIZE", "1"))


def wants_shards(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher was configured for FSDP.

    Raises: ConfigError: for FSDP1, or for another way of sharing weights out.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "accelerate was configured for DeepSpeed; a stream shares weights out with FSDP2 alone. Launch with "
            "`accelerate launch --multi_gpu`, and pass --fsdp where one device cannot hold the base."
        )
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(
            f"accelerate was configured for FSDP version {version}; a stream shares weights out with FSDP2 alone. "
            "Set fsdp_version: 2 in accelerate's configuration, or launch with --multi_gpu and pass --fsdp."
        )
    return True


def in_group() -> bool:
    """Whether others of a process group take part in what goes on: not while this process works by itself."""
    return not is_alone() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def joined(*, shard: bool = False) -> Iterator[Share]:
    """This process's share of what was started together; `ALONE` where it is the only one.

    shard: share the base's weights out with FSDP2; so does a launcher that was configured for it.

    Raises: ConfigError: as `wants_shards`; `shard` with one process.
    """
    world = started()
    if world == 1:
        if shard:
            raise ConfigError(
                "FSDP2 shares the base's weights out over several processes, and this is the only one. Start them "
                "with `accelerate launch --num_processes N -m holdfast run FILE --fsdp` or `torchrun`."
            )
        yield ALONE
        return
    shard = wants_shards() or shard
    # The blocks are shared out here; transformers' trainer must not do it a second time.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    from accelerate import PartialState

    begun = dist.is_initialized()
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    if not begun:
        # Not when this work ends: a group that is begun anew at once may meet what is left of the one before.
        atexit.register(dist.destroy_process_group)
    with sharing(group_share(state.device, sharded=shard)) as share:
        yield share


def group_share(device: torch.device, *, sharded: bool = False) -> Share:
    """The share of this process in torch's default process group. device: where its model and messages go."""

    def tell(value: Any) -> Any:
        # As JSON text in a tensor: torch's own way of sending objects is a pickle.
        text = torch.tensor([*json.dumps(value).encode()], dtype=torch.uint8, device=device)
        length = torch.tensor([text.numel()], device=device)
        dist.broadcast(length, src=0)
        if dist.get_rank():
            text = torch.empty(int(length), dtype=torch.uint8, device=device)
        dist.broadcast(text, src=0)
        return json.loads(bytes(text.tolist()))

    def total(value: int) -> int:
        found = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(found)
        return int(found)

    def wait() -> None:
        total(0)

    return Share(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        wait=wait,
        tell=tell,
        total=total,
        sharded=sharded,
        device=device,
    )
