"""Bytes on each rank, phase by phase and item by item, counted before anything is launched.

    plan = plan_memory(config, num_ranks=8, device_type="cuda")
    Console().print(plan.table())

A phase takes what its fullest moment takes, and a moment is a sum of items. What the units weigh is asked of the model,
sharded on the meta device; what passes through a block follows engine/model.py and the kernels, a formula a line.
Batches count as full, and as more than two a step: one begins beside the gradients of those before it.

Legend: T tokens of a micro-batch; c and r bytes of an element in the compute and in the reduce dtype; "queries" and
"keys" are the channels of all query heads and of all key heads.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table

from ..kernels import eager_logprob, eager_sampling, logprob
from ..kernels.dispatch import implementation
from ..kernels.work_list import split_edges
from .config import Config, ModelConfig
from .mesh import Mesh
from .model import Model
from .optim import CHUNK
from .shard import ShardedModel

Items = dict[str, int]

PHASES = ("load", "rollout", "log-probabilities", "update", "checkpoint")
ITEMS = (
    *("weights", "moments", "reference", "reward model", "gradients", "gather buffers", "reduce buffers"),
    *("activations", "logits chunk", "update copies", "KV blocks", "snapshot", "I/O tensors"),
)
FROZEN = ("reference", "reward model")
PREFILL_TOKENS = 4096  # of one step of rollout.Sampler
EVALUATED_TASKS = 32  # of a rank at once, in recipes/evaluate.py


@dataclass(frozen=True)
class Phase:
    """The fullest moment of a phase: bytes of each item on the device, and of what lives in the host's memory."""

    name: str
    device: Items
    host: Items

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class Plan:
    """What one rank takes in each phase; all ranks take the same, to the padding."""

    phases: tuple[Phase, ...]
    num_ranks: int
    device_type: str

    def needs(self, phase: Phase) -> int:
        """Bytes of the memory in which the device computes: on a CPU that is the host's too."""
        return phase.device_bytes + (phase.host_bytes if self.device_type == "cpu" else 0)

    @property
    def fullest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=self.needs)

    @property
    def peak(self) -> int:
        """Bytes that the fullest phase needs."""
        return self.needs(self.fullest)

    def table(self) -> Table:
        """Items by phases."""
        unit, size = ("GB", 1e9) if self.peak >= 1e9 else ("MB", 1e6)
        ranks = "1 rank" if self.num_ranks == 1 else f"each of {self.num_ranks} ranks"
        table = Table(
            title=f"{unit} on {ranks} ({self.device_type})", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("", no_wrap=True)
        for phase in self.phases:
            table.add_column(phase.name, justify="right", no_wrap=True)

        def row(name: str, values: list[int]) -> None:
            if any(values):
                table.add_row(name, *(f"{value / size:.2f}" if value else "" for value in values))

        for item in ITEMS:
            row(item, [phase.device.get(item, 0) for phase in self.phases])
        table.add_section()
        row("on the device", [phase.device_bytes for phase in self.phases])
        if any(phase.host_bytes for phase in self.phases):
            table.add_section()
        for item in ITEMS:
            row(f"host: {item}", [phase.host.get(item, 0) for phase in self.phases])
        return table


def plan_memory(config: Config, num_ranks: int, device_type: str, phases: Sequence[str] = PHASES) -> Plan:
    """Count what each phase takes on a rank.

    Args:
        config: ``config.model`` is the shape, whatever its ``folder`` says; ``rollout.kv_memory`` is in GiB.
        num_ranks: of the launch; a multiple of ``run.shard_size``.
        device_type: "cuda" or "cpu"; their kernels keep different tensors.
        phases: those that a recipe goes through. Without "update" there are no moments, without "rollout" no KV
            blocks, without "checkpoint" no snapshot, without "log-probabilities" no reference.

    Raises:
        UserError: ``run.shard_size`` does not divide the ranks.
    """
    rank = _Rank(config, num_ranks, device_type, phases)
    moments = {
        "load": rank.load(),
        "rollout": rank.rollout(),
        "log-probabilities": rank.logprobs(),
        "update": rank.update(),
        "checkpoint": [rank.held | {"I/O tensors": rank.passing}],
    }
    found = []
    for name in PHASES:
        if name in phases:
            fullest = max(moments[name], key=lambda items: sum(items.values()))
            host = {k: v for k, v in rank.host.items() if name != "load" or k in ("weights", *FROZEN)}
            if name in ("load", "checkpoint") and rank.cuda:
                host["I/O tensors"] = rank.passing
            found.append(Phase(name, {k: v for k, v in fullest.items() if v}, host))
    return Plan(tuple(found), num_ranks, device_type)


def compute_bytes(config: Config, device_type: str) -> int:
    """Bytes of an element in the dtype that ``optimizer.compute_dtype`` means on a device."""
    name = config.optimizer.compute_dtype
    return 2 if name == "bfloat16" or (name == "auto" and device_type == "cuda") else 4


class Layout(NamedTuple):
    """Elements of the units, the root first, whole and of one shard, and of the largest parameter."""

    whole: tuple[int, ...]
    part: tuple[int, ...]
    largest: int
    num_shards: int
    num_copies: int  # of the model


@lru_cache(maxsize=64)
def layout_of(config: ModelConfig, num_ranks: int, shard_size: int) -> Layout:
    mesh = Mesh(world_size=num_ranks, shard_size=shard_size, device=torch.device("meta"))
    with torch.device("meta"):
        shards = ShardedModel(Model(config), mesh).shards
    part = tuple(shard.data.numel() for shard in shards)
    whole = tuple(numel * mesh.shard_size for numel in part)
    largest = max(slot.numel for shard in shards for slot in shard.slots)
    return Layout(whole, part, largest, mesh.shard_size, mesh.num_replicas)


class _Rank:
    """The items of one rank, then the moments of each phase."""

    def __init__(self, config: Config, num_ranks: int, device_type: str, phases: Sequence[str]) -> None:
        settings, self.model, self.config = config.optimizer, config.model, config
        self.layout = layout = layout_of(dataclasses.replace(config.model, folder=""), num_ranks, config.run.shard_size)
        self.num_ranks, self.cuda = num_ranks, device_type == "cuda"
        self.T, self.c = settings.tokens_per_microbatch, compute_bytes(config, device_type)
        self.r = self.c if settings.reduce_dtype == "compute" else 4
        self.recompute, self.late = settings.activation_checkpointing == "block", not settings.reduce_every_microbatch
        # As in engine/unit.py: the shard serves as the gathered buffer, and in a world of one its gradient as the flat
        # one; the head adds its gradient to the sum itself.
        self.is_master = layout.num_shards == 1 and self.c == 4 and settings.offload != "all"
        self.is_alone = num_ranks == 1
        self.lends = (self.is_alone or self.late) and self.c != 4
        self.reference_is_master = layout.num_shards == 1 and settings.offload == "none"
        elements = sum(layout.part)
        state = {"weights": 4 * elements}  # master, float32
        if "update" in phases:
            state["moments"] = 2 * elements * (2 if settings.moments_dtype == "bfloat16" else 4)
        # Copies of the model take turns by unit to save them (engine/manifest.py).
        turns = (layout.part[copy :: layout.num_copies] for copy in range(layout.num_copies))
        saved = max(map(sum, turns)) * sum(state.values()) // elements
        frozen = [("reference", config.grpo.beta), ("reward model", config.scores_steps)]  # the latter's head is small
        reference = {k: self.c * elements for k, used in frozen if used and "log-probabilities" in phases}
        self.held = {"none": state | reference, "reference": state, "all": {}}[settings.offload]  # from load to end
        snapshot = {"snapshot": saved} if "checkpoint" in phases else {}  # kept from one save to the next
        self.host = {k: v for k, v in (state | reference).items() if k not in self.held and v} | snapshot

    # What the units take ---------------------------------------------------------------------------------------

    def gathered(self, blocks: int, reference: bool = False) -> int:
        """The root and so many blocks whole, in the compute dtype; nothing where the shards themselves serve."""
        if self.reference_is_master if reference else self.is_master:
            return 0
        whole = self.layout.whole
        offloaded = self.config.optimizer.offload in (("reference", "all") if reference else ("all",))
        master = self.c if reference else 4
        staged = master * self.layout.part[1] if self.cuda and offloaded else 0  # a shard comes over, then it is cast
        return self.c * (whole[0] + blocks * whole[1]) + staged

    @property
    def gradients(self) -> int:
        """What lasts over micro-batches, in float32: this rank's shards, or whole while the sum is put off."""
        return 4 * sum(self.layout.whole if self.late else self.layout.part)

    def flat(self, unit: int) -> int:
        """A unit's whole gradient in the reduce dtype, until its sum is there; the lasting one serves where it can."""
        return 0 if self.is_alone or self.late else self.r * self.layout.whole[unit]

    @property
    def added(self) -> int:
        """A CPU adds bfloat16 to float32 by way of a float32 copy: of a sum, or of one gradient after another."""
        if self.cuda or (self.c if self.lends else self.r) == 4:
            return 0
        model = self.model
        matrix = model.hidden_size * max(model.intermediate_size, model.num_attention_heads * model.head_size)
        return 4 * (matrix if self.lends else self.layout.part[1])

    @property
    def passing(self) -> int:
        """Models are made, read and written tensor by tensor, float32, each gone before the next one comes."""
        return 4 * self.layout.largest

    # What passes through a block -------------------------------------------------------------------------------

    @property
    def norm(self) -> int:
        """What autograd keeps of a norm: its input, and its output, which the projections take."""
        if self.cuda:  # and 1/rms of each row
            return self.T * (2 * self.c * self.model.hidden_size + 4)
        return self.T * self.model.hidden_size * (4 + self.c + 4)  # in float32, not fused: the normalised values too

    @property
    def saved(self) -> int:
        """What autograd keeps of one block."""
        model, c = self.model, self.c
        queries = model.num_attention_heads * model.head_size
        keys = model.num_key_value_heads * model.head_size
        served_by = implementation("cuda" if self.cuda else "cpu", "packed_attention")
        # q, k, v and the output; some repeat keys and values for each query head, or keep the output padded too.
        attention = c * {"sdpa": 5 * queries, "xformers": 4 * queries}.get(served_by, 2 * queries + 2 * keys)
        attention += 4 * model.num_attention_heads  # log-sum-exp of each row
        if model.model_type == "qwen3":  # norms of each head, kept as the others are
            rows = 4 * (model.num_attention_heads + model.num_key_value_heads)
            attention += c * (queries + keys) + rows if self.cuda else 8 * (queries + keys)
        swiglu = self.kept_of_swiglu * c * model.intermediate_size
        return 2 * self.norm + self.T * (attention + swiglu)

    @property
    def kept_of_swiglu(self) -> int:
        """Tensors: gate, up and product; in steps, not fused, silu(gate) too."""
        return 3 if self.cuda else 4

    @property
    def kept(self) -> int:
        """What stays of a block between its forward and its backward pass: all of it, or its input alone."""
        return self.T * self.c * self.model.hidden_size if self.recompute else self.saved

    @property
    def block_backward(self) -> list[tuple[int, int]]:
        """Activations and parameters' gradients of a block at moments of its backward pass, in their order."""
        model, c, T = self.model, self.c, self.T
        queries = model.num_attention_heads * model.head_size
        inner, stream = c * model.intermediate_size * T, c * model.hidden_size * T
        # Beside what it keeps: its input, its output and both gradients, in float32; fused, gradients alone.
        norm = self.norm + (3 * stream if self.cuda else 3 * 4 * model.hidden_size * T)
        inside = self.saved - self.kept_of_swiglu * inner  # what is left of a block when SwiGLU is over
        swiglu, projection = 3 * c * model.hidden_size * model.intermediate_size, c * queries * model.hidden_size
        copy = swiglu // 3 if not self.cuda and c == 4 else 0  # oneDNN makes a gradient transposed
        return [
            (self.saved + 2 * inner + stream, swiglu // 3 + copy),  # of product, gate (or silu(gate)), up, less product
            (inside + (2 if self.cuda else 1) * inner + 3 * stream, swiglu + copy),  # fused, those of gate and up
            (inside - self.norm + norm + stream, swiglu),
            (inside - self.norm + 2 * stream + 3 * c * queries * T, swiglu + projection),
            (norm + stream, c * self.layout.whole[1]),
        ]

    def forward_work(self, tokens: int) -> int:
        """Tensors of a block that live at once in a forward pass without a graph."""
        model, c = self.model, self.c
        queries = model.num_attention_heads * model.head_size
        keys = model.num_key_value_heads * model.head_size
        swiglu = c * (2 * model.hidden_size + 2 * model.intermediate_size)  # stream, normalised; gate or product, up
        turned = 0 if self.cuda else queries + keys  # beside those as projected
        attention = c * (2 * model.hidden_size + 5 * queries + 4 * keys + turned)  # q, k, v, padded, repeated; output
        if model.model_type == "qwen3":  # heads before and after their norm; on a CPU in float32 too, normalised alone
            norm = 2 * c if self.cuda else c + (4 if c == 4 else 8) + 4
            attention = max(attention, c * 2 * model.hidden_size + norm * queries)
        return tokens * max(swiglu, attention)

    @property
    def head_forward(self) -> int:
        """Log-probabilities: logits of a tile, or in Triton sums of slices of the vocabulary."""
        model, T = self.model, self.T
        if self.cuda:
            return 16 * T * -(-model.vocab_size // logprob.SLICE_COLUMNS)
        return self.slice_up + self.tile * (2 if self.is_whole else 1)  # whole rows: their log-softmax too

    @property
    def head_backward(self) -> int:
        """The same with gradients: of the head, of its input, and of a chunk of logits."""
        model, c, T = self.model, self.c, self.T
        head = 0 if self.lends else c * model.vocab_size * model.hidden_size
        if self.cuda:  # input rows chosen, and their gradient in float32
            chunk = c * T * min(logprob.CHUNK_COLUMNS, model.vocab_size)
            return head + T * model.hidden_size * (c + 4) + chunk
        width = min(model.vocab_size, eager_logprob.SLICE_COLUMNS)
        sums = 2 * 4 * model.hidden_size * width  # of a slice of the head, and a part to add or a copy
        kept = T * eager_logprob.kept_columns(T, model.vocab_size)
        forward = 4 * kept + self.slice_up + self.tile * 2  # with the entropy
        tiles = self.tile
        if self.is_whole:  # and a copy of them, transposed
            tiles = 2 * min(4 * kept, 2 * eager_logprob.KEPT_ELEMENTS) if kept else 2 * self.tile
        return max(forward, head + 4 * T * model.hidden_size + self.slice_up + sums + 4 * kept + tiles)

    @property
    def is_whole(self) -> bool:
        """On a CPU: rows of logits are not cut."""
        return self.model.vocab_size <= eager_logprob.SLICE_COLUMNS

    @property
    def tile(self) -> int:
        """Logits of a CPU's tile, in float32."""
        width = min(self.model.vocab_size, eager_logprob.SLICE_COLUMNS)
        return 4 * width * min(self.T, eager_logprob.TILE_ELEMENTS // width)

    @property
    def slice_up(self) -> int:
        """A slice of the head in float32."""
        columns = min(self.model.vocab_size, eager_logprob.SLICE_COLUMNS)
        return 0 if self.c == 4 else 4 * self.model.hidden_size * columns

    # Moments of the phases -------------------------------------------------------------------------------------

    def load(self) -> list[Items]:
        """Units are made one after another, their buffers freed at once; then their shards are filled."""
        weights = {name: size for name, size in self.held.items() if name == "weights"}
        both = {name: size for name, size in self.held.items() if name in ("weights", *FROZEN)}
        buffer = self.c * max(self.layout.whole)
        return [
            weights | {"gather buffers": 0 if self.is_master else buffer},
            both | {"gather buffers": 0 if self.reference_is_master or weights == both else buffer},
            both | {"I/O tensors": 0 if self.cuda else self.passing},
        ]

    def rollout(self) -> list[Items]:
        """The whole model in the compute dtype, and a prefill of many tokens or the draw of one token each."""
        settings, grpo, evaluate = self.config.rollout, self.config.grpo, self.config.evaluate
        sampled = -(-grpo.prompts_per_step // self.num_ranks) * grpo.num_generations
        sequences = max(sampled, EVALUATED_TASKS * evaluate.num_samples)
        sequences = min(sequences, settings.concurrency or sequences)
        tokens = min(PREFILL_TOKENS, sequences * settings.max_trajectory_tokens)
        whole = {
            "KV blocks": int(float(settings.kv_memory) * 2**30),
            "gather buffers": self.gathered(self.model.num_hidden_layers),
        }
        draw = {
            "activations": self.decode_pieces(sequences) if self.cuda else 0,
            "logits chunk": self.draw(sequences, truncates=evaluate.top_p < 1),
        }
        return [self.held | whole | {"activations": self.forward_work(tokens)}, self.held | whole | draw]

    def draw(self, sequences: int, *, truncates: bool) -> int:
        """Logits, and on a CPU the chunk of them that is drawn from: three copies, and where it truncates sums."""
        logits = sequences * self.model.vocab_size
        if self.cuda:
            return self.c * logits
        chunk = min(logits, max(eager_sampling.CHUNK_LOGITS, self.model.vocab_size))
        return self.c * logits + (33 if truncates else 12) * chunk + 12 * self.model.vocab_size

    def decode_pieces(self, sequences: int) -> int:
        """What decoding leaves to be joined, of half as many rows again: in float32, a piece for each split."""
        splits = len(split_edges(self.config.rollout.max_trajectory_tokens))
        return 6 * sequences * splits * self.model.num_attention_heads * (self.model.head_size + 1)

    def logprobs(self) -> list[Items]:
        """A forward pass without a graph: of a frozen model, or of the policy where there is none."""
        reference = any(name in self.held | self.host for name in FROZEN)
        hidden = self.c * self.T * self.model.hidden_size
        two, root = (self.gathered(blocks, reference) for blocks in (min(2, self.model.num_hidden_layers), 0))
        return [
            self.held | {"gather buffers": two, "activations": self.forward_work(self.T)},
            self.held | {"gather buffers": root, "activations": hidden, "logits chunk": self.head_forward},
        ]

    def update(self) -> list[Items]:
        """From the start of the backward pass to the update, beside the gradients of earlier micro-batches."""
        model, c = self.model, self.c
        layers, stream = model.num_hidden_layers, c * self.T * model.hidden_size
        table = c * model.vocab_size * model.hidden_size  # of the head, or of the embedding
        root, block = c * self.layout.whole[0], c * self.layout.whole[1]  # whole gradients
        if self.lends and not model.tie_word_embeddings:
            root -= table
        head = 0 if self.lends else table
        table_up = 4 * model.vocab_size * model.hidden_size if self.lends and not self.cuda else 0  # as in added
        tied = head if model.tie_word_embeddings else 0  # until it is added to the embedding's
        keeps_blocks = not self.config.optimizer.reshard_after_forward
        sums = min(2, self.layout.num_copies)  # under way at a time: over the shards, and over the copies
        moments = [
            {
                "gather buffers": self.gathered(layers if keeps_blocks else 1),
                "activations": layers * self.kept + self.norm,
                "logits chunk": self.head_backward,
            }
        ]
        for done in range(min(3, layers)):  # blocks whose backward pass is over
            left = layers - done
            under_way = head + min(done, sums) * self.flat(1)
            for activations, gradients in self.block_backward:
                moments.append(
                    {
                        "gather buffers": self.gathered(left if keeps_blocks else min(2, left)),
                        "reduce buffers": under_way + gradients,
                        "activations": (left - 1 + self.recompute) * self.kept + activations,
                    }
                )
            if done:  # the gradients of the block before are collected, after the sum of the one before that
                moments.append(
                    {
                        "gather buffers": self.gathered(left if keeps_blocks else 1),
                        "reduce buffers": under_way + block + (self.added if done > 1 or self.lends else 0),
                        "activations": left * self.kept + stream,
                    }
                )
        moments += [
            {
                "gather buffers": self.gathered(1),
                "reduce buffers": root + block + max(tied, self.added) + min(sums, layers - 1) * self.flat(1),
                "activations": stream,
            },
            {"gather buffers": self.gathered(0), "reduce buffers": root + block + min(sums, layers) * self.flat(1)},
            {"reduce buffers": root + self.flat(0) + min(sums, layers) * self.flat(1) + table_up},
            {"update copies": self.update_copies},
        ]
        return [self.held | {"gradients": self.gradients} | moment for moment in moments]

    @property
    def update_copies(self) -> int:
        """bfloat16 moments in float32, chunk by chunk."""
        rounded = self.config.optimizer.moments_dtype == "bfloat16"
        return 2 * 4 * min(CHUNK, max(self.layout.part)) if rounded else 0
