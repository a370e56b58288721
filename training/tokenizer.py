"""Trains the byte-level BPE tokenizer of the demo models on the generated corpus and writes the files of it.

    python tokenizer.py --out build/tokenizer
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import chat
import corpus

VOCABULARY = 4096
WORD_PIECES = 2660  # entries before those with a space in front are made
# Words with the space before them, digits one by one, signs, line ends.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
SPACELESS = PATTERN.replace(r" ?\p{L}+", r"\p{L}+")


def texts(count: int):
    for index in range(count):
        text = corpus.text_of(corpus.training_conversation(index))
        for token in chat.SPECIAL:
            text = text.replace(token, "\n")
        yield text


def splitter(pattern: str):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


def train(count: int) -> Tokenizer:
    """A BPE in which a word is cut the same way with and without a space before it.

    Merges are learnt on words alone. Those that join a space with the first piece of a word come last, so " Bafi" is
    always the space form of the first piece of "Bafi" and then the same pieces: what is to be copied from a sentence
    into quotes has the same number of tokens there.
    """
    learner = Tokenizer(models.BPE(byte_fallback=False))
    learner.pre_tokenizer = splitter(SPACELESS)
    learner.train_from_iterator(texts(count), trainers.BpeTrainer(
        vocab_size=WORD_PIECES, min_frequency=2, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    model = json.loads(learner.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    space = "\u0120"  # how byte-level BPE writes a space
    first: Counter = Counter()
    for text in texts(min(count, 5000)):
        for word, times in Counter(re.findall(r"(?<= )[^\W\d_]+", text)).items():
            first[word] += times
    pieces: Counter = Counter()
    for word, times in first.items():
        pieces[learner.encode(word, add_special_tokens=False).tokens[0]] += times
    for piece, _ in sorted(pieces.items(), key=lambda entry: (-entry[1], entry[0])):
        if len(vocabulary) == VOCABULARY - len(chat.SPECIAL):
            break
        if space + piece not in vocabulary:
            vocabulary[space + piece] = len(vocabulary)
            merges.append((space, piece))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=False))
    tokenizer.pre_tokenizer = splitter(PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    # Ids of added tokens follow the learnt ones. Reasoning and tool marks stay visible when special ones are skipped.
    for token in chat.SPECIAL:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)]) if token[1] != "|" else \
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build/tokenizer")
    parser.add_argument("--count", type=int, default=20000)
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(arguments.count)
    if tokenizer.get_vocab_size() != VOCABULARY:
        sys.exit(f"{arguments.count} conversations have words for {tokenizer.get_vocab_size()} of {VOCABULARY} entries only.")
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
