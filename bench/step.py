"""A whole GRPO step of ours beside TRL's GRPOTrainer with transformers' generation, on the same weights and prompts.

    python -m groupwise.bench.step [--shapes 4x256x768x8x2x2048x4x8x64x96] [--out FILE]

A shape is layers x hidden x intermediate x query heads x key heads x vocabulary x prompts x completions of each x
tokens of a prompt x tokens of a completion. A step samples the completions, which never end early, rewards each by its
even ids, scores them by a frozen reference (beta 0.04) and makes one update (DAPO's mean over tokens, clipped
AdamW). Float32 on a CPU; on a GPU bfloat16 products with float32 master weights. TRL's own loop runs, and after each
of its steps ours takes a step on the same prompts. Before that the two must agree: on the completions of TRL's first
step, our rewards, advantages, reference and loss must give its loss and its gradient norm.

``speedup`` is TRL's time over ours. ``generate_share`` to ``update_share`` are the phases' shares of our step, and
``trl_generate_share`` to ``trl_update_share`` of TRL's, where all that is not another phase counts as update.
``generate_speedup`` to ``update_speedup`` compare them. ``share_of_limit`` is the arithmetic of a step, each
prompt once, at the rate of the faster large product of the same run, over our time. ``ours_peak_mib`` and
``trl_peak_mib`` are what each side's first steps take at their peak in a process of its own, beside what it held with
all libraries loaded; ``memory_ratio`` is ours over TRL's.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from groupwise.bench import common
from groupwise.bench.sampler import BLOCK_SIZE, NoText, block_bytes, products
from groupwise.bench.train import PRODUCT, compute_dtype, model_config
from groupwise.engine import AdamW, Mesh, Model, ShardedModel
from groupwise.engine.batch import Example, pack
from groupwise.engine.config import ModelConfig
from groupwise.engine.hf import load_weights, save_hf
from groupwise.engine.metrics import Timer, peak_memory_gib
from groupwise.engine.objective import count, group_advantages, policy_loss, weigh
from groupwise.engine.reference import Reference
from groupwise.engine.step import Update, optimise
from groupwise.kernels.linear import ROWS
from groupwise.rollout.sampler import Sampler, SamplingParams

GPU_SHAPES = [(28, 1536, 8960, 12, 2, 151936, 4, 8, 64, 96)]
CPU_SHAPES = [(4, 256, 768, 8, 2, 2048, 4, 8, 64, 96)]
PHASES = ("generate", "reward", "reference", "update")
BETA, CLIP, LR, MAX_NORM = 0.04, 0.2, 1e-5, 1.0
MICROBATCH = 2048  # tokens: large enough for the products' full rate, and more would only hold more activations
WARM = 2  # steps of each that do not count; TRL's first is the one that both must agree on
MEMORY_STEPS = 3
# How far loss and gradient norm may be apart, as a share.
TOLERANCES = {"cpu": 1e-3, "cuda": 2e-2}

Ids = list[list[int]]
Reward = Any


def even_ids(completion_ids: Ids, **_: Any) -> list[float]:
    """The reward of both sides."""
    return [float(sum(token % 2 == 0 for token in ids)) for ids in completion_ids]


def random_prompts(shape: tuple[int, ...], step: int) -> Ids:
    vocab, prompts, _, length, _ = shape[5:]
    return torch.randint(vocab, (prompts, length), generator=torch.Generator().manual_seed(step)).tolist()


def repeated(prompts: Ids, shape: tuple[int, ...]) -> Ids:
    """Each prompt as often as it has completions."""
    return [prompt for prompt in prompts for _ in range(shape[7])]


def config_of(shape: tuple[int, ...]) -> ModelConfig:
    return model_config((*shape[:6], shape[8] + shape[9]))


class Ours:
    """A policy in training, made of the parts that ``recipes/grpo.py`` is made of."""

    def __init__(self, shape: tuple[int, ...], mesh: Mesh, folder: Path) -> None:
        self.shape, self.mesh = shape, mesh
        with torch.device("meta"):
            policy, reference = Model(config_of(shape)), Model(config_of(shape))
        self.policy = ShardedModel(policy, mesh, compute_dtype=compute_dtype(mesh))
        self.reference = Reference(reference, mesh, compute_dtype(mesh))
        load_weights(self.policy, folder / "policy")
        load_weights(self.reference.sharded, folder / "reference")
        self.optimizer = AdamW(self.policy.shards, lr=LR)
        prompts, completions, length, new = shape[6:]
        blocks = prompts * completions * (-(-(length + new) // BLOCK_SIZE) + 1) + 1
        kv_memory = blocks * block_bytes(policy) / 2**30
        self.sampler = Sampler(policy, NoText(shape[5]), kv_memory=kv_memory, block_size=BLOCK_SIZE)

    def step(self, prompts: Ids, seed: int, timer: Timer) -> Update:
        """One step of training from prompts alone."""
        prompts = repeated(prompts, self.shape)
        params = SamplingParams(max_tokens=self.shape[9], seed=seed)
        with timer("generate"):
            with self.policy.gathered():
                completions = self.sampler.generate(prompts, params)
            self.sampler.flush()
        ids, logprobs = [done.token_ids for done in completions], [done.logprobs for done in completions]
        check_lengths(ids, self.shape)
        return self.learn(prompts, ids, logprobs, timer)

    def learn(self, prompts: Ids, completions: Ids, logprobs: Sequence[list[float]], timer: Timer) -> Update:
        """Rewards, reference and update for the completions of each prompt, which lie one after another."""
        size = self.shape[7]
        with timer("reward"):
            rewards = torch.tensor(even_ids(completions), dtype=torch.float64).view(-1, size)
            advantages = torch.cat([group_advantages(group) for group in rewards]).tolist()
            examples = [
                Example(
                    token_ids=prompt + completion,
                    loss_mask=[0.0] * len(prompt) + [1.0] * len(completion),
                    advantage=advantage,
                    old_logprobs=[0.0] * len(prompt) + logprob,
                    group=number // size,
                )
                for number, (prompt, completion, logprob, advantage) in enumerate(
                    zip(prompts, completions, logprobs, advantages, strict=True)
                )
            ]
            weigh(examples, count(examples).summed(self.mesh))
            batches = pack(examples, MICROBATCH, self.mesh.device, ROWS)
        with timer("reference"):
            for batch in batches:
                batch.ref_logprob = self.reference.logprobs(batch)
        with timer("update"):
            loss_fn = partial(policy_loss, clip_low=CLIP, clip_high=CLIP, beta=BETA)
            return optimise(
                self.policy, self.optimizer, batches, loss_fn, mesh=self.mesh, lr=LR, max_grad_norm=MAX_NORM
            )


def make_trainer(
    shape: tuple[int, ...], device: str, folder: Path, steps: int, reward: Reward, callbacks: Sequence[Any] = ()
) -> GRPOTrainer:
    """TRL's trainer for so many steps; it keeps activations, as ours does, which is its faster way."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of what TRL calls in transformers
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    model.config._name_or_path = str(folder / "reference")  # from which it loads its reference
    prompts = [prompt for step in range(steps) for prompt in random_prompts(shape, step)]
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=shape[6] * shape[7],
        num_generations=shape[7],
        max_completion_length=shape[9],
        generation_kwargs={"min_new_tokens": shape[9]},
        loss_type="dapo",
        beta=BETA,
        epsilon=CLIP,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_NORM,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model,
        reward,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": [" ".join(map(str, prompt)) for prompt in prompts]}),
        processing_class=tokenizer(shape[5]),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def tokenizer(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """Each id is its own word. The end is an id that the model does not have, so no completion ends early."""
    words = {str(token): token for token in range(vocab)} | {"<end>": vocab}
    own = Tokenizer(WordLevel(words, unk_token="<end>"))
    own.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", pad_token="<end>")


def time_phases(trainer: GRPOTrainer, turns: Turns) -> None:
    """Has the trainer's generation, rewards and reference timed."""

    def timed(method: Callable[..., Any], phase: str, applies: Callable[..., bool]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with turns.timer(phase) if applies(*args) else nullcontext():
                return method(*args, **kwargs)

        return run

    methods: Any = trainer  # each is replaced on this one object
    methods._generate = timed(trainer._generate, "generate", lambda *_: True)
    methods._calculate_rewards = timed(trainer._calculate_rewards, "reward", lambda *_: True)
    methods._get_per_token_logps_and_entropies = timed(
        trainer._get_per_token_logps_and_entropies, "reference", lambda model, *_: model is trainer.ref_model
    )


class Turns(transformers.TrainerCallback):
    """After each step of TRL's ours takes one; on the first of TRL's both must agree.

    Attributes:
        timer: phases of TRL's step under way.
        seconds: of each step of each side, by phase.
    """

    def __init__(self, ours: Ours) -> None:
        self._ours, self._device = ours, ours.mesh.device
        self._completions: Ids = []
        self._begin = 0.0
        self.timer = Timer(self._device)
        self.seconds: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}

    def reward(self, completion_ids: Ids, **_: Any) -> list[float]:
        """TRL's reward function; it is shown the completions in the order of the prompts."""
        self._completions = completion_ids
        return even_ids(completion_ids)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin = self._now()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end of a step of TRL's, whose record is in ``kwargs``."""
        logs: dict[str, float] = kwargs["logs"]
        if "grad_norm" not in logs:  # the record of the whole run
            return
        self._keep("trl", self.timer)
        check_lengths(self._completions, self._ours.shape)
        prompts = random_prompts(self._ours.shape, state.global_step - 1)
        if state.global_step == 1:
            check_agreement(self._ours, prompts, self._completions, logs)
        timer = Timer(self._device)
        self._begin = self._now()
        self._ours.step(prompts, state.global_step, timer)
        self._keep("ours", timer)
        self.timer = Timer(self._device)
        self._begin = self._now()

    def _keep(self, side: str, timer: Timer) -> None:
        whole = self._now() - self._begin
        seconds = timer.seconds
        known = {phase: seconds[phase] for phase in PHASES[:-1]}
        self.seconds[side].append({"step": whole, **known, "update": whole - sum(known.values())})

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def check_lengths(completions: Ids, shape: tuple[int, ...]) -> None:
    lengths = [len(ids) for ids in completions]
    if lengths != [shape[9]] * (shape[6] * shape[7]):
        sys.exit(f"step: {len(lengths)} completions of {sorted(set(lengths))} tokens, expected {shape[9]} each")


def check_agreement(ours: Ours, prompts: Ids, completions: Ids, theirs: dict[str, float]) -> None:
    """Stop unless our loss and gradient norm for these completions are TRL's."""
    silent = [[0.0] * len(ids) for ids in completions]  # no figure of these depends on the sampler
    update = ours.learn(repeated(prompts, ours.shape), completions, silent, Timer())
    for name, found, true in (
        ("loss", update.loss, theirs["loss"]),
        ("gradient norm", update.grad_norm, theirs["grad_norm"]),
    ):
        if not abs(found - true) <= TOLERANCES[ours.mesh.device.type] * abs(true):
            sys.exit(f"step: the {name} of the first step is {found}, that of TRL {true}")


def arithmetic(shape: tuple[int, ...]) -> float:
    """Floating-point operations of a step, each prompt once: passes of generation and reference, three of the update.

    Sampling a token takes as much as its forward pass; 2 a token and weight, 4 D a head and pair of attention.
    """
    layers, hidden, intermediate, query_heads, key_heads, vocab, prompts, samples, length, new = shape
    size = hidden // query_heads
    matrices = layers * (2 * hidden * size * (query_heads + key_heads) + 3 * hidden * intermediate)
    drawn = prompts * samples * new
    pairs = prompts * (length * (length + 1) / 2 + samples * new * (length + (new + 1) / 2))
    forward = 2 * matrices * (prompts * length + drawn) + 2 * hidden * vocab * drawn
    return 5 * (forward + 4 * layers * query_heads * size * pairs)


def peak_mib(side: str, shape: tuple[int, ...], device: str, folder: Path) -> float:
    """Memory of a side's first steps at their peak, beside what the libraries take; for a process of its own."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now (man 5 proc)
    with make_mesh(device) as mesh:
        before = peak_memory_gib(mesh.device)
        if side == "trl":
            make_trainer(shape, device, folder, MEMORY_STEPS, even_ids).train()
        else:
            ours = Ours(shape, mesh, folder)
            for number in range(MEMORY_STEPS):
                ours.step(random_prompts(shape, number), number, Timer())
        return (peak_memory_gib(mesh.device) - before) * 1024


def make_mesh(device: str) -> Mesh:
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return Mesh.create()


def measure(shape: tuple[int, ...], args: Namespace) -> common.Row:
    with tempfile.TemporaryDirectory() as name, make_mesh(args.device) as mesh:
        folder = Path(name)
        for seed, kind in enumerate(("reference", "policy")):  # not the same, so that there is a divergence
            model = Model(config_of(shape))
            model.init_weights(seed)
            save_hf(model, folder / kind)
        del model
        memory = {}
        for side in ("ours", "trl"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[side] = pool.apply(peak_mib, (side, shape, args.device, folder))
        turns = Turns(Ours(shape, mesh, folder))
        trainer = make_trainer(shape, args.device, folder, WARM + args.repeats, turns.reward, [turns])
        time_phases(trainer, turns)
        trainer.train()
        rates = common.in_turns(products(args.device), [(torch.zeros(0, device=mesh.device),)], 9)
    ours, trl = (
        {phase: statistics.median(each[phase] for each in steps[WARM:]) * 1e3 for phase in ("step", *PHASES)}
        for steps in turns.seconds.values()
    )
    flops_a_ms = 2 * PRODUCT[args.device] ** 3 / min(ms for name, ms in rates.items() if name != "copy")
    return {
        "layers x H x I x Hq x Hkv x V": "x".join(map(str, shape[:6])),
        "prompts x completions": f"{shape[6]}x{shape[7]}",
        "prompt + completion": f"{shape[8]} + {shape[9]}",
        "ours_ms": ours["step"],
        "trl_ms": trl["step"],
        "speedup": trl["step"] / ours["step"],
        **{f"{phase}_share": ours[phase] / ours["step"] for phase in PHASES},
        **{f"trl_{phase}_share": trl[phase] / trl["step"] for phase in PHASES},
        **{f"{phase}_speedup": trl[phase] / ours[phase] for phase in PHASES},
        "share_of_limit": arithmetic(shape) / flops_a_ms / ours["step"],
        **{f"{side}_peak_mib": peak for side, peak in memory.items()},
        "memory_ratio": memory["ours"] / memory["trl"],
    }


def main() -> None:
    args = common.arguments(__doc__, repeats=(5, 7))
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    common.report("step", [measure(shape, args) for shape in shapes], args)


if __name__ == "__main__":
    main()
