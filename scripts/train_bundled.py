"""Train the bundled pair: a tokenizer, a target that tolerates skipped sub-layers, and a draft distilled from it.

Owns the whole recipe, from the dialogue files to two ordinary Hugging Face checkpoints and their model card.
Knows nothing of the foredraft runtime. Every stage is resumable: an interrupted run goes on from its last checkpoint.

    python scripts/train_bundled.py --data ../shared/data --runs runs/bundled --out src/foredraft/bundled

On a CPU, keep glibc from returning memory to the system between steps (20 % faster):

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 python scripts/train_bundled.py
"""

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END_OF_DIALOGUE, END_OF_TURN = "<|endoftext|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] | trim }}<|end|>\n"
    "{% else %}User: {{ message['content'] | trim }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model's shape and schedule; a batch is `tokens_per_step / seq_len` rows."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    peak_lr: float
    steps: int
    tokens_per_step: int = 4096
    warmup: int = 60
    weight_decay: float = 0.1
    min_lr_ratio: float = 0.03
    short_len: int = 256
    long_len: int = 1024
    long_share: float = 0.15  # the last part of the schedule, at the full context

    def seq_len(self, step: int) -> int:
        return self.long_len if step >= self.steps * (1 - self.long_share) else self.short_len

    def lr(self, step: int) -> float:
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))

    def model(self) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=self.hidden_size,
                num_hidden_layers=self.num_layers,
                intermediate_size=self.intermediate_size,
                num_attention_heads=self.num_heads,
                num_key_value_heads=self.num_kv_heads,
                max_position_embeddings=self.long_len,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )


TARGET = Recipe(256, 12, 704, 4, 2, peak_lr=2.5e-3, steps=1800)
OWN_TEXT_WEIGHT = 4  # how often the draft sees the target's own text for each time it sees a dialogue
DRAFT = Recipe(256, 1, 768, 4, 1, peak_lr=4e-3, steps=1400)  # one layer: at this size a layer's price is its calls


# --- data -----------------------------------------------------------------------------------------------------------


def read_dialogues(path: Path) -> list[str]:
    """The dialogues of one file, assistant turns closed by the end-of-turn token."""
    text = gzip.open(path, "rt", encoding="utf-8").read()
    return ["\n".join(map(close_turn, block.splitlines())) for block in text.strip().split("\n\n")]


def close_turn(line: str) -> str:
    return line + END_OF_TURN if line.startswith("Assistant:") else line


def train_tokenizer(dialogues: list[str], folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_DIALOGUE, END_OF_TURN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator((d.replace(END_OF_TURN, "") for d in dialogues), trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=END_OF_DIALOGUE,
            eos_token=END_OF_DIALOGUE,
            pad_token=END_OF_DIALOGUE,
            model_max_length=TARGET.long_len,
            clean_up_tokenization_spaces=False,
        )
        fast.chat_template = CHAT_TEMPLATE
        fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: list[str]) -> list[torch.Tensor]:
    batch = tokenizer.backend_tokenizer.encode_batch([d + "\n" + END_OF_DIALOGUE for d in dialogues])
    return [torch.tensor(item.ids, dtype=torch.long) for item in batch]


def stream(dialogues: list[torch.Tensor], recipe: Recipe, start: int) -> Iterator[torch.Tensor]:
    """Batches [rows, seq_len] of packed, shuffled dialogues from step `start` on; the same for every resume."""
    step, epoch = 0, 0
    while True:
        order = random.Random(epoch).sample(range(len(dialogues)), len(dialogues))
        packed = torch.cat([dialogues[i] for i in order])
        offset = 0
        while step < recipe.steps and offset + recipe.tokens_per_step <= len(packed):
            if step >= start:
                yield packed[offset : offset + recipe.tokens_per_step].view(-1, recipe.seq_len(step))
            offset += recipe.tokens_per_step
            step += 1
        if step >= recipe.steps:
            return
        epoch += 1


# --- models ---------------------------------------------------------------------------------------------------------


class SublayerDropout:
    """Leaves whole attention and MLP outputs out of the residual stream for a step (LayerSkip, arXiv 2404.16710).

    The rate itself is drawn anew each step, so that the target serves many draft depths: half of the steps train the
    whole network, the others leave out up to `max_rate` of the upper sub-layers. The first layer always stays.
    """

    def __init__(self, model: LlamaForCausalLM, max_rate: float = 0.6) -> None:
        self.max_rate = max_rate
        self.dropped: set[tuple[int, str]] = set()
        self.layers = model.model.layers
        for index, layer in enumerate(self.layers):
            self._wrap(layer.self_attn, (index, "attn"), lambda zeros: (zeros, None))
            self._wrap(layer.mlp, (index, "mlp"), lambda zeros: zeros)

    def _wrap(self, module: torch.nn.Module, key: tuple[int, str], empty: Any) -> None:
        original = module.forward

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if key in self.dropped:
                return empty(torch.zeros_like(hidden_states))
            return original(hidden_states, *args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]

    def draw(self, step: int, warmup: int, total: int) -> None:
        rng = random.Random(step)
        self.dropped = set()
        if step < warmup or rng.random() < 0.5:
            return
        rate = self.max_rate * rng.random() * min(1.0, step / (0.3 * total))
        last = len(self.layers) - 1
        for index in range(1, last + 1):
            depth = math.sqrt(index / last) * (0.5 if index == last else 1.0)
            for kind, share in (("attn", 1.0), ("mlp", 0.8)):
                if rng.random() < rate * depth * share:
                    self.dropped.add((index, kind))


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """0.9 KL(teacher || student) + 0.1 cross-entropy, mean over the tokens; logits [N, V]."""
    kl = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)
    return 0.9 * kl + 0.1 * F.cross_entropy(logits, labels)


def shifted(model: LlamaForCausalLM, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return logits.reshape(-1, VOCAB_SIZE).float(), batch[:, 1:].reshape(-1)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, dialogues: list[torch.Tensor], device: str, tokens: int = 65_536) -> float:
    packed = torch.cat(dialogues)[:tokens].view(-1, 256).to(device)
    model.eval()
    losses = []
    with torch.autocast(device, dtype=torch.bfloat16):
        for chunk in packed.split(32):
            logits, labels = shifted(model, chunk)
            losses.append(F.cross_entropy(logits, labels).item() * len(chunk))
    model.train()
    return sum(losses) / len(packed)


@torch.no_grad()
def continuations(
    teacher: LlamaForCausalLM, dialogues: list[torch.Tensor], folder: Path, device: str, count: int = 768
) -> list[torch.Tensor]:
    """The target's own text after real openings, half greedy and half sampled: what the draft has to guess."""
    path = folder / "continuations.pt"
    if path.exists():
        return list(torch.load(path))
    model = LlamaForCausalLM(teacher.config).to(device, torch.bfloat16).eval()
    model.load_state_dict(teacher.state_dict())
    rows: list[torch.Tensor] = []
    picks = random.Random(7).sample([d for d in dialogues if len(d) > 80], count)
    for index in range(0, count, 64):
        prompt_len = random.Random(index).randrange(12, 72)
        prompts = torch.stack([d[:prompt_len] for d in picks[index : index + 64]]).to(device)
        mask, sample = torch.ones_like(prompts), (index // 64) % 2 == 1
        out = model.generate(
            input_ids=prompts, attention_mask=mask, do_sample=sample, top_k=0, min_new_tokens=256 - prompt_len,
            max_new_tokens=256 - prompt_len, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        rows += list(out.cpu())
        print(f"continuations {len(rows)}/{count}", flush=True)
    torch.save(rows, path)
    return rows


# --- training -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One resumable training run in `folder`, logged to `log.jsonl`."""

    name: str
    recipe: Recipe
    folder: Path
    device: str
    checkpoint_every: int = 250

    def train(
        self, dialogues: list[torch.Tensor], held_out: list[torch.Tensor], teacher: LlamaForCausalLM | None = None
    ) -> LlamaForCausalLM:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = self.recipe.model().to(self.device).train()
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": self.recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
            fused=True,
        )
        start = self._resume(model, optimizer)
        dropout = SublayerDropout(model) if teacher is None else None
        for step, batch in enumerate(stream(dialogues, self.recipe, start), start=start):
            if dropout:
                dropout.draw(step, 100, self.recipe.steps)
            self._step(step, batch.to(self.device), model, optimizer, teacher)
            done = step + 1
            if done % self.checkpoint_every == 0 or done == self.recipe.steps:
                if dropout:
                    dropout.dropped = set()
                self._log(done, "held_out_loss", evaluate(model, held_out, self.device))
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
                torch.save(state, self.folder / "state.tmp")
                (self.folder / "state.tmp").replace(self.folder / "state.pt")
        return model.eval()

    def _resume(self, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
        path = self.folder / "state.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"{self.name}: resumed at step {state['step']}", flush=True)
        return int(state["step"])

    def _step(
        self,
        step: int,
        batch: torch.Tensor,
        model: LlamaForCausalLM,
        optimizer: torch.optim.Optimizer,
        teacher: LlamaForCausalLM | None,
    ) -> None:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = self.recipe.lr(step)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            logits, labels = shifted(model, batch)
            if teacher is None:
                loss = F.cross_entropy(logits, labels)
            else:
                with torch.no_grad():
                    truth, _ = shifted(teacher, batch)
                loss = distillation_loss(logits, truth, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0:
            self._log(step, "loss", loss.item(), tokens_per_s=batch.numel() / (time.perf_counter() - began))

    def _log(self, step: int, key: str, value: float, **more: float) -> None:
        entry = {"run": self.name, "step": step, key: round(value, 4), **{k: round(v) for k, v in more.items()}}
        print(json.dumps(entry), flush=True)
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with sgd_*.txt.gz")
    parser.add_argument("--runs", type=Path, default=Path("runs/bundled"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=Path("src/foredraft/bundled"), help="where target/ and draft/ go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies both schedules (0.01: a dry run)")
    args = parser.parse_args()

    scaled = [Recipe(**{**asdict(r), "steps": max(8, int(r.steps * args.steps_scale))}) for r in (TARGET, DRAFT)]
    train, held_out = (read_dialogues(args.data / f"sgd_{part}.txt.gz") for part in ("train", "dev"))
    tokenizer = train_tokenizer(train, args.runs / "tokenizer")
    train_ids, held_out_ids = encode(tokenizer, train), encode(tokenizer, held_out)
    print(f"{sum(map(len, train_ids)):,} training tokens, {sum(map(len, held_out_ids)):,} held out", flush=True)

    target = Run("target", scaled[0], args.runs / "target", args.device).train(train_ids, held_out_ids)
    own = continuations(target, train_ids, args.runs, args.device)
    draft = Run("draft", scaled[1], args.runs / "draft", args.device).train(
        train_ids + OWN_TEXT_WEIGHT * own, held_out_ids, teacher=target
    )
    export(target, tokenizer, args.out / "target")
    export(draft, tokenizer, args.out / "draft")


if __name__ == "__main__":
    main()
