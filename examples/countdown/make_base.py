"""Make the base model of the Countdown example: a character tokenizer and a 0.14M-parameter Qwen3, warm-started.

``python examples/countdown/make_base.py --out examples/countdown/base --seed 0`` takes one or two minutes on one core.
The held-out problems take no part in the warm start, so the figures printed at the end are true held-out figures.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import operator
import platform
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_rlvr.data.countdown import Problem, draw_answer, problems

PAD, EOS = "<pad>", "<eos>"
# 30 characters, of which the task uses 17: with PAD and EOS a vocabulary of 32, which splits over 2 to 32 ranks.
CHARACTERS = "0123456789+-*/()=:;,. ?!<>^%_&"
MAX_NEW_TOKENS = 9
BATCH, STEPS, WARMUP, LEARNING_RATE = 256, 300, 20, 4e-3
EVAL_PROMPTS, EVAL_SAMPLES = 128, 16
OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id per character; a character outside the vocabulary is an error, never silently dropped."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised fp32 Qwen3 of three layers, 64 wide."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def training_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh rows of prompt, answer, EOS: input ids ``[BATCH, L]`` and labels, -100 outside answer and EOS."""
    drawn = [draw_answer(rng, "train") for _ in range(BATCH)]
    encoded = tokenizer([problem.text + answer + EOS for problem, answer in drawn], padding=True, return_tensors="pt")
    inputs_BL = encoded["input_ids"]
    labels_BL = inputs_BL.masked_fill(inputs_BL == tokenizer.pad_token_id, -100)
    labels_BL[:, : len(drawn[0][0].text)] = -100
    return inputs_BL, labels_BL


def warm_start(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Fit random right answers for ``STEPS`` steps; returns the last step's loss in nats per token."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    loss = torch.zeros(())
    for _ in (progress := trange(STEPS, desc="warm start", unit="step")):
        inputs_BL, labels_BL = training_batch(tokenizer, rng)
        # Rows are padded on the right and attention is causal, so the padding needs no mask.
        logits_BLV = model(input_ids=inputs_BL).logits
        loss = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def solves(problem: Problem, response: str) -> bool:
    """True when ``response`` is an expression over ``+ - *`` that uses each digit once and equals the target."""
    used: list[int] = []

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise SyntaxError("not a Countdown expression")

    try:
        reached = value(ast.parse(response, mode="eval").body)
    except SyntaxError:
        return False
    return reached == problem.target and tuple(sorted(used)) == problem.numbers


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Accuracy and mean token entropy (nats) of samples at temperature 1 on held-out prompts."""
    chosen = random.Random(seed).sample(problems("heldout"), EVAL_PROMPTS)
    rows = [problem for problem in chosen for _ in range(EVAL_SAMPLES)]
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = tokenizer([problem.text for problem in rows], return_tensors="pt")["input_ids"]
    width = tokens_BL.shape[1]
    alive_B = torch.ones(len(rows), dtype=torch.bool)
    entropy_sum, token_count = 0.0, 0
    for _ in range(MAX_NEW_TOKENS):
        logprobs_BV = model(input_ids=tokens_BL, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        entropy_sum += -(logprobs_BV.exp() * logprobs_BV).sum(-1)[alive_B].sum().item()
        token_count += int(alive_B.sum())
        drawn_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)[:, 0]
        tokens_BL = torch.cat([tokens_BL, drawn_B.where(alive_B, tokenizer.pad_token_id)[:, None]], dim=1)
        alive_B &= drawn_B != tokenizer.eos_token_id
    texts = tokenizer.batch_decode(tokens_BL[:, width:], skip_special_tokens=True)
    right = sum(solves(problem, text) for problem, text in zip(rows, texts, strict=True))
    return {"accuracy": right / len(rows), "entropy": entropy_sum / token_count}


def save(out: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights, configuration, tokenizer and generation defaults into ``out``."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    settings_file = out / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")
    for weights in out.glob("*.safetensors"):
        weights.chmod(0o644)


def main(argv: list[str] | None = None) -> None:
    """Build, warm-start, evaluate and write the base model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, training problems and evaluation samples")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    final_loss = warm_start(model, tokenizer, arguments.seed)
    trained = time.perf_counter()
    figures = evaluate(model.train(False), tokenizer, arguments.seed)
    save(arguments.out, model, tokenizer)
    record = {
        "command": "python " + " ".join(sys.argv),
        "seed": arguments.seed,
        "parameters": model.num_parameters(),
        "training": {"steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "final_loss": final_loss},
        "heldout": {"prompts": EVAL_PROMPTS, "samples_per_prompt": EVAL_SAMPLES, **figures},
        "seconds": {"training": round(trained - started, 1), "evaluation": round(time.perf_counter() - trained, 1)},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
    }
    (arguments.out / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n")
    print("held-out accuracy {accuracy:.3f}, entropy {entropy:.3f} nats per token".format(**figures))


if __name__ == "__main__":
    main()
