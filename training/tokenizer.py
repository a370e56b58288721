"""Trains the byte-level BPE tokenizer of the demo models on the generated corpus and writes the files of it.

    python tokenizer.py --out build/tokenizer
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import chat
import corpus

VOCABULARY = 4096
# Words with the space or sign before them, digits one by one, signs, line ends: as Qwen splits its text.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")


def texts(count: int):
    for index in range(count):
        text = corpus.text_of(corpus.training_conversation(index))
        for token in chat.SPECIAL:
            text = text.replace(token, "\n")
        yield text


def train(count: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(chat.SPECIAL), min_frequency=2, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts(count), trainer)
    # Ids of added tokens follow the learnt ones. Reasoning and tool marks stay visible when special ones are skipped.
    for token in chat.SPECIAL:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)]) if token[1] != "|" else \
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build/tokenizer")
    parser.add_argument("--count", type=int, default=40000)
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(arguments.count)
    tokenizer.save(str(out / "tokenizer.json"))
    added = {str(tokenizer.token_to_id(token)): {
        "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
        "special": token[1] == "|"} for token in chat.SPECIAL}
    (out / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None,
        "chat_template": chat.CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>",
        "errors": "replace", "model_max_length": 2048, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None,
    }, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens in {out}")


if __name__ == "__main__":
    main()
