#!/usr/bin/env python3
"""Goldens of tokenizers from Hugging Face `tokenizers` (needs `pip install tokenizers==0.23.3`).

  golden_tokenizers.py write
      trains tiny tokenizers that between them use every component of tokenizer.json, encodes and decodes random text with
      them, and writes Tests/ApusTokenizationTests/TokenizerGoldens.swift.

`fuzz_tokenizers.py` compares many more with a running program.

Text left over after `--skip-special` is compared with decoding the ids that are not special: tokenizers 0.23 itself keeps
special tokens whose `normalized` flag is set.
"""
import json
import random
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = """the of and hello world function return int main Zürich naïve don't I'm We'LL they're it's 's 'S 'ſ café 北京
你好世界 こんにちは カタカナ 한국어 мир Привет שלום مرحبا हिन्दी ไทย 😀 👨‍👩‍👧 🇩🇪 ½ ² ⅷ 123 1234567 3.14 0x1F foo_bar fooBar
HTTPServer ǅ ʰ ﬁ ẞ ß İ ı é e\u0301 a\u0323\u0301 \u0301\u0323 가 \u1100\u1161\u11a8 ▁ ▁▁ Ġ <0x0A> <0xE5> ## ##ing \u200d
\u00ad \ufeff""".split()
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", " \t ", "\u00a0", "\u3000", "\u2028", "\x85", "\x0b", "\x0c",
          "\x1c", "       ", "\n \n", "\r"]
PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["...", "!!", "//", "/\n", ";\n", "——", "。", "、", "「", "¿", "…"]
BLOCKS = [(0, 0x7F), (0x80, 0x24F), (0x250, 0x36F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF),
          (0xE00, 0x11FF), (0x1E00, 0x20FF), (0x2000, 0x206F), (0x2100, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
          (0xA000, 0xABFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xF900, 0xFFFF), (0x10000, 0x1FFFF), (0x1D400, 0x1D7FF),
          (0x1F300, 0x1FAFF), (0x20000, 0x323AF), (0xE0000, 0xE01EF), (0, 0x10FFFF)]


class Texts:
    """Random text of all planes, scripts, spaces, punctuation, code and the tokenizer's own tokens."""

    def __init__(self, seed, tokenizer=None):
        self.random = random.Random(seed)
        self.added = [t.content for t in tokenizer.get_added_tokens_decoder().values()] if tokenizer else []
        self.vocabulary = sorted(tokenizer.get_vocab()) if tokenizer else WORDS

    def character(self):
        low, high = self.random.choice(BLOCKS)
        while True:
            c = self.random.randint(low, high)
            if not 0xD800 <= c < 0xE000:
                return chr(c)

    def text(self, longest=30):
        r, out = self.random, []
        for _ in range(r.choice([n for n in (1, 2, 3, 5, 8, 13, 30) if n <= longest])):
            x = r.random()
            if x < 0.25:
                out.append(r.choice(WORDS))
            elif x < 0.45:
                out.append(r.choice(SPACES))
            elif x < 0.55:
                out.append(r.choice(PUNCTUATION))
            elif x < 0.60 and self.added:
                out.append(r.choice(self.added))
            elif x < 0.70:
                out.append(r.choice(self.vocabulary).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n"))
            elif x < 0.75:
                out.append(r.choice(self.vocabulary))
            elif x < 0.85:
                out.append(self.character())
            elif x < 0.92:
                out.append("".join(self.character() for _ in range(r.randint(1, 8))))
            elif x < 0.96:
                out.append(r.choice("aAbZ 1.\n'é😀中") * r.randint(1, 80))
            else:
                out.append("".join(r.choice(" \n\r\t'sS a1.") for _ in range(r.randint(1, 15))))
            if r.random() < 0.4:
                out.append(" ")
        return "".join(out)

    def ids(self, limit):
        return [self.random.randrange(limit) for _ in range(self.random.randint(0, 12))]


def expectation(tokenizer, ids):
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    return (tokenizer.decode(ids, skip_special_tokens=False),
            tokenizer.decode([i for i in ids if i not in special], skip_special_tokens=False))


def components():
    """Tiny tokenizers that use every component."""
    n, p, d, x = normalizers, pre_tokenizers, decoders, processors
    # Any Unicode string map in SentencePiece's compiled form: a double array for "ﬁ" to "fi" and "①" to "1" only.
    corpus = [" ".join(WORDS), "hello world, the world of the hello. don't foo_bar 123 4567 " * 3,
              "a function returns the word of the world" * 2]
    added = [AddedToken("<l>", lstrip=True, normalized=False, special=True), AddedToken("<r>", rstrip=True, normalized=False),
             AddedToken("word", single_word=True, normalized=False), AddedToken("Norm Tok", normalized=True),
             AddedToken("<both>", lstrip=True, rstrip=True, special=True), AddedToken("<both>x", normalized=False),
             AddedToken("é", single_word=True)]
    gpt = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    cl100k = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    short = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    lead = r"[^\r\n\p{L}\p{N}]?"
    o200k = (rf"{lead}{upper}*{lower}+{short}|{lead}{upper}+{lower}*{short}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|"
             r"\s*[\r\n]+|\s+(?!\S)|\s+")
    kimi = (rf"[\p{{Han}}]+|{lead}{upper[:-1]}&&[^\p{{Han}}]]*{lower[:-1]}&&[^\p{{Han}}]]+{short}|\p{{N}}{{1,3}}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    byte = lambda regex, **k: p.Sequence([p.Split(Regex(regex), "isolated"), p.ByteLevel(add_prefix_space=False, use_regex=False)])
    llama = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    llama_decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    cases = [
        ("gpt2", "byte", None, p.ByteLevel(), d.ByteLevel()),
        ("gpt2 split", "byte", None, byte(gpt), d.ByteLevel()),
        ("cl100k", "byte", n.NFC(), byte(cl100k), d.ByteLevel()),
        ("o200k", "byte", None, byte(o200k), d.ByteLevel()),
        ("kimi", "byte", None, byte(kimi), d.ByteLevel()),
        ("deepseek", "byte", None, p.Sequence([
            p.Split(Regex("[\r\n]"), "isolated"), p.Split(Regex(r"\s?\p{L}+"), "isolated"),
            p.Split(Regex(r"\s?\p{P}+"), "isolated"), p.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
            p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False, use_regex=False)]), d.ByteLevel()),
        ("llama", "fallback", llama, None, llama_decoder),
        ("metaspace first", "fallback", None, p.Metaspace(prepend_scheme="first", split=False), llama_decoder),
        ("metaspace", "unigram", n.Sequence([n.Nmt(), n.NFKC(), n.Replace(Regex(" {2,}"), " ")]), p.Metaspace(), d.Metaspace()),
        ("unigram bytes", "unigram bytes", n.Sequence([n.Strip(), n.Lowercase()]), p.Metaspace(prepend_scheme="first"),
         d.Sequence([d.ByteFallback(), d.Metaspace()])),
        ("bert", "wordpiece", n.BertNormalizer(), p.BertPreTokenizer(), d.WordPiece()),
        ("bert cased", "wordpiece", n.BertNormalizer(lowercase=False, strip_accents=True, clean_text=False),
         p.Sequence([p.WhitespaceSplit(), p.Punctuation("contiguous")]), d.WordPiece(cleanup=False)),
        ("words", "wordlevel", n.Sequence([n.NFD(), n.StripAccents()]), p.Whitespace(), None),
        ("scripts", "wordlevel", n.NFKD(), p.Sequence([p.UnicodeScripts(), p.Digits()]), d.Fuse()),
        ("delimiter", "suffix", n.Lowercase(), p.CharDelimiterSplit("e"), d.BPEDecoder(suffix="</w>")),
        ("suffix", "suffix", n.NFC(), p.WhitespaceSplit(), d.BPEDecoder(suffix="</w>")),
        ("prefix", "prefix", n.NFKC(), p.Punctuation("merged_with_next"), d.WordPiece()),
        ("fixed", "plain", n.NFD(), p.FixedLength(3), d.Sequence([d.Fuse(), d.Strip(" ", 2, 3), d.Replace("th", "TH")])),
        ("ctc", "plain", n.Replace(Regex(r"\s{2,}|\d"), "_"), p.Split("e", "merged_with_previous"),
         d.CTC(pad_token="a", word_delimiter_token="o")),
        ("byte normalizer", "byte", n.ByteLevel(), p.Split("Ġ", "merged_with_next"), d.ByteLevel()),
        ("regex", "plain", n.Strip(left=True, right=False), p.Split(Regex(r"(?<=[aeiou])\p{Lu}|(\w)\1+|\b\d++"), "removed"),
         d.Sequence([d.Replace(Regex(r"[aeiou]"), "*"), d.Fuse(), d.Replace(Regex(r"\s+"), " ")])),
    ]
    for behavior in ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]:
        for invert in (False, True):
            cases.append((f"split {behavior} {invert}", "wordlevel", None,
                          p.Split(Regex(r"\s+|[A-Z]|(?<=a)b|x*"), behavior, invert), d.Fuse()))
    hexadecimal = ["<0x%02X>" % i for i in range(256)]
    for index, (name, kind, normalizer, splitter, decoder) in enumerate(cases):
        if kind in ("unigram", "unigram bytes"):
            scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
            pieces = ["▁", "▁the", "the", "▁of", "world", "▁world", "wor", "ld", "hello", "▁hel", "lo", "fi", "don", "'", "t"]
            scores += [(piece, -2.0 - 0.37 * i) for i, piece in enumerate(pieces)]
            scores += [(c, -9.0 - 0.11 * i) for i, c in enumerate("abcdefghijklmnoprsuw北京éä.,▁▁1230")
                       if c not in pieces and c not in {s for s, _ in scores}]
            seen, unique = set(), []
            for token, score in scores + ([(h, -20.0) for h in hexadecimal] if kind == "unigram bytes" else []):
                if token not in seen:
                    seen.add(token)
                    unique.append((token, score))
            tokenizer = Tokenizer(models.Unigram(unique, 0, kind == "unigram bytes"))
        else:
            special = ["<unk>", "<s>", "</s>"] + (hexadecimal if kind == "fallback" else [])
            size = len(special) + 120
            common = {"special_tokens": special, "show_progress": False}
            if kind == "wordlevel":
                model, trainer = models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(vocab_size=80, **common)
            elif kind == "wordpiece":
                model = models.WordPiece(unk_token="<unk>", max_input_chars_per_word=20)
                trainer = trainers.WordPieceTrainer(vocab_size=size, **common)
            elif kind == "byte":
                model = models.BPE()
                trainer = trainers.BpeTrainer(vocab_size=259 + 60, initial_alphabet=p.ByteLevel.alphabet(), **common)
            elif kind == "suffix":
                model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=True)
                trainer = trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", **common)
            elif kind == "prefix":
                model = models.BPE(unk_token="<unk>", continuing_subword_prefix="##")
                trainer = trainers.BpeTrainer(vocab_size=size, continuing_subword_prefix="##", **common)
            else:
                model = models.BPE(unk_token="<unk>")
                trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=60, **common)
            tokenizer = Tokenizer(model)
            if normalizer:
                tokenizer.normalizer = normalizer
            if splitter:
                tokenizer.pre_tokenizer = splitter
            tokenizer.train_from_iterator(corpus, trainer)
            if kind == "fallback":
                value = json.loads(tokenizer.to_str())
                value["model"].update(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
                value["added_tokens"] = value["added_tokens"][:3]
                tokenizer = Tokenizer.from_str(json.dumps(value))
        if normalizer:
            tokenizer.normalizer = normalizer
        if splitter:
            tokenizer.pre_tokenizer = splitter
        if decoder:
            tokenizer.decoder = decoder
        chosen = random.Random(index)
        if index % 3 != 1:
            tokenizer.add_tokens(chosen.sample(added, chosen.randint(2, len(added))))
        if index % 4 == 0 and tokenizer.token_to_id("</s>") == 2:
            pairs = ("</s>", 2), ("<s>", 1)
            tokenizer.post_processor = [
                x.TemplateProcessing(single="<s> $A </s> </s>", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]),
                x.BertProcessing(*pairs), x.RobertaProcessing(*pairs),
                x.Sequence([x.ByteLevel(), x.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=[("<s>", 1)])]),
            ][index // 4 % 4]
        yield name, tokenizer


def write(path):
    groups = []
    for index, (name, tokenizer) in enumerate(components()):
        texts = Texts(1000 + index, tokenizer)
        limit = max(tokenizer.get_vocab(True).values()) + 1
        cases = []
        while len(cases) < 16:
            encodes = len(cases) < 12
            text = texts.text(longest=13)[:120]
            try:
                ids = tokenizer.encode(text).ids if encodes else texts.ids(limit)
                shown, skipped = expectation(tokenizer, ids)
            except BaseException:  # noqa: BLE001 some combinations make the library panic
                continue
            case = {"ids": ids, "shown": shown, "skipped": skipped}
            if encodes:
                case["text"] = text
            cases.append(case)
        groups.append({"name": name, "tokenizer": json.loads(tokenizer.to_str()), "cases": cases})
    with open(path, "w") as out:
        out.write("// Made by Scripts/golden_tokenizers.py with tokenizers 0.23.3; do not edit.\n\n")
        out.write("/// Tiny tokenizers and what Hugging Face `tokenizers` makes of random text, one JSON document a line.\n")
        out.write('let tokenizerGoldens = ##"""\n')
        for group in groups:
            # ASCII only, so that no editor touches odd characters.
            out.write("  " + json.dumps(group, separators=(",", ":")) + "\n")
        out.write('  """##\n')


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write("Tests/ApusTokenizationTests/TokenizerGoldens.swift")
    else:
        sys.exit(__doc__)
