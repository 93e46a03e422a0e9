"""Train a small Mamba-2: the built-in one, on the sources of Python's standard library, or one on other text.

    python tools/train_reference.py --output runs/reference
    python tools/train_reference.py --output runs/headers --text FOLDER --groups 2 --head-dim 32 --hidden-size 192

Modules are held out by a hash of their name (``ghostssm.text.stdlib``), files of another text by a hash of what they
say. The folder gets the weights in bfloat16, the tokenizer, ``training.json`` with every choice and the losses,
``checkpoint.pt`` to go on from with ``--resume``, and, with ``--text``, ``calibration.txt`` (a part of the text that it
was trained on) and ``held_out.txt``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ghostssm.models.families import mixers_of
from ghostssm.models.mixer import Mixer, mixer_forward
from ghostssm.ops.conv_norm import rms_norm
from ghostssm.text.sources import read_text
from ghostssm.text.stdlib import stdlib_texts

END = "<|endoftext|>"
SAMPLE_BYTES = 4_000_000
"""Size of the texts that are written beside a model trained with ``--text``."""


def corpus(text: str | None) -> tuple[list[str], list[str]]:
    """The texts to train on and the held-out ones."""
    if text is None:
        return stdlib_texts(held_out=False, tests=True), stdlib_texts(held_out=True)
    sides: tuple[list[str], list[str]] = ([], [])
    for part in read_text(text, "calibration").parts:
        sides[hashlib.sha256(part.encode()).digest()[0] % 16 == 0].append(part)
    return sides


def write_sample(file: Path, texts: list[str]) -> None:
    """The first texts, as many as SAMPLE_BYTES hold."""
    file.write_text("\n\n".join(texts)[:SAMPLE_BYTES], encoding="utf-8")


def train_tokenizer(texts: list[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE; the end-of-text token has id 0."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one stream of ids, each closed by the end-of-text token."""
    batches = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([*batch.ids, end], dtype=np.uint16) for batch in batches])


def build_model(args: argparse.Namespace) -> transformers.Mamba2ForCausalLM:
    config = transformers.Mamba2Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        state_size=args.state_size,
        head_dim=args.head_dim,
        num_heads=2 * args.hidden_size // args.head_dim,
        expand=2,
        n_groups=args.groups,
        chunk_size=64,
        tie_word_embeddings=True,
        residual_in_fp32=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.Mamba2ForCausalLM(config)
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_(std=0.02)
        for block in model.backbone.layers:
            block.mixer.out_proj.weight /= math.sqrt(args.layers)
    return model


class Trainee(nn.Module):
    """The model's loss through our own differentiable ops, compiled block by block (every block shares one graph)."""

    def __init__(self, model: transformers.Mamba2ForCausalLM, compiled: bool):
        super().__init__()
        self.model = model
        self.mixers = mixers_of(model)
        self.block = torch.compile(self._block) if compiled else self._block
        self.head_loss = torch.compile(self._head_loss) if compiled else self._head_loss

    def _block(self, norm_weight: Tensor, mixer: Mixer, hidden: Tensor) -> Tensor:
        assert mixer.norm is not None  # of the mixer itself; the block's own has the same epsilon
        return hidden + mixer_forward(mixer, rms_norm(hidden, norm_weight, mixer.norm.eps))

    def _head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        backbone = self.model.backbone
        hidden = rms_norm(hidden, backbone.norm_f.weight, backbone.norm_f.variance_epsilon)
        logits = F.linear(hidden, self.model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss of windows (b, l + 1)."""
        return self.loss(tokens[:, :-1], tokens[:, 1:])

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the positions whose target is not -100; both (b, l)."""
        hidden = self.model.backbone.embeddings(ids)
        for block, mixer in zip(self.model.backbone.layers, self.mixers, strict=True):
            hidden = self.block(block.norm.weight, mixer, hidden)
        return self.head_loss(hidden, targets)


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a straight line to zero."""
    return min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))


def descend(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, args: argparse.Namespace
) -> None:
    """One step down the gradient of a loss, at the step's learning rate and with the gradient's norm cut at 1."""
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * learning_rate_factor(step, args.steps, args.warmup)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def held_out_loss(
    trainee: Trainee, stream: np.ndarray, args: argparse.Namespace, windows: int, autocast: bool
) -> float:
    """Mean loss over evenly spread held-out windows."""
    starts = np.linspace(0, len(stream) - args.window - 2, windows).astype(int)
    losses = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for first in range(0, windows, args.batch):
            losses.append(trainee(gather(stream, starts[first : first + args.batch], args)).item())
    return float(np.mean(losses))


def gather(stream: np.ndarray, starts: np.ndarray, args: argparse.Namespace) -> Tensor:
    rows = np.stack([stream[s : s + args.window + 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--text", help="a file or folder to train on instead of the standard library")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--state-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="slower; for machines without a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/checkpoint.pt")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    texts, held_out_texts = corpus(args.text)
    random.Random(args.seed).shuffle(texts)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    train, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    if args.text is not None:
        write_sample(args.output / "calibration.txt", texts)
        write_sample(args.output / "held_out.txt", held_out_texts)
    model = build_model(args)
    trainee = Trainee(model, compiled=not args.no_compile)
    optimizer = optimizer_for(model, args)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train):,} training tokens, {len(held_out):,} held out", flush=True)

    first, history, checkpoint = 0, [], args.output / "checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, history = saved["step"], saved["history"]

    begun = time.perf_counter()
    for step in range(first, args.steps):
        draw = np.random.default_rng((args.seed, step))
        batch = gather(train, draw.integers(0, len(train) - args.window - 1, args.batch), args)
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainee(batch)
        descend(loss, model, optimizer, step, args)
        done = step + 1
        if done % 20 == 0:
            pace = (done - first) / (time.perf_counter() - begun)
            print(
                f"step {done}/{args.steps}  loss {loss.item():.3f}  {pace * args.batch * args.window:,.0f} tokens/s  "
                f"{(args.steps - done) / pace / 60:.0f} min left",
                flush=True,
            )
        if done % 200 == 0 or done == args.steps:
            history.append((done, held_out_loss(trainee, held_out, args, 64, autocast=True)))
            print(f"held-out loss {history[-1][1]:.4f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "history": history}
            torch.save(state, checkpoint)

    save(model.to(torch.bfloat16), tokenizer, args, history, parameters, len(train))


def save(
    model: transformers.Mamba2ForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    args: argparse.Namespace,
    history: list[tuple[int, float]],
    parameters: int,
    tokens: int,
) -> None:
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    record = {
        "options": {
            key: value for key, value in vars(args).items() if key not in ("output", "text", "resume", "no_compile")
        },
        "parameters": parameters,
        "training_tokens": tokens,
        "held_out_loss": history,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
