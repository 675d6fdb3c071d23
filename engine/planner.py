"""Bytes on each rank, phase by phase and item by item, counted before anything is launched.

    plan = plan_memory(config, num_ranks=8, device_type="cuda")
    Console().print(plan.table())

A phase takes what its fullest moment takes, and a moment is a sum of items. What the units weigh is asked of the model,
sharded on the meta device; what passes through a block follows engine/model.py and the kernels, a formula a line.
Batches count as full, and as several a step: each begins beside the gradients of those before.

Legend: T tokens of a micro-batch; c and r bytes of an element in the compute and in the reduce dtype; "queries" and
"keys" are the channels of all query heads and of all key heads.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table

from ..kernels.dispatch import implementation
from ..kernels.eager import CHUNK_ELEMENTS, MIN_CHUNK_ROWS
from ..kernels.logprob import CHUNK_COLUMNS, SLICE_COLUMNS
from .config import Config, ModelConfig
from .mesh import Mesh
from .model import Model
from .optim import CHUNK
from .shard import ShardedModel

Items = dict[str, int]

PHASES = ("load", "rollout", "log-probabilities", "update", "checkpoint")
ITEMS = (
    *("weights", "moments", "reference", "gradients", "gather buffers", "reduce buffers"),
    *("activations", "logits chunk", "update copies", "KV blocks", "snapshot", "I/O tensors"),
)
PREFILL_TOKENS = 4096  # of one step of rollout.Sampler


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
        config: ``config.model`` is the shape, whatever its ``folder`` says.
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
        "checkpoint": [rank.held | {"I/O tensors": rank.passing}],  # the export makes one whole after another
    }
    found = []
    for name in PHASES:
        if name in phases:
            fullest = max(moments[name], key=lambda items: sum(items.values()))
            host = {k: v for k, v in rank.host.items() if name != "load" or k in ("weights", "reference")}
            if name in ("load", "checkpoint") and rank.cuda:
                host["I/O tensors"] = rank.passing
            found.append(Phase(name, {k: v for k, v in fullest.items() if v}, host))
    return Plan(tuple(found), num_ranks, device_type)


def compute_bytes(config: Config, device_type: str) -> int:
    """Bytes of an element in the dtype that ``optimizer.compute_dtype`` means on a device."""
    name = config.optimizer.compute_dtype
    return 2 if name == "bfloat16" or (name == "auto" and device_type == "cuda") else 4


class _Layout(NamedTuple):
    """Elements of the units, the root first, whole and of one shard; of the two largest parameters and of a block's."""

    whole: tuple[int, ...]
    part: tuple[int, ...]
    two_largest: int
    largest_in_block: int
    num_shards: int
    norms_heads: bool


@lru_cache(maxsize=64)
def _layout(model: ModelConfig, num_ranks: int, shard_size: int) -> _Layout:
    mesh = Mesh(world_size=num_ranks, shard_size=shard_size, device=torch.device("meta"))
    with torch.device("meta"):
        shards = ShardedModel(Model(model), mesh).shards
    part = tuple(shard.data.numel() for shard in shards)
    slots = [[slot.numel for slot in shard.slots] for shard in shards]
    two_largest = sum(sorted(itertools.chain(*slots))[-2:])
    norms_heads = any("q_norm" in slot.name for slot in shards[1].slots)
    whole = tuple(numel * mesh.shard_size for numel in part)
    return _Layout(whole, part, two_largest, max(slots[1]), mesh.shard_size, norms_heads)


class _Rank:
    """The items of one rank, then the moments of each phase."""

    def __init__(self, config: Config, num_ranks: int, device_type: str, phases: Sequence[str]) -> None:
        settings, self.model, self.config = config.optimizer, config.model, config
        self.layout = _layout(dataclasses.replace(config.model, folder=""), num_ranks, config.run.shard_size)
        self.num_ranks, self.cuda = num_ranks, device_type == "cuda"
        self.gloo = not self.cuda and self.layout.num_shards > 1  # gloo copies what it gathers and scatters
        self.T = settings.tokens_per_microbatch
        self.c = compute_bytes(config, device_type)
        self.r = self.c if settings.reduce_dtype == "compute" else 4
        self.recompute = settings.activation_checkpointing == "block"
        self.late = not settings.reduce_every_microbatch
        # As in engine/unit.py: the shard serves as the gathered buffer, and in a world of one as the flat gradient.
        self.is_master = self.layout.num_shards == 1 and self.c == 4 and settings.offload != "all"
        self.is_alone = self.is_master and num_ranks == 1
        self.reference_is_master = self.layout.num_shards == 1 and settings.offload == "none"
        elements, copies = sum(self.layout.part), num_ranks // self.layout.num_shards
        state = {"weights": 4 * elements}  # master, float32
        if "update" in phases:
            state["moments"] = 2 * elements * (2 if settings.moments_dtype == "bfloat16" else 4)
        # Copies of the model take turns by unit to save them (engine/checkpoint.py), the first one gets the root.
        saved = sum(self.layout.part[::copies]) * sum(state.values()) // elements
        reference = {"reference": self.c * elements if config.grpo.beta and "log-probabilities" in phases else 0}
        resident = {"none": state | reference, "reference": state, "all": {}}[settings.offload]
        snapshot = {"snapshot": saved} if "checkpoint" in phases else {}  # kept from one save to the next
        self.host = {k: v for k, v in (state | reference).items() if k not in resident and v} | snapshot
        kv_blocks = int(config.rollout.kv_memory_gib * 2**30) if "rollout" in phases else 0
        self.held = resident | {"KV blocks": kv_blocks}  # from the load to the end

    # What the units take ---------------------------------------------------------------------------------------

    def gathered(self, blocks: int, under_way: int, reference: bool = False) -> int:
        """The root and so many blocks whole, in the compute dtype; nothing where the shards themselves serve.

        gloo's copies beside them: of the one block that is under way while another computes, or of any two units.
        """
        if self.reference_is_master if reference else self.is_master:
            return 0
        whole = self.layout.whole
        copies = (0, whole[1], sum(sorted(whole)[-2:]))[under_way] if self.gloo else 0
        offloaded = self.config.optimizer.offload in (("reference", "all") if reference else ("all",))
        staged = 4 * self.layout.part[1] if self.cuda and offloaded else 0  # a shard comes over before it is cast
        return self.c * (whole[0] + blocks * whole[1] + copies) + staged

    @property
    def gradients(self) -> int:
        """What lasts over micro-batches, in float32: this rank's shards, or whole while the sum is put off."""
        return 4 * sum(self.layout.whole if self.late and not self.is_alone else self.layout.part)

    def flat(self, unit: int) -> int:
        """A unit's gradient of this backward pass, whole; where the lasting one is whole and float32 it serves."""
        in_place = self.is_alone or (self.late and self.c == 4)
        return 0 if in_place else self.c * self.layout.whole[unit]

    def reducing(self, unit: int) -> int:
        """A sum over the ranks under way: the whole gradient in the reduce dtype, this rank's part, and copies."""
        if self.is_alone:
            return 0
        whole, part = self.layout.whole[unit], self.layout.part[unit]
        lasting = self.late and self.r == 4  # the whole gradient is the lasting one
        total = (0 if lasting else self.r * whole) + (self.r * part if self.layout.num_shards > 1 else 0)
        # Adding bfloat16 to float32 makes a float32 copy on a CPU: of the whole when it is put off, else of the part.
        added = 0 if self.cuda else 4 * whole if self.late and self.c != 4 else 4 * part if self.r != 4 else 0
        return total + max(added, self.r * whole if self.gloo else 0)

    @property
    def passing(self) -> int:
        """A model is read and written tensor by tensor, each still there when the next one comes: float32."""
        return 4 * self.layout.two_largest

    # What passes through a block -------------------------------------------------------------------------------

    @property
    def saved(self) -> int:
        """What autograd keeps of one block."""
        model, c = self.model, self.c
        queries = model.num_attention_heads * model.head_size
        keys = model.num_key_value_heads * model.head_size
        norms = 2 * (4 + c) * model.hidden_size  # each its float32 input and its output, which the projections keep
        if not self.cuda:
            norms += 2 * 4 * model.hidden_size  # in steps, not fused: the normalised values too
        if implementation("cuda" if self.cuda else "cpu", "packed_attention") == "flash-attn":
            attention = c * (2 * queries + 2 * keys)  # q, k, v and the output
        else:
            attention = c * 5 * queries  # keys and values repeated for each query head; the output padded and packed
        attention += 4 * model.num_attention_heads  # log-sum-exp of each row
        if self.layout.norms_heads:
            attention += (4 if self.cuda else 8) * (queries + keys)  # Qwen3: of each head, kept as the other norms
        swiglu = c * 4 * model.intermediate_size  # gate, silu(gate), up, product
        return self.T * (norms + attention + swiglu)

    @property
    def kept(self) -> int:
        """What stays of a block between its forward and its backward pass: all of it, or its input alone."""
        return self.T * self.c * self.model.hidden_size if self.recompute else self.saved

    @property
    def backward_work(self) -> int:
        """Gradients within a block when most of them exist, beside what autograd has not yet let go."""
        model, c = self.model, self.c
        inner = 2 * c * model.intermediate_size * self.T  # of product, silu(gate) and up, less the product itself
        outer = 2 * c * model.hidden_size * self.T  # of the block's output and of the sum before it
        return inner + outer + c * self.layout.largest_in_block  # one matrix's gradient on its way to the flat one

    def forward_work(self, tokens: int) -> int:
        """Tensors of a block that live at once in a forward pass without a graph."""
        model, c = self.model, self.c
        queries = model.num_attention_heads * model.head_size
        keys = model.num_key_value_heads * model.head_size
        swiglu = c * (2 * model.hidden_size + 3 * model.intermediate_size)  # stream, normalised; silu, up, product
        attention = c * (2 * model.hidden_size + 5 * queries + 4 * keys)  # q, k, v, padded, repeated; output
        return tokens * max(swiglu, attention)

    @property
    def head_forward(self) -> int:
        """Log-probabilities: logits of a slice of the rows; in Triton sums of slices of the vocabulary."""
        model, T = self.model, self.T
        if self.cuda:
            return 16 * T * -(-model.vocab_size // SLICE_COLUMNS)
        up = 0 if self.c == 4 else 4 * model.vocab_size * model.hidden_size  # the head in float32
        first, second = self.chunks
        return up + max(2 * first, first + 2 * second)  # logits and their log-softmax; the one before is still there

    @property
    def chunks(self) -> tuple[int, int]:
        """Logits in float32 of the first and of the second slice of rows, as kernels/eager.py cuts them."""
        row = 4 * self.model.vocab_size
        rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // self.model.vocab_size)
        return row * min(self.T, rows), row * max(0, min(self.T - rows, rows))

    @property
    def head_backward(self) -> int:
        """The same with gradients: of the head, of its input, and of a chunk of logits."""
        model, c, T = self.model, self.c, self.T
        head = model.vocab_size * model.hidden_size
        if self.cuda:  # input rows chosen and their gradient in float32, twice while it is added to
            return c * head + T * model.hidden_size * (4 + 4 + c) + c * T * min(CHUNK_COLUMNS, model.vocab_size)
        casts = 0 if c == 4 else (4 + c) * head  # the head in float32, and its gradient cast back
        first, second = self.chunks
        logits = max(4 * first, 3 * first + 2 * second)  # with their slope and gradient; likewise
        return 4 * head + casts + c * T * model.hidden_size + logits

    # Moments of the phases -------------------------------------------------------------------------------------

    def load(self) -> list[Items]:
        """Units are made one after another, their buffers freed at once; then whole tensors come one by one."""
        held = {name: size for name, size in self.held.items() if name in ("weights", "reference")}
        buffered = not (self.is_master and (self.reference_is_master or "reference" not in held))
        made = {"gather buffers": self.c * max(self.layout.whole) if buffered else 0}
        return [held | made, held | ({} if self.cuda else {"I/O tensors": self.passing})]

    def rollout(self) -> list[Items]:
        """The whole model in the compute dtype, and a prefill of many tokens or the draw of one token each."""
        settings, model = self.config.rollout, self.model
        sequences = -(-self.config.grpo.prompts_per_step // self.num_ranks) * self.config.grpo.num_generations
        sequences = min(sequences, settings.concurrency or sequences)
        tokens = min(max(PREFILL_TOKENS, settings.max_trajectory_tokens), sequences * settings.max_trajectory_tokens)
        a_logit = 20 if settings.top_p == 1 else 36  # logits, log-probabilities, chances, a float64 sum; or sorted too
        layers = model.num_hidden_layers
        whole = self.held | {"gather buffers": self.gathered(layers, 0)}
        prefill = {"activations": self.forward_work(tokens)}
        draw = {"logits chunk": a_logit * sequences * model.vocab_size}
        return [self.held | {"gather buffers": self.gathered(layers, 2)}, whole | prefill, whole | draw]

    def logprobs(self) -> list[Items]:
        """A forward pass without a graph: of the reference, or of the policy where there is none."""
        reference = bool(self.config.grpo.beta)
        hidden = self.c * self.T * self.model.hidden_size
        two = min(2, self.model.num_hidden_layers)
        root = self.gathered(0, 0, reference)
        moments = [
            {"gather buffers": self.gathered(two, 2, reference)},
            {"gather buffers": self.gathered(two, two - 1, reference), "activations": self.forward_work(self.T)},
            {"gather buffers": root, "activations": hidden, "logits chunk": self.head_forward},
        ]
        return [self.held | moment for moment in moments]

    def update(self) -> list[Items]:
        """From the start of the backward pass to the update, beside the gradients of earlier micro-batches."""
        layers, c, T = self.model.num_hidden_layers, self.c, self.T
        held = self.held | {"gradients": self.gradients}
        last_norm = T * self.model.hidden_size * (4 + c + (0 if self.cuda else 4))
        embedding = c * self.model.vocab_size * self.model.hidden_size
        tied = embedding if self.model.tie_word_embeddings else 0  # the head's gradient waits for the embedding's
        keeps_blocks = not self.config.optimizer.reshard_after_forward
        moments = [
            {
                "gather buffers": self.gathered(layers if keeps_blocks else 1, 0 if keeps_blocks else 1),
                "reduce buffers": self.flat(0),
                "activations": layers * self.kept + last_norm,
                "logits chunk": self.head_backward,
            }
        ]
        for done in range(min(3, layers)):  # blocks whose backward pass is over
            left = layers - done
            two = min(2, left)
            whole = {
                "gather buffers": self.gathered(left, 0) if keeps_blocks else self.gathered(two, two - 1),
                "activations": left * self.kept + tied,
            }
            under_way = self.flat(0) + self.flat(1) + (self.reducing(1) if done else 0)
            work = self.backward_work + (self.saved if self.recompute else 0)
            moments.append(whole | {"reduce buffers": under_way, "activations": whole["activations"] + work})
            if done and self.c != self.r:  # the block before is cast when the next one's gradient has its memory
                cast = self.flat(0) + 2 * self.flat(1) + self.reducing(1)
                moments.append(whole | {"reduce buffers": cast})
        moments += [
            {
                "gather buffers": self.gathered(1, 0),
                "reduce buffers": self.flat(0) + self.flat(1) + self.reducing(1),
                "activations": embedding + tied + T * c * self.model.hidden_size,
            },
            {"reduce buffers": self.flat(0) * (self.c != self.r) + self.reducing(0) + self.reducing(1)},
            {"update copies": self.update_copies},
        ]
        return [held | moment for moment in moments]

    @property
    def update_copies(self) -> int:
        """bfloat16 moments in float32, of one chunk and of the one before."""
        rounded = self.config.optimizer.moments_dtype == "bfloat16"
        return 4 * 4 * min(CHUNK, max(self.layout.part)) if rounded else 0
