"""The processes of a run: the share of a batch that each has, and the network in shards (FSDP2)."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType

import torch
import torch.distributed as dist
from torch import nn

# What torchrun would set for one process. Port 0 lets the system choose a free one.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class World:
    """The processes of a run. Each holds the whole batch as data, so the loop reads as if there were only one. Sampling, grading
    and forward passes are done on a share of the rows, and `together` and `sum` combine the shares. Both are collective: every
    process calls them, in the same order. The default is one process without a group."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    sharded: bool = False  # whether there is a group

    @classmethod
    def start(cls) -> "World":
        """Reads the environment that torchrun sets. On CUDA one process forms a group as well, so that one GPU and many run the
        same code: sharded layers, float32 weights, bfloat16 compute. Only the first process keeps its standard output. Raises
        ValueError for more processes than GPUs."""
        cuda = torch.cuda.is_available()
        if os.environ.get("RANK", "0") != "0":
            sys.stdout = open(os.devnull, "w")
        if "RANK" not in os.environ:
            if not cuda:
                return cls()
            os.environ |= ALONE
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            if device.index >= torch.cuda.device_count():
                raise ValueError(f"more processes on this machine than its {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # Waiting for the slowest process in sampling and grading may take longer than the library's ten minutes. No
            # device_id: it would bind the group to the device, and vLLM makes subgroups of its own within it.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
        return cls(dist.get_rank(), dist.get_world_size(), device, sharded=True)

    def share(self, n: int) -> range:
        """Which of 0..n-1 are this process's share."""
        return range(self.rank, n, self.size)

    def together(self, mine: dict) -> dict:
        """The union of the processes' dictionaries, whose keys (rows, say) differ."""
        if self.size == 1:
            return mine
        shares = [{}] * self.size
        dist.all_gather_object(shares, mine)
        return {key: value for share in shares for key, value in share.items()}

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def first(self, function: Callable):
        """Calls `function` in process 0 only, and returns its result in every process."""
        box = [function() if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Waits until every process has come this far."""
        self.first(lambda: None)

    def most(self, n: float) -> float:
        """The largest of the processes' numbers."""
        return max(self.together({self.rank: n}).values())


class Shared:
    """A function of rows, with each row computed in one process. `function` takes lists with one entry a row and returns such a
    list. threads: how many may call it at once; if any, `begin` starts a row of the next call early, in any one process."""

    def __init__(self, world: World, function: Callable, threads: int = 0):
        self.world, self.function, self.begun = world, function, {}
        self.pool = ThreadPoolExecutor(threads) if threads else None

    def begin(self, row: int, *entries) -> None:
        if self.pool:
            self.begun[row] = entries, self.pool.submit(self.function, *([entry] for entry in entries))

    def __call__(self, *columns: list) -> list:
        n, begun, self.begun = len(columns[0]), self.begun, {}
        of = lambda row: tuple(column[row] for column in columns)  # noqa: E731
        same = {row: future for row, (entries, future) in begun.items() if row < n and entries == of(row)}
        done = self.world.together({row: future.result()[0] for row, future in same.items()})
        rest = [row for row in range(n) if row not in done]
        mine = [rest[i] for i in self.world.share(len(rest))]
        results = self.function(*([column[row] for row in mine] for column in columns)) if mine else []
        done |= self.world.together(dict(zip(mine, results, strict=True)))
        return [done[row] for row in range(n)]


def placed(model: nn.Module, world: World, compute: torch.dtype | None = None, compiled: bool = False) -> nn.Module:
    """Puts the network on this process's device, and into shards (FSDP2) where there is a group: each decoder layer is a unit, and
    the root has embedding, norm and head. Shards keep the model's dtype, `compute` is the dtype of passes (None: the same), and
    gradients are averaged in float32 or the model's. compiled: torch.compile compiles each layer. A network on the meta device
    gets memory only for what this process keeps; the caller fills it."""
    empty = model.device.type == "meta"
    if world.sharded:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        # A layer needs a graph for one row or several, with or without gradient, for student or moving average, recomputed: ten
        # in all, and by default torch.compile gives up at the ninth.
        torch.compiler.config.recompile_limit = 64
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute and torch.float32)
        for layer in model.base_model.layers:
            if compiled:
                layer.compile(dynamic=True)
            fully_shard(layer, mp_policy=precision)
        fully_shard(model, mp_policy=precision)
        # The head is used outside of forward, on the states that this method returns. As a forward method of the root it gathers
        # the root's weights, which stay gathered until the backward pass is over.
        model.states = MethodType(_states, model)
        register_fsdp_forward_method(model, "states")
    elif not empty:
        model.to(world.device)
    if empty:
        model.to_empty(device=world.device)
        model.tie_weights()
        for module in model.modules():  # fills buffers that no file holds: the rotary embedding's frequencies
            if module._non_persistent_buffers_set:
                model._init_weights(module)
    return model


def states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The last layer's states, (B, width, H), for ids (B, width)."""
    return model.states(ids) if hasattr(model, "states") else _states(model, ids)


def _states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    # Not through __call__, which vLLM replaces in the classes of some architectures (OLMo3).
    return model.base_model.forward(input_ids=ids, use_cache=False).last_hidden_state


def reshard(*models: nn.Module) -> None:
    """Frees the root, which passes without gradients leave gathered, as no backward pass follows that would free it."""
    for model in models:
        if hasattr(model, "reshard"):
            model.reshard()


def whole(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, whole tensor) for every tensor of a model's file, one at a time, in `dtype` (default: its own). A tied head
    comes once, as the embedding. Collective: every process must run through it to the end."""
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # the state dict has a tied head twice
    for name, w in model.state_dict().items():
        if name in once:
            w = w.to(dtype or w.dtype)  # cast the shard first: half the traffic, the same bits
            yield name, w.full_tensor() if hasattr(w, "full_tensor") else w
